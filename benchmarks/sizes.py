"""What the size of a picture is worth to pretrained weights: logistic regression on their frozen features.

    python benchmarks/sizes.py --threads 1

CIFAR-10's training images of the half that folders.py develops on: 40 labels a class, of which 4, 10 and 40 are drawn
three times, and 1,000 others that are tested. Features as in folders.py, standardized, C = .01. A row per size and
number of labels a class, with the seconds of the features of all 1,400 images.
"""
import argparse, tempfile, warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from folders import CASES, features, items_of
from runs import machine
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

HERE = Path(__file__).resolve().parent


def rows(size: int, labeled: list, tested: list, draws: int = 3) -> list[dict]:
    "Of one size; `labeled` and `tested` are pairs of class and file."
    with tempfile.TemporaryDirectory() as tmp:
        x, seconds = features([f for _, f in labeled + tested], size, Path(tmp))
    y, out = np.array([k for k, _ in labeled + tested]), []
    n = len(labeled)
    for per_class in (4, 10, 40):
        accuracies = []
        for draw in range(draws):
            rng = np.random.default_rng(draw)
            mine = np.concatenate([rng.permutation(np.flatnonzero(y[:n] == k))[:per_class] for k in np.unique(y)])
            model = make_pipeline(StandardScaler(), LogisticRegression(C=.01, max_iter=2000)).fit(x[mine], y[mine])
            accuracies.append(model.score(x[n:], y[n:]))
        out.append(dict(size=size, labels_per_class=per_class, accuracy=np.mean(accuracies), std=np.std(accuracies),
                        seconds=seconds))
    return out


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--sizes", type=int, nargs="+", default=[64, 96, 128, 160, 192, 224])
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--out", type=Path, default=HERE / "results" / "sizes.csv")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    rng, classes = np.random.default_rng(100), items_of(CASES["dev_cifar10_lite0_40"])[0]
    drawn = [[(k, fs[i]) for i in rng.permutation(len(fs))] for k, fs in enumerate(classes)]
    labeled, tested = ([o for fs in drawn for o in fs[part]] for part in (slice(0, 40), slice(40, 140)))
    table = pd.DataFrame([r for s in a.sizes for r in rows(s, labeled, tested)]).round(5).assign(**machine())
    table.to_csv(a.out, index=False)
    print(table.pivot(index="size", columns="labels_per_class", values="accuracy"))
