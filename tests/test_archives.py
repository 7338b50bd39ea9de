"Pools in archives: the same labels, rounds and students as from a folder, and memory that does not grow with the pool."
import io, json, re, subprocess, sys, tarfile

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch import nn

from noisy_student import archives
from noisy_student.archives import ArchiveError, list_archive
from noisy_student.cli import main
from noisy_student.pseudo_labels import (predict_pseudo_labels, read_selection, relabel_pseudo_labels,
                                         select_pseudo_labels)

SMALL = '--arch resnet9_8 --epochs 1 --size 16 --device cpu'.split()


def encoded(color, seed, size=20):
    noise = np.random.default_rng(seed).integers(-40, 40, (size, size, 3))
    Image.fromarray((np.array(color) + noise).clip(0, 255).astype(np.uint8)).save(b := io.BytesIO(), 'PNG')
    return b.getvalue()


def pack(file, members):
    with tarfile.open(file, 'w') as t:
        for name, data in members.items(): (m := tarfile.TarInfo(name)).size = len(data); t.addfile(m, io.BytesIO(data))
    return str(file)


@pytest.fixture(scope='module')
def mine(tmp_path_factory):
    "Red and blue labeled pictures; 24 unlabeled ones in a folder, in two tar files, and in a parquet file."
    root, colors = tmp_path_factory.mktemp('mine'), dict(red=(200, 60, 60), blue=(60, 60, 200))
    for c, color in colors.items():
        (root/'data'/'train'/c).mkdir(parents=True)
        for i in range(6): (root/'data'/'train'/c/f'{i}.png').write_bytes(encoded(color, i))
    pool = {f'{i:02d}.png': encoded(colors['red' if i % 2 else 'blue'], 100 + i) for i in range(24)}
    for o in ('files', 'tars', 'table'): (root/o).mkdir()
    for name, data in pool.items(): (root/'files'/name).write_bytes(data)
    for k in range(2):
        pack(root/'tars'/f'pool-{k:04d}.tar', {n: pool[n]
                                               for n in sorted(pool)[k * 12:k * 12 + 12]} | {f'{k}.json': b'{}'})
    pq.write_table(pa.table(dict(image=[pool[n] for n in sorted(pool)])), root/'table'/'pool.parquet', row_group_size=5)
    return root


@pytest.fixture(autouse=True)
def one_thread():
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


def stem(item): return item.split('/')[-1]


def test_from_the_shell_a_pool_in_archives_does_what_a_folder_does(mine, capsys):
    def call(*args): assert main([str(a) for a in args]) == 0, capsys.readouterr().err
    call('train', mine/'data', '--out', mine/'teacher', *SMALL)
    tables = {}
    for kind in ('files', 'tars', 'table'):
        call('label', mine/'teacher', mine/kind, '--out', mine/'labels'/kind)
        call('select', mine/'labels'/kind, '--out', mine/f'{kind}.parquet', '--threshold', 0, '--per-class', 5)
        tables[kind] = pd.read_parquet(mine/'labels'/kind).sort_values('item')
    for kind in ('tars', 'table'):
        np.testing.assert_array_equal(np.stack(tables[kind].probs), np.stack(tables['files'].probs))
    assert list(map(stem, tables['tars']['item'])) == list(map(stem, tables['files']['item']))
    for kind in ('files', 'tars', 'table'):
        call('train', mine/'data', '--pseudo', mine/f'{kind}.parquet', '--out', mine/f'student {kind}', *SMALL)
        call('relabel', mine/f'student {kind}', mine/f'{kind}.parquet', '--out', mine/f'again {kind}.parquet')
    a, b = (json.loads((mine/f'student {kind}'/'round_0'/'metrics.json').read_text()) for kind in ('files', 'tars'))
    assert a['pseudo_labeled'] == b['pseudo_labeled'] > 0
    call('run', mine/'data', '--unlabeled', mine/'tars', '--out', mine/'run', '--rounds', 1, '--threshold', 0, *SMALL)
    assert all('.tar/' in o for o in read_selection(mine/'run'/'round_1'/'selected.parquet').items)
    call('predict', mine/'teacher', mine/'tars'/'pool-0000.tar')


