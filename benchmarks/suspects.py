"""How many wrong labels `NoisyStudent.suspects` finds: digits, with 10 % of the labels flipped at random.

    python benchmarks/suspects.py --seeds 0 1 2 3 4

Writes results/suspects.csv: per seed, how many of the ten wrong labels are among the first 15 of 100.
"""
import argparse, tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from runs import machine

from noisy_student.datasets import Split, digits
from noisy_student.rounds import NoisyStudent

if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    p.add_argument("--rounds", type=int, default=1)
    a = p.parse_args()
    rows = []
    for seed in a.seeds:
        data, rng = digits(seed=seed), np.random.default_rng(seed)
        labels = data.labeled.labels.copy()
        wrong = rng.choice(len(labels), len(labels) // 10, replace=False)
        labels[wrong] = (labels[wrong] + rng.integers(1, 10, len(wrong))) % 10
        with tempfile.TemporaryDirectory() as tmp:
            ns = NoisyStudent(replace(data, labeled=Split(data.labeled.images, labels)), None, Path(tmp) / "run",
                              recipe="digits", seed=seed, rounds=a.rounds)
            test = ns.fit().test_accuracy.iloc[-1]
            table = ns.suspects(pictures=0)
        found = table[table.kind == "labeled"]
        first = found["item"].head(len(labels) * 15 // 100)
        rows.append(dict(seed=seed, labels=len(labels), wrong=len(wrong),
                         in_first_15_percent=int(np.isin(first, wrong).sum()), contradicted=len(found),
                         flagged=int(found.issue.sum()),
                         flagged_and_wrong=int(np.isin(found["item"][found.issue == True], wrong).sum()),  # noqa: E712
                         flipped_pseudo_labels=int((table.kind != "labeled").sum()), student_test_accuracy=test))
        print(rows[-1], flush=True)
    out = Path(__file__).parent / "results" / "suspects.csv"
    pd.DataFrame(rows).assign(rounds=a.rounds, **machine()).to_csv(out, index=False)
