"What the benchmarks of speed share: candidates timed in turns, and a table written with machine, versions and commit."
import argparse, time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from runs import machine

NOT_MEASURED = "not measured"
RESULTS = Path(__file__).parent / "results"


def arguments(doc: str, seconds: float) -> argparse.ArgumentParser:
    "The arguments that every benchmark takes; a script adds its own."
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cpu", help="cpu or cuda")
    p.add_argument("--threads", type=int, default=1, help="on the CPU")
    p.add_argument("--seconds", type=float, default=seconds, help="of repetitions per case")
    p.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV")
    return p


def seconds_of(f: Callable, device: str) -> float:
    """On the CPU the CPU time of all threads, which waits for other processes are not part of; else until the device is
    done."""
    if device == "cpu": clock, done = time.process_time, lambda: None
    else: clock, done = time.perf_counter, torch.cuda.synchronize
    done()
    start = clock()
    f()
    done()
    return clock() - start


def in_turns(fs: dict[str, Callable], device: str, budget: float, base: str) -> dict[str, dict]:
    """Every repetition times every candidate once. Per candidate its mean seconds, their ratio to those of `base`, and
    the interval in which that ratio lies in 95 % of resamplings of the repetitions."""
    for f in fs.values(): f()
    times, start = [], time.monotonic()
    while len(times) < 5 or time.monotonic() - start < budget:
        times.append([seconds_of(f, device) for f in fs.values()])
    t, b, rng = np.array(times), list(fs).index(base), np.random.default_rng(0)
    means = t[rng.integers(0, len(t), (1000, len(t)))].mean(1)
    low, high = np.quantile(means / means[:, b:b + 1], [.025, .975], axis=0)
    t = t.mean(0)
    return {o: dict(seconds=float(f"{t[i]:.4g}"), ratio=round(t[i] / t[b], 3), ratio_low=round(low[i], 3),
                    ratio_high=round(high[i], 3), repetitions=len(times)) for i, o in enumerate(fs)}


KEYS = ["machine", "device", "model", "case", "size", "batch", "precision", "candidate", "seed"]


def with_others(table: pd.DataFrame, name: str) -> pd.DataFrame:
    "The table, and after it what else was measured, on this machine or another, from results/`name`.csv."
    file = RESULTS / f"{name}.csv"
    if not file.exists(): return table
    old = pd.read_csv(file)
    old = old[old.machine.notna() & ~old.eq(NOT_MEASURED).any(axis=1)]
    keys = [o for o in KEYS if o in table and o in old]
    def cases(t):
        return [tuple(map(str, o)) for o in t[keys].astype({k: float for k in ("size", "batch") if k in keys})
                .to_numpy()]
    again = set(cases(table))
    return pd.concat([table, old[[o not in again for o in cases(old)]]], ignore_index=True)


def save(name: str, cases: Iterable[list[dict]], a: argparse.Namespace, **versions: str) -> None:
    "Print the rows of each case and write them at once, since a later case may be cut short."
    rows = []
    for new in cases:
        print(pd.DataFrame(new).to_string(index=False), flush=True)
        rows += new
        write(name, rows, a, **versions)


def write(name: str, rows: list[dict], a: argparse.Namespace, **versions: str) -> None:
    "Write the table, with what was measured before; a case that is measured again replaces its row."
    table = with_others(pd.DataFrame(rows).assign(**machine(), **versions), name)
    if "device" in table and "cuda" not in set(table.device):
        cases = table.drop_duplicates([o for o in ("model", "case", "candidate") if o in table])
        blank = cases[[o for o in ("model", "case", "candidate") if o in table]].assign(device="cuda",
                                                                                        ratio=NOT_MEASURED)
        table = pd.concat([table, blank], ignore_index=True)
    a.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(a.out / f"{name}.csv", index=False)