def test_relabeling_reads_each_table_of_contents_once(mine, tmp_path, monkeypatch):
    """In whatever order a selection names the images, and when only one table fits into memory; the order of the result
    is the selection's."""
    torch.manual_seed(0)
    first, second = (nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 2)) for _ in range(2))
    tars = sorted(map(str, (mine/'tars').glob('*.tar')))
    predict_pseudo_labels(first, tars, tmp_path/'labels', size=20)
    old = select_pseudo_labels(tmp_path/'labels', tmp_path/'old.parquet', threshold=0, per_class=None).to_pandas()
    files = [o.split('.tar/')[0] for o in old['item']]
    assert sum(a != b for a, b in zip(files, files[1:])) > 4 # back and forth
    opened, real = [], archives._Tar.__init__
    def init(self, file): opened.append(file); real(self, file)
    monkeypatch.setattr(archives._Tar, '__init__', init)
    monkeypatch.setattr(archives, 'MAX_INDEXED', 1)
    archives._contents.clear()
    new = relabel_pseudo_labels(second, tmp_path/'old.parquet', tmp_path/'new.parquet', bs=5, size=20).to_pandas()
    # two threads that read on both sides of a boundary may each want theirs back
    assert set(opened) == set(tars) and len(opened) <= 4 and new['item'].tolist() == old['item'].tolist()
    assert new['copies'].tolist() == old['copies'].tolist()
    predict_pseudo_labels(second, tars, tmp_path/'again', size=20)
    probs = pd.read_parquet(tmp_path/'again').set_index('item').probs
    np.testing.assert_allclose(np.stack(new.probs).astype(float), np.stack(probs[new['item']]).astype(float), atol=1e-3)


def test_mistakes_name_the_archive(mine, capsys):
    main([str(o) for o in ('train', mine/'data', '--out', mine/'small', *SMALL)])
    for saying, *args in [('pool.tar.gz is compressed', mine/'pool.tar.gz'), ('no file .*gone.tar', mine/'gone.tar'),
                          ('one folder', mine/'files', mine/'data')]:
        capsys.readouterr()
        assert main(['label', *map(str, [mine/'small', *args, '--out', mine/'none'])]) == 2
        assert re.search(saying, capsys.readouterr().err.splitlines()[-1])
    cut = mine/'cut.tar'
    cut.write_bytes((mine/'tars'/'pool-0000.tar').read_bytes()[:5000])
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 2))
    with pytest.raises(ArchiveError, match='cut.tar is not a whole tar file'):
        predict_pseudo_labels(model, [str(cut)], mine/'cut labels', size=8)


@settings(max_examples=60)
@given(st.data())
def test_a_damaged_table_of_contents_is_an_error_or_gives_names_inside(tmp_path_factory, data):
    file = tmp_path_factory.mktemp('fuzz')/'a.tar'
    pack(file, {f'{i}.png': b'x' * 300 for i in range(4)})
    raw = bytearray(file.read_bytes())
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, 4 * 1024 - 1), st.integers(0, 255)), min_size=1,
                                        max_size=4)): raw[at] = value
    file.write_bytes(raw[:data.draw(st.sampled_from([len(raw), 3000, 700, 513, 1]))])
    try: found = list_archive(file)
    except ArchiveError: return
    assert found and not any('..' in o.removeprefix(f'{file}/').split('/') for o in found)


FLAT = """
import resource, sys
import torch
from torch import nn
from noisy_student.pseudo_labels import predict_pseudo_labels
torch.set_num_threads(1); torch.manual_seed(0)
model = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 50))
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
tars, out = sys.argv[2:], sys.argv[1]
predict_pseudo_labels(model, tars[:3], out + '/1', size=128, bs=32, part_size=128)
small = peak()
predict_pseudo_labels(model, tars, out + '/10', size=128, bs=32, part_size=128)
print(small, peak())
"""


def test_memory_is_flat_in_the_size_of_the_pool(tmp_path):
    "A pool ten times as large, 3,000 images of 49 kB each when decoded, may not take 20 MB more."
    image = encoded((9, 9, 9), 0, 4)
    tars = [pack(tmp_path/f'{k:03d}.tar', {f'{i}.png': image for i in range(100)}) for k in range(30)]
    done = subprocess.run([sys.executable, '-c', FLAT, str(tmp_path), *tars], capture_output=True, text=True,
                          check=True)
    small, large = map(float, done.stdout.split())
    assert pq.ParquetDataset(str(tmp_path/'10')).read(columns=['item']).num_rows == 3000
    assert large - small < 20, (small, large)
