"""Feed the library thousands of inputs that nobody should send: no traceback, no hang, no memory above a bound.

    python benchmarks/fuzz.py --inputs 1000

Tries so many inputs of every kind (images, parquet tables, weights, run.json and the other files of a run, each with
random damage, and well-formed but wrong; archives whose headers lie; command lines, and their streams closed, full or
of other codings; see tests/fuzz.py) and writes results/fuzz.csv: a row per kind with what came of them, the slowest in
seconds of computing, and the growth of memory. A defect is printed with the seed that repeats it.
"""
import argparse, contextlib, resource, signal, sys, time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent/"tests"), str(Path(__file__).parent)]

import numpy as np
import pandas as pd

from fuzz import KINDS, one
from runs import machine

HANG, WAIT, GROWTH = 10, 60, 500  # seconds of computing, and by the clock, for an input; MB for all


def hang(*_): raise TimeoutError(f"no answer within {WAIT} s")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--inputs", type=int, default=1000, help="of every kind")
    p.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    p.add_argument("--first", type=int, default=0, help="first seed")
    a = p.parse_args()
    signal.signal(signal.SIGALRM, hang)
    for kind in a.kinds:
        with contextlib.suppress(Exception): one(kind, np.random.default_rng(0))  # imports and samples
    start, rows = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, []
    for kind in a.kinds:
        counts = dict(kind=kind, inputs=0, used=0, refused=0, defects=0, slowest_seconds=0.)
        for seed in range(a.first, a.first + a.inputs):
            t = time.process_time()
            signal.alarm(WAIT)
            try: counts[one(kind, np.random.default_rng(seed))] += 1
            except BaseException as e:
                counts["defects"] += 1
                print(f"{kind}, seed {seed}: {type(e).__name__}: {e}"[:600], file=sys.stderr, flush=True)
                if isinstance(e, KeyboardInterrupt): raise
            finally: signal.alarm(0)
            counts["inputs"] += 1
            took = time.process_time() - t
            if took > HANG: counts["defects"] += 1; print(f"{kind}, seed {seed}: {took:.0f} s", file=sys.stderr)
            counts["slowest_seconds"] = round(max(counts["slowest_seconds"], took), 2)
        counts["memory_growth_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - start)
        if counts["memory_growth_mb"] > GROWTH: counts["defects"] += 1
        rows.append({**counts, **machine()})
        pd.DataFrame(rows).to_csv(Path(__file__).parent/"results"/"fuzz.csv", index=False)
    table = pd.DataFrame(rows).iloc[:, :7]
    print(table.to_string(index=False))
    print(f"{table.inputs.sum()} inputs, {table.defects.sum()} defects")
    sys.exit(any(o["defects"] for o in rows))
