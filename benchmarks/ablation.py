"""Which ingredient did it: `noisy-student ablate` with the default settings of a data set, the table that the README
quotes.

    python benchmarks/ablation.py digits --runs runs/ablation-digits
    python benchmarks/ablation.py cifar10 --runs runs/ablation-cifar10 --device cuda

The same as `noisy-student ablate DATA`, and writes results/ablation_DATA.csv, a row per variant, and
results/ablation_DATA_runs.csv, a row per variant and seed, with the machine, the versions and the commit. Every run is
resumed when the script is called again with the same --runs.
"""
import argparse
from pathlib import Path

import pandas as pd
import torch
from runs import machine

from noisy_student.ablation import ablate
from noisy_student.cli import DATA, load_data, show_progress

if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("data", choices=["digits", "cifar10"])
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--runs", required=True, help="folder for the run directories")
    p.add_argument("--device")
    p.add_argument("--threads", type=int, help="of torch; default: its own choice")
    a = p.parse_args()
    if a.threads: torch.set_num_threads(a.threads)
    results, about = Path(__file__).parent / "results", machine() # the commit that the runs begin with
    with show_progress() as progress:
        table = ablate(lambda seed: load_data(a.data, seed=seed), a.runs, DATA[a.data].recipe, seeds=a.seeds,
                       device=a.device, progress=progress)
    for name, t in (("", table), ("_runs", pd.read_csv(Path(a.runs) / "runs.csv"))):
        t.assign(data=a.data, **about).to_csv(results / f"ablation_{a.data}{name}.csv", index=False)
    print(table.drop(columns="changes").round(4).to_string())
