"""What helps a student: recipes beside each other in equal seconds, on images that are all there to be used.

    python benchmarks/regimes.py --cases cifar10_4000 --seeds 0 1 2 --seconds 3600 --threads 2
    python benchmarks/regimes.py --cases cifar10_4000_some --variants teacher share mixup --seconds 480 --threads 1
    python benchmarks/regimes.py --cases photographs turned small --variants default px_96 full_rate --seeds 100 \
        --seconds 240 --threads 1
    python benchmarks/regimes.py table                                                           # Markdown

**Cases** are data sets of fastai's folder, their labels cut by the seed. Those named `_some` have fewer unlabeled,
validation and test images: labeling and judging them would else take most of some minutes.

**Variants** change what `NoisyStudent` chooses by itself, one thing at a time; each (case, seed, variant) is a process
of its own with the same `time_limit`. `teacher` has no students; `all_labels` is that teacher with the labels of the
pool, too: what the pool could give at most. The share of the gap that a variant closes is (variant - teacher) / (all
labels - teacher).

A clock that is shared with other work gives every run less, and not equally: compare `cpu_seconds` and `steps`, too.
Settings are to be chosen by the validation column. The cases `photographs`, `turned`, `small` and `small_400` are for
development alone, so that settings may be chosen by their test column, too: folders of images that folders.py does not
report on. Rows are added to results/regimes.csv as they come; rows that are
there are not measured again, except those with an error: an interrupted search can be called again.
"""
import argparse, itertools, json, os, tempfile, time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from folders import CASES as FOLDERS, WEIGHTS, add_row, in_process, items_of, make_folder
from PIL import Image

HERE = Path(__file__).resolve().parent
KEYS = ["case", "seed", "variant", "budget", "threads"]


def _cut(data, seed, pool, valid, test):  # as many of each, at random
    rng = np.random.default_rng(seed)
    def some(split, n): return split[np.sort(rng.permutation(len(split))[:n])]
    return replace(data, unlabeled=some(data.unlabeled, pool), valid=some(data.valid, valid),
                   test=some(data.test, test))


def _cifar10(n):
    def make(seed):
        from noisy_student.datasets import cifar10
        return cifar10(n, seed=seed, n_valid=1000 if n < 1000 else 5000)
    return make


def _imagenette(n):
    def make(seed):
        from noisy_student.datasets import imagenette
        return imagenette(n, seed=seed)
    return make


def _some(make, pool=15_000, valid=2000, test=4000): return lambda seed: _cut(make(seed), seed, pool, valid, test)


def _photographs(turned=False):
    """Imagenette's classes 5 to 9, which ImageNet's weights know: 20 labels each, 1,500 unlabeled, 1,000 test images.
    Turned: the same photographs, and the question is by how many quarters; no weights know that."""
    def make(seed):
        rng, parts = np.random.default_rng(seed), items_of(FOLDERS["dev_imbalanced"])[:2]
        folder, left = _folder(), dict(unlabeled=1500, test=1000)
        for part, items in zip(("unlabeled", "test"), parts):
            mine, labels = [(k, f) for k in range(5, 10) for f in items[k]], {}
            for i in rng.permutation(len(mine)):
                k, turns = mine[i][0], int(rng.integers(4))
                k, image = (turns if turned else k), Image.open(mine[i][1]).convert("RGB")
                where = f"train/{k}" if part == "unlabeled" and labels.get(k, 0) < 20 else part
                if where == part and not left[part]: continue
                if where == part: left[part] -= 1
                else: labels[k] = labels.get(k, 0) + 1
                file = folder / (f"test/{k}" if where == "test" else where) / f"{part}{i:05d}.jpg"
                file.parent.mkdir(parents=True, exist_ok=True)
                (image.rotate(90 * turns, expand=True) if turned else image).save(file, quality=92)
        return _opened(folder, seed)
    return make


def _of_folders(case): return lambda seed: _opened(make_folder(case, seed, _folder()), seed)


_KEPT = []  # as long as this process runs


def _folder():
    _KEPT.append(tempfile.TemporaryDirectory())
    return Path(_KEPT[-1].name) / "images"


