"""Whole runs with the default settings of `noisy-student run`: the accuracies and seconds that the README quotes.

    python benchmarks/runs.py digits --seeds 0 1 2 3 4
    python benchmarks/runs.py cifar10 --seeds 0

Writes results/runs_DATA.csv, a row per seed and round, with the machine, the versions and the commit. On digits,
scikit-learn's self-training SVC learns from the same images in the same run. A run directory that is there already is
resumed (--runs DIR), so an interrupted benchmark can be called again.
"""
import argparse, os, platform, subprocess, tempfile
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch

from noisy_student.cli import DATA, load_data
from noisy_student.rounds import NoisyStudent


def machine() -> dict:
    "What a figure depends on."
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists() and not torch.cuda.is_available():
        lines = [o for o in Path("/proc/cpuinfo").read_text().splitlines() if o.startswith("model name")]
        flags = Path("/proc/cpuinfo").read_text()
        bf16 = " with AMX" if "amx_bf16" in flags else " with AVX512-BF16" if "avx512_bf16" in flags else ""
        name = lines[0].split(":")[1].strip() + bf16
    here = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True,
                            text=True).stdout.strip()
    return dict(machine=name, cores=os.cpu_count(), threads=torch.get_num_threads(),
                **{o: version(o) for o in ("torch", "fastai", "timm")}, commit=commit)


def svc(data) -> dict:
    "scikit-learn's self-training with a support vector machine, on the pixels of the same images."
    import numpy as np
    from sklearn.semi_supervised import SelfTrainingClassifier
    from sklearn.svm import SVC
    def flat(s): return s.images.reshape(len(s), -1) / 255 * 16
    x, y = np.concatenate([flat(data.labeled), flat(data.unlabeled)]), np.concatenate([data.labeled.labels,
                                                                                       np.full(len(data.unlabeled),
                                                                                               -1)])
    model = SelfTrainingClassifier(SVC(probability=True, gamma=0.001)).fit(x, y)
    return dict(role="SelfTrainingClassifier(SVC)", test_accuracy=model.score(flat(data.test), data.test.labels),
                valid_accuracy=model.score(flat(data.valid), data.valid.labels))


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("data", choices=["digits", "cifar10"])
    p.add_argument("--seeds", type=int, nargs="+", default=[0])
    p.add_argument("--runs", help="folder for the run directories; default: a temporary one")
    a = p.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as tmp:
        for seed in a.seeds:
            data = load_data(a.data, seed=seed)
            run = NoisyStudent(data, None, Path(a.runs or tmp) / f"{a.data}_{seed}", recipe=DATA[a.data].recipe,
                               seed=seed)
            summary = run.fit().assign(best=lambda s: s["round"] == run.best)
            rows += [dict(data=a.data, seed=seed, **r) for r in summary.to_dict("records")]
            if a.data == "digits": rows.append(dict(data=a.data, seed=seed, **svc(data)))
            print(summary.to_string(index=False), flush=True)
    table = pd.DataFrame(rows).assign(**machine())
    out = Path(__file__).parent / "results" / f"runs_{a.data}.csv"
    out.parent.mkdir(exist_ok=True)
    table.to_csv(out, index=False)
    figures = table.assign(what=table["round"].map(lambda r: "" if pd.isna(r) else f"round {r:.0f} ")
                           + table.role).groupby("what", sort=False)
    print((100 * figures.test_accuracy.agg(["mean", "std", "min"])).round(2).to_string())
    print(table.groupby("seed").seconds.sum().describe()[["mean", "max"]].round(1).to_string())
