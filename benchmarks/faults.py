"""Kill miniature runs at random instants, damage their files, and count what is lost: nothing should be.

    python benchmarks/faults.py --kills 500 --damages 300

Keeps a row per kind of fault in results/faults.csv as it goes, with the machine and the versions; kinds that are not
asked for (--damages 0) keep the row they have. `faults` were injected; `ended` counts the runs that were started again
until they were done, `different` those of them with another result, `unreadable` directories that could not be read
after a kill; a damaged file may also be `refused`, in a line that names it. Lost is what is unreadable or different. A
run that was killed is started again in the same directory, and killed again, until it ends by chance; its weights,
histories and summary must then be those of the run that nothing has happened to, bit by bit, and after every kill every
file in the directory must be readable.
"""
import argparse, os, shutil, signal, sys, tempfile, time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent/"tests"), str(Path(__file__).parent)]

import numpy as np
import pandas as pd

from faults import add_tables, damage, is_readable, kinds, make_pictures, outcome, read_report, run, server
from runs import machine


def readable(path):
    try: return is_readable(path)
    except Exception as e: print(f"{path}: {e!r}", file=sys.stderr, flush=True); return False


def kills(context, pictures, whole, seconds, folder, n, until, sig):
    "Counts: faults, unreadable, ended, different, slowest."
    rng, code, counts = np.random.default_rng(int(sig)), -int(sig) if sig == signal.SIGKILL else 143, dict(faults=0,
                                                                                                           unreadable=0,
                                                                                                           ended=0,
                                                                                                           different=0,
                                                                                                           slowest=0.)
    path, i, expected, done = folder/f"{sig.name}0", 0, outcome(whole), False
    while not done or path.exists():  # what was killed last is started again, too
        done = counts["faults"] >= n or time.monotonic() > until
        after = None if done else rng.uniform(0, 0.6) * seconds
        got, left, _ = run(context, pictures, path, 0. if rng.random() < .5 else 600., folder/"log", signal_after=after,
                           sig=sig)
        if got == code:
            counts["faults"] += 1
            counts["slowest"] = round(max(counts["slowest"], left), 2)
            counts["unreadable"] += path.exists() and not readable(path)
        elif got != -15:  # SIGTERM before Python had set its handler
            counts["ended"] += 1
            if got or outcome(path) != expected:
                counts["different"] += 1
                print(f"{sig.name}, run {i}: exit code {got}, {(folder/'log').read_text()}", file=sys.stderr,
                      flush=True)
            shutil.rmtree(path)
            path = folder/f"{sig.name}{(i := i + 1)}"
        yield counts


def damages(context, pictures, whole, folder, n, until):
    "Counts: faults, ended, refused, different (silently)."
    rng, counts, expected = np.random.default_rng(0), dict(faults=0, ended=0, refused=0, different=0), outcome(whole)
    add_tables(whole)
    names = list(kinds(whole).values())
    while counts["faults"] < n and time.monotonic() < until:
        file, how = names[counts["faults"] % len(names)], ("flipped", "truncated",
                                                           "removed")[counts["faults"] // len(names) % 3]
        shutil.copytree(whole, path := folder/"damaged")
        damage(path/file, how, rng)
        code, *_ = run(context, pictures, path, 600., folder/"log")
        said = (folder/"log").read_text()
        if code == 0 and file.suffix == ".csv":  # which the page is made of
            try: read_report(path)
            except ValueError as e: code, said = 2, str(e)
        counts["faults"] += 1
        if code == 0 and outcome(path) == expected: counts["ended"] += 1
        elif code == 2 and Path(file).name in said: counts["refused"] += 1
        else: counts["different"] += 1; print(file, how, code, said, file=sys.stderr, flush=True)
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
    folder, context, begun = Path(tempfile.mkdtemp()), server(), time.monotonic()
    pictures = make_pictures(folder/"pictures")
    run(context, pictures, folder/"warm")
    code, _, seconds = run(context, pictures, folder/"whole")
    assert code == 0
    out = Path(__file__).parent/"results"/"faults.csv"
    rows = {o["fault"]: o for o in pd.read_csv(out).to_dict("records")} if out.exists() else {}
    until, common = begun + 60 * a.minutes, (context, pictures, folder/"whole")
    for name, n, work in (("kill -9", a.kills, lambda n: kills(*common, seconds, folder, n, until, signal.SIGKILL)),
                          ("SIGTERM", a.terms, lambda n: kills(*common, seconds, folder, n, until, signal.SIGTERM)),
                          ("file damaged", a.damages, lambda n: damages(*common, folder, n, until))):
        for counts in work(n) if n else ():
            rows[name] = dict(fault=name, **counts, seconds_per_run=round(seconds, 2), **machine())
            pd.DataFrame(rows.values()).to_csv(out, index=False)
    table = pd.DataFrame(rows.values()).reindex(columns=["fault", "faults", "ended", "refused", "unreadable",
                                                         "different", "slowest"])
    print(table.to_string(index=False, na_rep=""))
    lost = int(table[["unreadable", "different"]].sum().sum())
    print(f"{table.faults.sum()} faults injected, {lost} lost")
    shutil.rmtree(folder)
    sys.exit(lost > 0)
