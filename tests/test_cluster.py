"Labeling on a Ray cluster of two workers: the same bytes as on one machine, also when a worker is killed."
import os, signal, tarfile, time

import pytest
import torch
from PIL import Image
from torch import nn

from noisy_student.cluster import label_on_ray
from noisy_student.pseudo_labels import PseudoLabelError, predict_pseudo_labels, select_pseudo_labels

pytestmark = pytest.mark.slow  # a cluster takes half a minute to start


@pytest.fixture(scope='module')
def cluster():
    ray = pytest.importorskip('ray')
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.fixture(scope='module')
def pools(tmp_path_factory):
    "90 images as files and in six tar files, one of them damaged."
    root, files, tars = tmp_path_factory.mktemp('pool'), [], []
    for i in range(90):
        Image.new('RGB', (8, 8), (2 * i, 90, 200 - i)).save(root/f'{i:02d}.png')
        files.append(str(root/f'{i:02d}.png'))
    (root/'41.png').write_bytes(b'not an image')
    for k in range(6):
        tars.append(str(root/f'pool-{k:04d}.tar'))
        with tarfile.open(tars[-1], 'w') as t:
            for f in files[15 * k:15 * k + 15]: t.add(f, os.path.basename(f))
    return dict(files=files, tars=tars)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 3))


# a network that takes its process with it, once; a local class, so that the workers need not import this file
def mortal(flag):
    class Mortal(nn.Sequential):
        calls = 0
        def forward(self, x):
            Mortal.calls += 1
            time.sleep(.05)
            if flag and Mortal.calls == 4 and not os.path.exists(flag):
                open(flag, 'w').close()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().forward(x)
    return Mortal(*network())


def content(folder): return {o.name: o.read_bytes() for o in folder.iterdir()}


@pytest.mark.parametrize('kind', ['files', 'tars'])
@pytest.mark.filterwarnings('ignore:1 of 90 images could not be read')
def test_a_killed_worker_changes_nothing(cluster, pools, kind, tmp_path):
    n = torch.get_num_threads()
    torch.set_num_threads(1)  # as Ray gives to a replica with one core
    one = predict_pseudo_labels(network(), pools[kind], tmp_path/'one', size=8, bs=4, part_size=8)
    torch.set_num_threads(n)
    flag, calls = tmp_path/'killed', []
    out = label_on_ray(mortal(str(flag)), pools[kind], tmp_path/'ray', replicas=2, size=8, bs=4, part_size=8,
                       progress=lambda *o: calls.append(o))
    assert flag.exists() and calls[-1][0] == calls[-1][1] == len(calls)
    assert content(out) == content(one) and len(list(out.glob('part-*'))) == 12
    assert len(select_pseudo_labels(out, tmp_path/'s.parquet', threshold=0, per_class=None)) == 89

    made = {o: o.stat().st_mtime_ns for o in out.glob('part-*')}  # again: only what is missing is made
    (gone := sorted(made)[5]).unlink()
    label_on_ray(network(), pools[kind], out, replicas=2, size=8, bs=4, part_size=8)
    assert content(out) == content(one)
    assert {o for o, at in made.items() if o.stat().st_mtime_ns != at} == {gone}


def test_errors_of_workers_are_for_people(cluster, pools, tmp_path):
    broken = network()
    broken[1].weight.data.fill_(float('nan'))
    with pytest.raises(PseudoLabelError, match='is not finite'):
        label_on_ray(broken, pools['files'], tmp_path/'nan', replicas=1, size=8)
    label_on_ray(network(), pools['files'][:10], tmp_path/'ok', replicas=1, size=8)
    other = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    with pytest.raises(PseudoLabelError, match='what differs: teacher'):
        label_on_ray(other, pools['files'][:10], tmp_path/'ok', replicas=1, size=8)