def _opened(folder, seed):
    from noisy_student.datasets import from_folder
    return from_folder(folder, seed=seed)


PRETRAINED = dict(pretrained=WEIGHTS)
CASES = {  # name: images by seed, what a user would say of them
    "cifar10_4000": (_cifar10(4000), dict(pretrained=False)),
    "cifar10_4000_some": (_some(_cifar10(4000)), dict(pretrained=False, archs="resnet9_16")),
    "cifar10_400_lite0": (_cifar10(400), PRETRAINED | dict(size=96)),
    "cifar10_400_lite0_some": (_some(_cifar10(400), 6000, 1000, 2000), PRETRAINED | dict(size=96)),
    "imagenette_10": (_imagenette(847), dict(pretrained=False, size=64)),  # a tenth of what is not held out
    "photographs": (_photographs(), PRETRAINED),
    "turned": (_photographs(turned=True), PRETRAINED | dict(flip=False, force=True)),  # hard: near chance at first
    "small": (_of_folders("dev_cifar10_lite0_10"), PRETRAINED),  # 32 px
    "small_400": (_of_folders("dev_cifar10_scratch_400"), PRETRAINED),
}

FOR_DEVELOPMENT = ("photographs", "turned", "small", "small_400")
FLY = dict(teacher="average")
VARIANTS: dict[str, dict] = {  # changes
    "teacher": dict(rounds=0),
    "teacher_unsmoothed": dict(rounds=0, label_smoothing=0.),  # as beside mixup
    "all_labels": dict(rounds=0),
    "share": dict(rounds=2),  # half of the pool, then nine tenths
    "share_unsmoothed": dict(rounds=2, label_smoothing=0.),
    "one_round": dict(rounds=1, share=.9),
    "three_rounds": dict(rounds=3, share=(.3, .6, .9)),
    "threshold": dict(rounds=2, threshold=.8),
    "hard": dict(rounds=2, soft=False),
    "mixup": dict(rounds=2, mix="mixup"),
    "cutmix": dict(rounds=2, mix="cutmix"),
    "mirrored": dict(rounds=2, mirror=True),
    "no_average": dict(rounds=2, ema=None),
    "average": FLY,  # a continuous teacher; soft targets, no mask
    "average_hard": FLY | dict(soft=False, threshold=.95, label_smoothing=0.),  # FixMatch's targets
    "average_share": FLY | dict(soft=False, share=.8, label_smoothing=0.),
    "average_mixup": FLY | dict(mix="mixup"),
    "average_hard_1": FLY | dict(soft=False, threshold=.95, label_smoothing=0., ratio=1),  # half the cost of a step
    "teacher_mixup": dict(rounds=0, mix="mixup"),
    "default": {},
    **{f"px_{o}": dict(size=o) for o in (96, 192)},
    "full_rate": dict(student_lr=1.),  # whatever the teacher's error
    **{f"px_{o}_full_rate": dict(size=o, student_lr=1.) for o in (96, 192)},
    "px_96_quarter": dict(size=96, student_lr=.25),
    "from_scratch": dict(pretrained=False),
}


def one(case: str, seed: int, variant: str, seconds: float, threads: int) -> dict:
    "A row, measured in this process."
    import torch
    from noisy_student.rounds import NoisyStudent
    torch.set_num_threads(threads)
    make, said = CASES[case]
    data = make(seed)
    n_labeled, n_unlabeled = len(data.labeled), len(data.unlabeled)
    if variant == "all_labels":
        if data.unlabeled.hidden is None: raise SystemExit(f"{case}: nobody knows the labels of its pool")
        labels = np.concatenate([data.labeled.labels, data.unlabeled.hidden])
        both = type(data.labeled)([*data.labeled.images, *data.unlabeled.images], labels)
        data = replace(data, labeled=both, unlabeled=data.unlabeled[:0])
    with tempfile.TemporaryDirectory() as tmp:
        begun, cpu = time.perf_counter(), time.process_time()
        ns = NoisyStudent(data, path=Path(tmp) / "run", seed=seed, time_limit=seconds, **(said | VARIANTS[variant]))
        t = ns.fit()
        spent, used = time.perf_counter() - begun, time.process_time() - cpu
        steps = [str(ns.dir.plan(k).get("steps")) for k in range(len(t))]
        def words(name): return " ".join(f"{o:.4f}" for o in t[name].astype(float))
        best = t.iloc[ns.best]
        return dict(n_labeled=n_labeled, n_unlabeled=n_unlabeled, n_valid=len(data.valid), n_test=len(data.test),
                    accuracy=best.test_accuracy, valid_accuracy=best.valid_accuracy, valid_log_loss=best.valid_log_loss,
                    rounds=words("test_accuracy"), valid_rounds=words("valid_accuracy"), archs=" ".join(ns.archs),
                    size=ns.size, parameters=int(t.parameters.max()), steps=" ".join(steps), seconds=spent,
                    cpu_seconds=used)


