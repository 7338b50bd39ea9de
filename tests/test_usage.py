"A mistake in a command line is said at once: before torch is loaded."
import json, os, subprocess, sys

import pytest

CODE = """import json, sys
from noisy_student.cli import main
code = main(json.loads(sys.argv[1]))
heavy = [o for o in ('torch', 'fastai', 'timm', 'matplotlib') if o in sys.modules]
print(json.dumps([code, heavy]))
"""


def usage(args, cwd):
    "Exit code, heavy modules that were loaded, and stderr of a command line in a fresh process."
    p = subprocess.run([sys.executable, '-c', CODE, json.dumps([str(a) for a in args])], cwd=cwd, text=True,
                       capture_output=True)
    return *json.loads(p.stdout.splitlines()[-1]), p.stderr


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "A folder without classes, and a table."
    root = tmp_path_factory.mktemp('usage')
    (root/'empty').mkdir()
    (root/'one'/'train'/'cats').mkdir(parents=True)
    (root/'table.csv').write_text('file,class\na.png,cat\nb.png,dog\n')
    return root


@pytest.mark.parametrize('line, saying', [
    ('run ./nonexist', "no data set or folder './nonexist'"),
    ('run nonexist.csv', "a folder or a .csv file"),
    ('run digits --foo', "no such option"),
    ('run digits --recipe fast', "unknown recipe 'fast'"),
    ('run digits --bs 0', "--bs"),
    ('run digits --bs many', "--bs"),
    ('run digits --lr -1', "--lr -1.0 must be greater than 0"),
    ('run digits --share 1.5', "--share 1.5 must be in (0, 1]"),
    ('run digits --ratio 0', "--ratio"),
    ('run digits --folds 1', "--folds"),
    ('run digits --noise loud', "--noise must be none, mild, paper or a magnitude from 0 to 30, got 'loud'"),
    ('run digits --noise 31', "a magnitude from 0 to 30"),
    ('run digits --time-limit soon', "no length of time"),
    ('run digits --device tpu', "'tpu' is none of cpu"),
    ('run digits --set thresold=.5', "did you mean threshold?"),
    ('run digits --set noise.dropuot=.5', "did you mean noise.dropout"),
    ('run digits --set noise.dropout=1', "dropout"),
    ('run digits --set bs', "--set must be NAME=VALUE"),
    ('run digits --set epochs=many', "--set epochs must be a whole number, got 'many'"),
    ('run digits --set epochs=0', "--epochs 0 must be at least 1"),
    ('run digits --set archs=resnet18', "use --arch"),
    ('run digits --pretrained nowhere.pth', "no weight file nowhere.pth"),
    ('run digits --suffix .jpg', "--suffix can be given with a .csv file only"),
    ('run empty', "empty"),
    ('run one', "at least 2 are needed"),
    ('run table.csv', "no column 'label': it has 'file', 'class'; name the right one with --label-column"),
    ('run table.csv --labels 5', "--labels cannot be given with a .csv file"),
    ('run table.csv --image-column file --label-column klass', "'klass'"),
    ('run table.csv --image-column file --label-column class', "a.png"),
    ('train digits --pseudo nowhere.parquet', "no selection at nowhere.parquet"),
    ('ablate nowhere', "no data set or folder 'nowhere'"),
    ('select nowhere', "no pseudo labels at nowhere"),
    ('select empty --per-class few', "--per-class few: give a number"),
    ('relabel runs/none nowhere.parquet', "no selection at nowhere.parquet"),
    ('select empty', "no pseudo labels at empty"),
    ('label runs/none digits', "no trained model at runs/none"),
    ('label resnet19 digits', "no trained model at resnet19"),
    ('label resnet18 nowhere', "no data set or folder 'nowhere'"),
    ('label resnet18 pool.tar', "no file pool.tar"),
    ('label resnet18 digits --ray --device cpu', "leave out --shard"),
    ('predict empty a.png', "no trained model at empty"),
    ('predict resnet-18 a.png', "(did you mean resnet18?)"),
    ('predict resnet18 nowhere.png', "nowhere.png: no such file"),
    ('evaluate resnet18 nowhere', "no data set or folder 'nowhere'"),
    ('export resnet19', "no trained model at resnet19"),
    ('recipes svnh', "did you mean svhn?"),
    ('predict runs/none a.png', "no trained model at runs/none"),
    ('predict empty table.csv a.png', "must be alone"),
    ('predict empty nowhere.csv', "no file nowhere.csv"),
    ('predict empty a.png --columns id,label', "give --csv FILE"),
    ('evaluate runs/none', "not the directory of a run"),
    ('evaluate runs/none digits', "no trained model at runs/none"),
    ('suspects empty', "not the directory of a run"),
    ('report empty', "not the directory of a run"),
    ('export empty --out model.pt', "must end in .onnx"),
])
def test_a_mistake_is_said_before_torch_is_loaded(line, saying, place):
    code, loaded, err = usage(line.split(), place)
    assert code == 2 and saying in err.splitlines()[-1], err
    assert loaded == []


def test_threads_wait_passively_unless_the_user_says_otherwise(place):
    code = ("import os; from noisy_student.cli import main; main(['--version']); "
            "print(os.environ.get('OMP_WAIT_POLICY'))")
    for given, expected in [({}, 'PASSIVE'), (dict(OMP_WAIT_POLICY='ACTIVE'), 'ACTIVE'),
                            (dict(GOMP_SPINCOUNT='9'), 'None')]:
        env = {k: v for k, v in os.environ.items() if k not in ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT')} | given
        out = subprocess.run([sys.executable, '-c', code], env=env, text=True, capture_output=True, check=True).stdout
        assert out.split()[-1] == expected
