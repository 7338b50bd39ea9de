"""Miniature runs to be killed and damaged, for test_faults.py and benchmarks/faults.py.

A run takes a second or two and writes every kind of file that a run directory holds: pictures from files, hence a
cache and a list of skipped files, averaged weights, gradient accumulation, two students."""
import json, multiprocessing, os, signal, time, warnings
from pathlib import Path

import numpy as np
from PIL import Image

SETTINGS = dict(recipe="digits", epochs=2, teacher_epochs=3, steps=4, bs=16, accumulate=2, ema=0.9, size=8,
                threshold=0.2, rounds=2, lr=1e-2, seed=3)


def make_pictures(root: Path) -> Path:
    """Red and blue pictures with noise, in the layout of `from_folder`, a file that is none, and a validation picture
    in the pool."""
    rng = np.random.default_rng(0)
    def picture(file, color):
        file.parent.mkdir(parents=True, exist_ok=True)
        a = rng.integers(0, 160, (8, 8, 3), dtype=np.uint8)
        a[..., color] += 60
        Image.fromarray(a).save(file)
    for name, color in dict(blue=2, red=0).items():
        for split, n in dict(train=10, valid=6).items():
            for i in range(n): picture(root/split/name/f"{i}.png", color)
    for i in range(60): picture(root/"unlabeled"/f"{i}.png", 2 * (i % 2))
    (root/"unlabeled"/"notes.txt").write_text("no picture")
    (root/"unlabeled"/"leak.png").write_bytes((root/"valid"/"red"/"0.png").read_bytes())
    return root


def noisy_student(pictures, path, every=600., **changes):
    "A run that checkpoints within an epoch every so many seconds."
    import torch
    from noisy_student.checkpoints import RunState
    from noisy_student.datasets import from_folder
    from noisy_student.learner import Noise
    from noisy_student.rounds import NoisyStudent
    torch.set_num_threads(1)
    RunState.every = every
    warnings.simplefilter("ignore")
    return NoisyStudent(from_folder(pictures), ["resnet9_4", "resnet9_8"], path, noise=Noise(1, 3, 0.1, 0.9),
                        **{**SETTINGS, **changes})


def fit(pictures, path, every=600., log=None):
    """In a child process: fit, and write warnings and the error to a file. Exit codes: 0, 2 for a one-line error, that
    of `Stopped`."""
    from noisy_student.files import Stopped
    run = noisy_student(pictures, path, every)
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            try: run.fit()
            finally: said = [str(o.message) for o in seen if "noisy_student" in o.filename]
    except Stopped as e: os._exit(e.code)
    except (ValueError, OSError) as e:
        Path(log).write_text("\n".join([*said, str(e)]))
        os._exit(2)
    if log: Path(log).write_text("\n".join(said))


def server():
    "A server of processes that have imported everything: a start costs milliseconds."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["noisy_student.rounds", "noisy_student.learner", "noisy_student.report", __name__])
    return context


def worked(pid):
    """Seconds of work of a running process: its own clock, which a busy machine does not slow down. 0 where it cannot
    be read."""
    try:
        return sum(map(int, Path(f"/proc/{pid}/stat").read_text()
                       .rpartition(")")[2].split()[11:13])) / os.sysconf("SC_CLK_TCK")
    except OSError: return 0.


def run(context, *args, signal_after=None, sig=signal.SIGKILL):
    """Run `fit` in a process, and send it a signal after so many seconds of work.

    Returns the exit code, the seconds from the signal to the end, and the seconds of work."""
    p = context.Process(target=fit, args=args)
    p.start()
    begun, sent, work = time.perf_counter(), None, 0.
    while p.is_alive():
        if time.perf_counter() - begun > 300: p.kill(); raise TimeoutError("the run hangs")
        work = worked(p.pid) or work
        spent = work or time.perf_counter() - begun
        if sent is None and signal_after is not None and spent >= signal_after:
            sent = time.perf_counter(); os.kill(p.pid, sig)
        p.join(0.01)
    return p.exitcode, time.perf_counter() - (sent or time.perf_counter()), work or time.perf_counter() - begun


def outcome(path):
    "Everything that must be equal: weights bit by bit, histories, the summary without its seconds."
    import pandas as pd
    from noisy_student.models import load_tensors
    weights = {(f.parent.name, k): v.numpy().tobytes() for f in sorted(path.glob("round_*/model.safetensors")) for k,
               v in load_tensors(f)[0].items()}
    history = {f.parent.name: f.read_text() for f in sorted(path.glob("round_*/history.csv"))}
    return weights, history, pd.read_csv(path/"summary.csv").drop(columns="seconds").to_csv()


def is_readable(path):
    "Whether every file of a run directory that has its final name can be read, as the kill left it."
    import pyarrow.parquet as pq
    from noisy_student.files import altered
    from noisy_student.models import load_tensors
    for f in path.rglob("*"):
        if not f.is_file() or f.name.startswith(".") or f.suffix in (".tmp", ".part"): continue
        if f.suffix == ".safetensors": load_tensors(f)
        elif f.suffix == ".parquet": pq.read_table(f)
        elif f.suffix == ".json": json.loads(f.read_text())
        elif f.suffix == ".npy": np.load(f, allow_pickle=False)
    return not any(altered(o) for o in path.glob("round_*"))


def add_tables(path):
    """The files that `noisy-student evaluate --robustness` and `NoisyStudent.suspects` add to a finished run, with
    figures of no meaning."""
    from noisy_student.files import write_with_sum
    write_with_sum(path/"robustness.csv",
                   "round,n,accuracy,low,high,ece\n0,12,0.5,0.4,0.6,0.125\n1,12,0.75,0.5,0.9,0.125\n")
    write_with_sum(path/"suspects"/"round_2"/"suspects.csv",
                   "kind,item,label,predicted,confidence,quality,issue\nlabeled,a.png,red,blue,0.75,0.25,True\n")


def read_report(path):
    "Make the page of a run: raises ValueError if it cannot be made of what is there."
    from noisy_student.report import report_html, read_run
    report_html(read_run(path))


def kinds(path):
    "One file per kind that a run directory holds, the largest: a kind is a name without its numbers."
    import re
    found = {}
    for f in sorted(path.rglob("*")):
        if f.is_file() and f.stat().st_size:
            found.setdefault(re.sub(r"[0-9a-f]{8,}|\d+", "N", str(f.relative_to(path))), []).append(f)
    return {k: max(v, key=lambda f: f.stat().st_size).relative_to(path) for k, v in found.items()}


def damage(file, how, rng):
    "Alter a file: cut off its end, flip a bit, empty it, or remove it."
    data = bytearray(file.read_bytes())
    if how == "removed": return file.unlink()
    if how == "truncated": data = data[:int(rng.integers(0, len(data)))]
    if how == "flipped": data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
    file.write_bytes(data)