def run(a: argparse.Namespace):
    "Measure what is missing in the CSV, a row at a time: all variants of a seed before the next seed."
    from runs import machine
    about = {k: v for k, v in machine().items() if k != "threads"}
    if wrong := [c for c in a.cases if c in FOR_DEVELOPMENT and min(a.seeds) < 100]:
        raise SystemExit(f"{wrong[0]} is for development: --seeds from 100 on")
    for c, s, v in itertools.product(a.cases, a.seeds, a.variants):
        new = dict(case=c, seed=s, variant=v, budget=a.seconds, threads=a.threads)
        old = pd.read_csv(a.out) if a.out.exists() else pd.DataFrame(columns=[*KEYS, "error"])
        same = np.all([old[k] == new[k] for k in KEYS], axis=0)
        if (same & old.error.isna().to_numpy()).any(): continue
        what = ["--cases", c, "--seeds", str(s), "--variants", v, "--seconds", str(a.seconds)]
        found = in_process(__file__, what, a.threads, 2 * a.seconds + 300)
        row = pd.DataFrame([new | dict(error=None) | found | about])
        add_row(a.out, old[~same], row)
        print(*(f"{k} {v}" if k not in KEYS else v for k, v in row.iloc[0].items() if k not in about), flush=True)


def results(file: Path) -> pd.DataFrame:
    "A row per case, budget and variant: means over the seeds, in percent, and the share of the gap that is closed."
    rows, out = pd.read_csv(file), []
    rows = rows[rows.error.isna()]
    for (case, budget, threads), t in rows.groupby(["case", "budget", "threads"], sort=False):
        by = {v: g.set_index("seed") for v, g in t.groupby("variant", sort=False)}
        for v, g in by.items():
            row = dict(case=case, seconds=round(budget), threads=threads, variant=v, seeds=len(g),
                       validation=_spread(100 * g.valid_accuracy), test=_spread(100 * g.accuracy))
            if "teacher" in by and v != "teacher":
                row["over_teacher"] = _spread(100 * (g.accuracy - by["teacher"].accuracy).dropna())
                if "all_labels" in by:
                    three = pd.concat([o.accuracy for o in (g, by["teacher"], by["all_labels"])], axis=1, join="inner")
                    mine, lower, upper = three.mean()  # of the seeds that all have
                    row["gap_closed"] = f"{(mine - lower) / (upper - lower):.0%}" if len(three) else ""
            out.append(row)
    return pd.DataFrame(out).fillna("")


def _spread(s): return "" if not len(s) else f"{s.mean():.1f}" + (f" ± {s.std():.1f}" if len(s) > 1 else "")


def markdown(t: pd.DataFrame) -> str:
    "The table as Markdown."
    lines = [[c.replace("_", " ") for c in t], ["---"] * t.shape[1], *t.astype(str).values.tolist()]
    return "\n".join("| " + " | ".join(o) + " |" for o in lines)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("action", nargs="?", default="run", choices=["run", "table", "one"])
    p.add_argument("--cases", nargs="+", default=["cifar10_4000"], choices=list(CASES))
    p.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--seconds", type=float, default=3600, help="time limit of a run")
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--out", type=Path, default=HERE / "results" / "regimes.csv")
    a = p.parse_args()
    if a.action == "table": print(markdown(results(a.out)))
    elif a.action == "one":
        a.out.write_text(json.dumps(one(a.cases[0], a.seeds[0], a.variants[0], a.seconds, a.threads)))
    else: run(a)
