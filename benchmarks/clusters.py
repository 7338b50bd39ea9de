"""What a classifier on frozen features learns from the pool: labels of its teacher, or those that clusters agree on.

    python benchmarks/clusters.py --threads 1

The pretrained cases of folders.py, images for development; CIFAR-10 with 400 labels a class beside them. The teacher is
the classifier that all labels give (`fit_head`). The 60 % of the pool that are labeled most confidently are learned by
a student, a classifier on the same features with the same penalty:

- own, soft and own, one-hot: labels of the teacher
- agreed: one-hot labels that teacher and clusters agree on (`find_clusters`)

A row per case, seed and labels: test accuracy of the student, and the share of the 30 and the 60 % of the pool that are
labeled most confidently whose labels are right; foreign images have no right label. Features are kept in --cache.
"""
import argparse, hashlib, tempfile, warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from folders import CASES, _split, features, make_folder
from runs import machine

from noisy_student.feature_clusters import find_clusters
from noisy_student.features import fit_head

HERE = Path(__file__).resolve().parent
CASES["dev_cifar10_lite0_400"] = replace(CASES["dev_cifar10_lite0_40"], labels=400, pool=4000)
NAMES = [k for k, o in CASES.items() if o.weights and o.dev]


def pictures(name: str, seed: int, cache: Path) -> dict:
    "Features and labels of train, test and pool; -1 for foreign images."
    def digest(f): return hashlib.sha1(f.read_bytes()).digest()
    with tempfile.TemporaryDirectory() as tmp:
        folder, answers = (make_folder(name, seed, Path(tmp)/str(i), all_labels=bool(i)) for i in (0, 1))
        known, names = _split(answers, "train")
        truth = dict(zip(map(digest, known), names))
        parts = {k: _split(folder, k) for k in ("train", "test", "unlabeled")}
        files = parts["unlabeled"][0]
        parts["unlabeled"] = files, np.array([truth.get(digest(f), "") for f in files])
        classes = np.unique(parts["train"][1])
        place = {c: i for i, c in enumerate(classes)}
        return {k: (features(fs, CASES[name].size, cache)[0], np.array([place.get(o, -1) for o in ys]))
                for k, (fs, ys) in parts.items()}


def students(name: str, seed: int, cache: Path) -> list[dict]:
    "Rows of a case."
    data = pictures(name, seed, cache)
    (x, y), (x_test, y_test), (pool, truth) = (data[o] for o in ("train", "test", "unlabeled"))
    K, teacher = y.max() + 1, fit_head(x, y)
    logits = torch.from_numpy(teacher.logits(pool))
    agreed = find_clusters(x, y, pool, K)(logits, torch.from_numpy(pool)).softmax(1).numpy()
    own, rows = logits.softmax(1).numpy(), []
    def score(head): return float((head.logits(x_test).argmax(1) == y_test).mean())
    for labels, probs, soft in (("own, soft", own, True), ("own, one-hot", own, False), ("agreed", agreed, False)):
        order = np.argsort(-probs.max(1), kind="stable")
        right = (probs.argmax(1) == truth)[order]
        targets = probs if soft else np.eye(K, dtype=np.float32)[probs.argmax(1)]
        targets = np.where(np.isin(np.arange(len(pool)), order[:int(.6 * len(pool))])[:, None], targets, 0)
        rows.append(dict(case=name, seed=seed, labels=labels, n_labeled=len(y), n_unlabeled=len(pool),
                         teacher=score(teacher), student=score(fit_head(x, y, pool, targets, C=teacher.C)),
                         right_30=right[:int(.3 * len(pool))].mean(), right_60=right[:int(.6 * len(pool))].mean()))
    return rows


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--cases", nargs="+", default=NAMES, choices=NAMES, metavar="CASE")
    p.add_argument("--seeds", type=int, nargs="+", default=[100, 101, 102])
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "noisy_student_benchmarks")
    p.add_argument("--out", type=Path, default=HERE / "results" / "clusters.csv")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    table = pd.DataFrame([r for n in a.cases for s in a.seeds for r in students(n, s, a.cache)])
    table.round(4).assign(**machine()).to_csv(a.out, index=False)
    print(table.groupby(["case", "labels"], sort=False)[["teacher", "student", "right_30", "right_60"]].mean().round(3))
