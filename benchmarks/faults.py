"""Kill miniature runs at random instants, damage their files, and count what is lost: nothing should be.

    python benchmarks/faults.py --kills 500 --damages 300

Appends a row per kind of fault to results/faults.csv as it goes, with the machine and the versions. A run that was
killed is started again in the same directory, and killed again, until it ends by chance; its weights, histories and
summary must then be those of the run that nothing has happened to, bit by bit, and after every kill every file in the
directory must be readable.
"""
import argparse, os, shutil, signal, sys, tempfile, time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent/"tests"), str(Path(__file__).parent)]

import numpy as np
import pandas as pd

from faults import damage, is_readable, kinds, make_pictures, outcome, run, server
from runs import machine


def kills(context, pictures, whole, seconds, folder, n, sig):
    "Counts: faults, unreadable, ended, different, slowest."
    rng, code, counts = np.random.default_rng(int(sig)), -int(sig) if sig == signal.SIGKILL else 143, dict(faults=0, unreadable=0, ended=0, different=0, slowest=0.)
    path, i = folder/f"{sig.name}0", 0
    expected = outcome(whole)
    while counts["faults"] < n:
        got, left = run(context, pictures, path, 0. if rng.random() < .5 else 600., signal_after=rng.uniform(0, 1) * seconds, sig=sig)
        if got == code:
            counts["faults"] += 1
            counts["slowest"] = max(counts["slowest"], left)
            if path.exists() and not is_readable(path): counts["unreadable"] += 1
        else:
            if got not in (0, -15): raise RuntimeError(f"a run ended with {got}")  # -15: before Python had set its handler
            if got == 0:
                counts["ended"] += 1
                counts["different"] += outcome(path) != expected
                shutil.rmtree(path)
            i += 1
            path = folder/f"{sig.name}{i}" if got == 0 else path
        yield counts
    assert run(context, pictures, path)[0] == 0
    counts["ended"] += 1
    counts["different"] += outcome(path) != expected
    yield counts


def damages(context, pictures, whole, folder, n):
    "Counts: faults, ended, refused, different (silently)."
    rng, counts, expected = np.random.default_rng(0), dict(faults=0, ended=0, refused=0, different=0), outcome(whole)
    names = list(kinds(whole).values())
    while counts["faults"] < n:
        file, how = names[counts["faults"] % len(names)], ("flipped", "truncated", "removed")[counts["faults"] // len(names) % 3]
        shutil.copytree(whole, path := folder/"damaged")
        damage(path/file, how, rng)
        code, _ = run(context, pictures, path, 600., folder/"log")
        said = (folder/"log").read_text()
        counts["faults"] += 1
        if code == 0 and outcome(path) == expected: counts["ended"] += 1
        elif code == 2 and Path(file).name in said: counts["refused"] += 1
        else: counts["different"] += 1; print(file, how, code, said, file=sys.stderr)
        shutil.rmtree(path)
        yield counts


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kills", type=int, default=500)
    p.add_argument("--terms", type=int, default=50, help="SIGTERMs")
    p.add_argument("--damages", type=int, default=300)
    p.add_argument("--minutes", type=float, default=1e9, help="stop after so long")
    a = p.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    folder, context, rows, begun = Path(tempfile.mkdtemp()), server(), {}, time.monotonic()
    pictures = make_pictures(folder/"pictures")
    run(context, pictures, folder/"warm")
    t = time.perf_counter()
    assert run(context, pictures, folder/"whole")[0] == 0
    seconds = time.perf_counter() - t
    out = Path(__file__).parent/"results"/"faults.csv"
    for name, work in {"file damaged": damages(context, pictures, folder/"whole", folder, a.damages),
                       "kill -9": kills(context, pictures, folder/"whole", seconds, folder, a.kills, signal.SIGKILL),
                       "SIGTERM": kills(context, pictures, folder/"whole", seconds, folder, a.terms, signal.SIGTERM)}.items():
        if {"kill -9": a.kills, "SIGTERM": a.terms, "file damaged": a.damages}[name] == 0: continue
        for counts in work:
            rows[name] = dict(fault=name, **counts, seconds_per_run=round(seconds, 1), **machine())
            pd.DataFrame(rows.values()).to_csv(out, index=False)
            if time.monotonic() - begun > 60 * a.minutes: break
    print(pd.DataFrame(rows.values()).iloc[:, :7].to_string(index=False))
    shutil.rmtree(folder)
