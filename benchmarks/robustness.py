"""Is the student more robust than its teacher? All rounds of finished CIFAR-10 runs under corruptions, perturbations,
FGSM.

    noisy-student run cifar10 --out runs/cifar10_0 --seed 0
    python benchmarks/robustness.py runs/cifar10_0 runs/cifar10_1 --limit 500

Writes results/robustness_cifar10.csv, a row per run and round, with the machine, the versions and the commit: accuracy
and ECE of all test images, the rest of a sample of them. What was measured before is kept in the run directories.
"""
import argparse
import json
from pathlib import Path

import pandas as pd
import torch
from runs import machine

from noisy_student.cli import load_data, show_progress
from noisy_student.evaluation import evaluate_run

if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="+", help="directories of finished runs on cifar10")
    p.add_argument("--limit", type=int, default=500, help="test images to corrupt and perturb")
    p.add_argument("--device", default="cpu")
    p.add_argument("--threads", type=int, help="of torch; default: its own choice")
    a = p.parse_args()
    if a.threads: torch.set_num_threads(a.threads)
    tables, about, test = [], machine(), load_data("cifar10").test
    with show_progress() as progress:
        for run in map(Path, a.runs):
            t = evaluate_run(run, test, a.limit, folder=Path(a.runs[0]) / "cache" / "corrupted", device=a.device,
                             progress=progress).reset_index()
            seed = json.loads((run / "run.json").read_text())["config"]["seed"]
            tables.append(t.assign(seed=seed, role=pd.read_csv(run / "summary.csv").role, limit=a.limit))
            print(tables[-1].round(4).T.to_string(), flush=True)
            table, first = pd.concat(tables).assign(**about), ["seed", "round", "role"]
            table = table[first + [o for o in table if o not in first]]
            table.to_csv(Path(__file__).parent / "results" / "robustness_cifar10.csv", index=False)
