"""Mutated inputs of every kind that the library reads, for test_fuzz.py and benchmarks/fuzz.py.

A check takes bytes, or a list of words for command lines, and returns what came of it: 'used' or 'refused'. It raises
if anything but one clear message comes out."""
import contextlib, io, os, tempfile, warnings
from functools import cache
from pathlib import Path

import numpy as np

from faults import add_tables, make_pictures, noisy_student


@cache
def samples() -> dict:
    "Real files of every kind: name to bytes."
    from PIL import Image
    root = Path(tempfile.mkdtemp())
    rng, found = np.random.default_rng(0), {}
    rgb = Image.fromarray(rng.integers(0, 255, (24, 20, 3), dtype=np.uint8))
    for name, mode in {"a.jpg": "RGB", "b.png": "RGB", "c.gif": "P", "d.png": "RGBA", "e.jpg": "CMYK", "f.tif": "RGB",
                       "g.webp": "RGB", "h.bmp": "RGB"}.items():
        rgb.convert(mode).save(root/name)
        found[f"image {name}"] = (root/name).read_bytes()
    pictures = make_pictures(root/"pictures")
    noisy_student(pictures, run := root/"run", rounds=1, epochs=1, teacher_epochs=1).fit()
    add_tables(run)
    for name, file in dict(part="round_1/pseudo_labels/part-00000-of-00001-00000.parquet",
                           selection="round_1/selected.parquet", run="run.json",
                           metrics="round_0/metrics.json", weights="round_0/model.safetensors", summary="summary.csv",
                           manifest="round_1/pseudo_labels/_shard-00000-of-00001.json", sums="round_0/SHA256SUMS",
                           leaks="leaks.json", history="round_0/history.csv", robustness="robustness.csv").items():
        found[name] = (run/file).read_bytes()
    found["folder"], found["pictures"], found["work"] = run, pictures, root/"work"
    found["work"].mkdir()
    return found


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    "Flip bits, overwrite, insert, remove, repeat or cut."
    data = bytearray(data)
    for _ in range(rng.integers(1, 6)):
        i, n = int(rng.integers(0, len(data) + 1)), int(rng.integers(1, 16))
        how = rng.integers(6)
        if how == 0 and data: data[i % len(data)] ^= 1 << int(rng.integers(8))
        elif how == 1: data[i:i + n] = rng.bytes(n)
        elif how == 2: data[i:i] = rng.bytes(n)
        elif how == 3: del data[i:i + n]
        elif how == 4: data[i:i] = data[i:i + n] * int(rng.integers(1, 20))
        elif how == 5 and rng.random() < .2: del data[i:]
    return bytes(data)


def refused(f, *names):
    "Whether `f` refuses in one line that names the file; anything else passes on."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try: f(); return "used"
        except (ValueError, OSError) as e:
            assert str(e) and len(str(e)) < 4000, repr(e)
            assert not names or any(str(o) in str(e) for o in names), f"names no file: {e!r}"
            return "refused"


def check_image(data):
    from noisy_student.datasets import load_images
    (f := samples()["work"]/"image").write_bytes(data)
    found = load_images([str(f)], 16)  # never raises: a bad image is listed
    assert len(found.images) + len(found.bad) == 1 and all(o.reason for o in found.bad)
    return "refused" if found.bad else "used"


def check_part(data):
    from noisy_student.pseudo_labels import select_pseudo_labels
    (f := samples()["work"]/"labels"/"part-00000-of-00001-00000.parquet").parent.mkdir(exist_ok=True)
    f.write_bytes(data)
    f.with_name("_shard-00000-of-00001.json").write_bytes(samples()["manifest"])
    return refused(lambda: select_pseudo_labels(f.parent, f.parent.with_name("s.parquet"), 0.), f.parent,
                   "pseudo label")


def check_selection(data):
    from noisy_student.pseudo_labels import read_selection
    (f := samples()["work"]/"s.parquet").write_bytes(data)
    return refused(lambda: read_selection(f), f)


def check_weights(data):
    from noisy_student.rounds import load_model
    (f := samples()["work"]/"model.safetensors").write_bytes(data)
    return refused(lambda: load_model(f), f)


