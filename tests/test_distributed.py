"Two processes that train together, with gloo on the CPU, against one."
import json, os, subprocess, sys

import numpy as np
import pandas as pd
import pytest

SCRIPT = """
import json, os, sys
import numpy as np, torch
from fastai.learner import Learner
from fastai.optimizer import SGD
from torch import nn
from noisy_student.dataloaders import mixed_dataloaders
from noisy_student.datasets import digits
from noisy_student.distributed import MeanGradients, join, own_device, rank, world
from noisy_student.losses import SoftLabelCrossEntropy
from noisy_student.rounds import NoisyStudent

torch.set_num_threads(1)
join(own_device('cpu'))
data, out = digits(200), sys.argv[1]
labeled, valid = ((s.images, s.labels) for s in (data.labeled, data.valid))
pseudo = data.unlabeled.images, np.eye(10, dtype=np.float32)[data.unlabeled.hidden]
dls = mixed_dataloaders(labeled, valid, data.classes, pseudo, bs=24 // world(), ratio=2, steps=15, rank=rank(),
                         num_ranks=world())
torch.manual_seed(rank())  # different on purpose: all start from the weights of rank 0
net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
learn = Learner(dls, net, SoftLabelCrossEntropy(labeled=24 // world(), unlabeled_weight=1.5), opt_func=SGD,
                cbs=MeanGradients() if world() > 1 else [])
with learn.no_bar(), learn.no_logging(): learn.fit(3, .1)
weights = torch.cat([p.detach().flatten() for p in net.parameters()]).tolist()
json.dump(dict(losses=[list(map(float, v)) for v in learn.recorder.values], weights=weights),
          open(f'{out}/plain-{world()}-{rank()}.json', 'w'))
if len(sys.argv) > 2:
    ns = NoisyStudent(data, ['resnet9_8', 'resnet9_8'], f'{out}/run', rounds=int(sys.argv[2]), epochs=2, bs=24, size=8,
                      ema=.9, threshold=0., device='cpu')
    ns.fit()
    model = ns.learner(0).model
    json.dump([float(p.double().sum()) for p in model.parameters()], open(f'{out}/run-{world()}-{rank()}.json', 'w'))
"""


def launch(tmp_path, n, *args):
    script = tmp_path/'script.py'
    script.write_text(SCRIPT)
    go = [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', str(n), '--master-port',
          str(20000 + os.getpid() % 20000)] if n > 1 else [sys.executable]
    done = subprocess.run([*go, str(script), str(tmp_path), *map(str, args)], capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow  # three launches, each of which imports everything once per process
def test_two_processes_train_as_one_and_their_run_goes_on_with_one(tmp_path):
    launch(tmp_path, 2, 1)
    made = {f: f.stat().st_mtime_ns for f in (tmp_path/'run').glob('round_*/**/*') if f.is_file()}
    launch(tmp_path, 1)

    one, a, b = (json.loads((tmp_path/f'plain-{o}.json').read_text()) for o in ('1-0', '2-0', '2-1'))
    assert a == b  # reduced losses, and one network
    np.testing.assert_allclose(a['weights'], one['weights'], atol=1e-4)  # rank 0 has the seed of the single process
    np.testing.assert_allclose(a['losses'], one['losses'], rtol=1e-3)

    summary = pd.read_csv(tmp_path/'run'/'summary.csv')
    assert list(summary.role) == ['teacher', 'student'] and summary.valid_accuracy.between(0, 1).all()
    assert json.loads((tmp_path/'run-2-0.json').read_text()) == json.loads((tmp_path/'run-2-1.json').read_text())
    # each labeled its half
    assert len(list((tmp_path/'run'/'round_1'/'pseudo_labels').glob('_shard-*-of-00002.json'))) == 2

    launch(tmp_path, 1, 2)  # a further round, by one process
    assert list(pd.read_csv(tmp_path/'run'/'summary.csv').role) == ['teacher', 'student', 'student']
    assert {f: f.stat().st_mtime_ns for f in made} == made  # what two processes made is kept as it is


def test_a_batch_that_cannot_be_shared_is_an_error(monkeypatch, tmp_path):
    from noisy_student.datasets import digits
    from noisy_student.rounds import NoisyStudent
    monkeypatch.setenv('WORLD_SIZE', '5')
    with pytest.raises(ValueError, match='bs=24 is not divisible by 5'):
        NoisyStudent(digits(200), 'resnet9_8', tmp_path/'run', bs=24, size=8, device='cpu')