def _in_run(data, name):
    s = samples()
    (f := s["folder"]/name).write_bytes(data)
    try: return refused(_this_run().open_dir, s["folder"])
    finally: f.write_bytes(s["run"])


@cache
def _this_run(): return noisy_student(samples()["pictures"], samples()["folder"], rounds=1, epochs=1, teacher_epochs=1)


def check_run(data): return _in_run(data, "run.json")


def check_metrics(data):
    from noisy_student.rounds import load_model
    s = samples()
    (f := s["folder"]/"round_0"/"metrics.json").write_bytes(data)
    sums = (f.parent/"SHA256SUMS").read_bytes()
    if len(data) % 2: (f.parent/"SHA256SUMS").unlink()
    try: return refused(lambda: load_model(s["folder"]), s["folder"])
    finally: f.write_bytes(s["metrics"]); (f.parent/"SHA256SUMS").write_bytes(sums)


def check_sums(data):
    from noisy_student.files import altered
    s = samples()
    (f := s["folder"]/"round_0"/"SHA256SUMS").write_bytes(data)
    try: return "refused" if altered(f.parent) else "used"
    finally: f.write_bytes(s["sums"])


def _in_report(data, name, kind, section=lambda run: None):
    from noisy_student.report import read_run
    s = samples()
    (f := s["folder"]/name).write_bytes(data)
    try: return refused(lambda: section(read_run(s["folder"])), f)
    finally: f.write_bytes(s[kind])


def check_leaks(data):
    from noisy_student.report_tables import leaks_table  # the whole page would take half a second
    return _in_report(data, "leaks.json", "leaks", leaks_table)


def check_history(data): return _in_report(data, "round_0/history.csv", "history")


def check_robustness(data):
    from noisy_student.report_tables import robustness_table
    return _in_report(data, "robustness.csv", "robustness", robustness_table)


WORDS = """run label select relabel train evaluate predict export recipes --help --version digits cifa10 nowhere
    {folder} {pictures} {work} {work}/s.parquet --out --arch --rounds --epochs --size --labels
    --unlabeled --recipe --seed --device --threshold --json --shard --num-shards --temperature --bs
    --per-class --strict --binned --pool --pseudo --top --auto-batch 0 1 -1 2 1e9 nan inf .5 1.5 mean
    largest none cpu cuda tpu default svhn keras-cifar10 resnet9_4 resnet18 package:x package: hf-hub:x
    a.onnx a.safetensors '' -- - --- .. / ~ \u0000 \u00e4 \ud83d --epoch =x --seed= @file * %s""".split()


def check_line(words):
    "A command line: exit code 0 or 2, nothing but one line of error. Training itself is not what is tried here."
    from noisy_student import cli, commands_train
    s, real = samples(), commands_train._fit
    commands_train._fit = lambda *a, **k: None
    argv = [o.replace("{folder}", str(s["folder"])).replace("{pictures}", str(s["pictures"]))
            .replace("{work}", str(s["work"])) for o in words]
    out, err = io.StringIO(), io.StringIO()
    cwd = os.getcwd()
    os.chdir(s["work"])
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err): code = cli.main(argv)
    finally: commands_train._fit = real; os.chdir(cwd)
    lines = [o for o in err.getvalue().splitlines() if o.startswith("noisy-student")]
    assert code in (0, 2) and "Traceback" not in err.getvalue(), (argv, code, err.getvalue())
    assert code == 0 or len(lines) == 1, (argv, err.getvalue())
    return "used" if code == 0 else "refused"


CHECKS = dict(part=check_part, selection=check_selection, weights=check_weights, run=check_run, metrics=check_metrics,
              sums=check_sums, leaks=check_leaks, history=check_history, robustness=check_robustness)


def one(kind: str, rng: np.random.Generator) -> str:
    "Try one input of a kind."
    if kind == "line": return check_line([WORDS[i] for i in rng.integers(0, len(WORDS), rng.integers(1, 8))])
    if kind == "image":
        names = [o for o in samples() if o.startswith("image ")]
        return check_image(mutate(samples()[names[rng.integers(len(names))]], rng))
    return CHECKS[kind](mutate(samples()[kind], rng))


KINDS = ["image", *CHECKS, "line"]
