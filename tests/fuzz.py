"""Mutated inputs of every kind that the library reads, for test_fuzz.py and benchmarks/fuzz.py.

A check takes bytes, or a list of words for command lines, and returns what came of it: 'used' or 'refused'. It raises
if anything but one clear message comes out."""
import contextlib, copy, io, json, os, struct, tarfile, tempfile, warnings, zlib
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


def check_unsealed_history(data):
    "Whoever writes a table can write its checksum, or leave it out."
    s = samples()
    sums = s["folder"]/"round_0"/"SHA256SUMS"
    try: sums.unlink(missing_ok=True); return check_history(data)
    finally: sums.write_bytes(s["sums"])


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
    if kind == "streams": return check_streams(STREAMED[rng.integers(len(STREAMED))], rng)
    if kind in CRAFTED: make, check = CRAFTED[kind]; return check(make(rng))
    return CHECKS[kind](mutate(samples()[kind], rng))


# Well-formed but wrong: what is true of a file (its checksum, its form) stays true, what it says does not

NASTY = [None, True, False, 0, -1, 1.5, 1e308, float("nan"), float("inf"), 2**31, 2**63, 10**40, "", "x", "0", "../x",
         "\0", "\ud800", "hf-hub:x/y", "resnet9_99999", "cifar10", "x" * 10_000, [], {}, [[]], [{}], [None], ["x"], [1],
         {"": 1}, {"x": {}}]


def places(value, at=()):
    "The path of every value within a value."
    yield at
    for k, v in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(v, (*at, k))


def crafted(value, rng):
    "A value of JSON of which a few parts are others, missing, or moved."
    value = copy.deepcopy(value)
    for _ in range(rng.integers(1, 4)):
        found = list(places(value))
        *way, last = found[rng.integers(len(found))] or (None,)
        new = NASTY[rng.integers(len(NASTY))]
        if rng.random() < .02: new = DEEP
        if last is None: value = new; continue
        o = value
        for k in way: o = o[k]
        how = rng.integers(4)
        if how == 0: del o[last]
        elif how == 1 and len(found) > 1: o[last] = copy.deepcopy(value)
        else: o[last] = new
    return value


DEEP = "<deep>" # Stands for more brackets than a writer would write


def deepened(text): return text.replace(json.dumps(DEEP), "[" * 2000 + "]" * 2000)


def text_of(value): return deepened(json.dumps(value)[:10**7])


def craft_sealed(kind):
    def craft(rng):
        from noisy_student.files import sealed
        d = json.loads(samples()[kind])
        d.pop("sha256")
        d = crafted(d, rng)
        if isinstance(d, dict) and rng.random() < .9: return deepened(sealed(d)).encode(errors="surrogatepass")
        return text_of(d).encode()
    return craft


def craft_metrics(rng):
    data = text_of(crafted(json.loads(samples()["metrics"]), rng)).encode()
    return data + b" " * (len(data) % 2 == 0)  # an odd length: without a checksum beside it


def craft_weights(rng):
    from safetensors.torch import load, save
    import struct
    data = samples()["weights"]
    head = json.loads(data[8:8 + struct.unpack("<Q", data[:8])[0]])["__metadata__"]
    head.pop("noisy_student_sha256")
    key = [*head][rng.integers(len(head))]
    if key == "arch": head[key] = str(NASTY[rng.integers(len(NASTY))]).encode(errors="replace").decode()
    else: head[key] = text_of(crafted(json.loads(head[key]), rng))
    return save({k: v for k, v in load(data).items() if rng.random() < .99}, head)


def craft_table(kind):
    def craft(rng):
        import pyarrow as pa, pyarrow.parquet as pq
        t = pq.read_table(io.BytesIO(samples()[kind]))
        meta = {k.decode(): v.decode() for k, v in t.schema.metadata.items() if k != b"sha256"}
        if rng.random() < .5:
            key = [*meta][rng.integers(len(meta))]
            try: meta[key] = text_of(crafted(json.loads(meta[key]), rng))
            except ValueError: meta[key] = "x"
        else:
            i, n = int(rng.integers(t.num_columns)), t.num_rows
            text = str(NASTY[rng.integers(len(NASTY))]).encode(errors="replace").decode()
            columns = [pa.nulls(n), pa.array([text] * n),
                       pa.array(rng.integers(-2**40, 2**40, n)), pa.array(rng.normal(0, 1e6, n)), pa.array([[1.]] * n),
                       pa.array([[.5, .5]] * n), pa.array([None, *t.column(i).to_pylist()[1:]], t.column(i).type),
                       pa.array([dict(a=1)] * n), pa.array([b"x"] * n), pa.array([float("nan")] * n)]
            if rng.random() < .1: t = t.drop_columns([t.column_names[i]])
            else: t = t.set_column(i, t.column_names[i], columns[rng.integers(len(columns))])
        pq.write_table(t.replace_schema_metadata(meta), b := io.BytesIO())
        return b.getvalue()
    return craft


def craft_csv(kind):
    def craft(rng):
        import pandas as pd
        t = pd.read_csv(io.BytesIO(samples()[kind])).astype(object)
        for _ in range(rng.integers(1, 4)):
            if rng.random() < .2 and len(t.columns) > 1: t = t.drop(columns=t.columns[rng.integers(len(t.columns))])
            elif rng.random() < .2: t = t.rename(columns={t.columns[0]: "x"})
            else: t.iloc[rng.integers(len(t)), rng.integers(len(t.columns))] = str(NASTY[rng.integers(len(NASTY))])
        return t.to_csv(index=False).encode(errors="replace")
    return craft


def check_archive(data, suffix):
    from noisy_student.archives import list_archive
    from noisy_student.datasets import load_images
    (f := samples()["work"]/f"pool{suffix}").write_bytes(data)
    def use():
        found = load_images(list_archive(f)[:50], 8)
        assert all(o.reason for o in found.bad)
    return refused(use, f)


def craft_tar(rng):
    "Headers with numbers that are none, whose checksums are right."
    out, kinds = b"", b"0LxgKSDV157X"
    for i in range(rng.integers(1, 5)):
        m = tarfile.TarInfo(f"{i}.png")
        content = b"30 GNU.sparse.map=1,2,3,4,5,6\n"[:rng.integers(1, 31)]
        if rng.random() < .5: content = samples()["image b.png"]
        m.size = len(content)
        b = bytearray(m.tobuf(tarfile.GNU_FORMAT))
        if rng.random() < .7: b[156] = kinds[rng.integers(len(kinds))]
        for at, n in ((124, 12), (136, 12), (100, 8), (386, 12), (483, 12)):
            if rng.random() < .3:
                b[at:at + n] = [rng.bytes(n), b"\xff" * n, b"\x80" + b"\x7f" * (n - 1), b"7" * (n - 1) + b"\0",
                                b"-" + b"1" * (n - 1)][rng.integers(5)]
        b[148:156] = b" " * 8
        b[148:156] = b"%06o\0 " % sum(b[:512])
        out += bytes(b) + content + bytes(-len(content) % 512)
    return out + bytes(1024 * int(rng.integers(0, 2)))


def craft_pool(rng):
    "Parquet files of few bytes: equal values, nulls, nested ones, other types."
    import pyarrow as pa, pyarrow.parquet as pq
    one = [samples()["image b.png"], b"", bytes(int(rng.integers(1, 1_000_000))), None, "x"][rng.integers(5)]
    n = int(rng.integers(0, 40))
    cell = one if rng.random() < .5 else dict(bytes=one, path="x")
    more = {"more": [b"x"] * n} if rng.random() < .3 else {}
    t = pa.table({["image", "bytes", "x"][rng.integers(3)]: [cell] * n, **more})
    pq.write_table(t, b := io.BytesIO(), compression=["zstd", "none"][rng.integers(2)],
                   row_group_size=1 + int(rng.integers(50)), use_dictionary=bool(rng.integers(2)))
    return mutate(b.getvalue(), rng) if rng.random() < .3 else b.getvalue()


def craft_png(rng):
    "Any width, height, depth and kind, and few bytes of pixels, with right checksums."
    def chunk(k, b): return struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b))
    side = [1, 2, 100, 2000, 9459, 2**16, 2**31 - 1, 2**32 - 1]
    w, h = (side[rng.integers(len(side))] for _ in range(2))
    head = struct.pack(">IIBBBBB", w, h, [1, 2, 4, 8, 16, 99][rng.integers(6)], [0, 2, 3, 4, 6, 9][rng.integers(6)], 0,
                       0, int(rng.integers(2)))
    more = chunk([b"PLTE", b"tRNS", b"iCCP", b"zTXt", b"eXIf", b"acTL"][rng.integers(6)],
                 b"x\0\0" + zlib.compress(bytes(int(rng.integers(1, 10**6)))) if rng.random() < .5 else rng.bytes(12))
    data = zlib.compress(bytes(int(rng.integers(0, 2_000_000))))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + more + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def craft_manifest(rng): return text_of(crafted(json.loads(samples()["manifest"]), rng)).encode()


def check_manifest(data):
    from noisy_student.pseudo_labels import select_pseudo_labels
    s = samples()
    (f := s["work"]/"made"/"part-00000-of-00001-00000.parquet").parent.mkdir(exist_ok=True)
    f.write_bytes(s["part"]); f.with_name("_shard-00000-of-00001.json").write_bytes(data)
    return refused(lambda: select_pseudo_labels(f.parent, s["work"]/"s.parquet", 0.), f.parent)


def check_notes(data):
    "Notes beside decoded images: wrong ones are noticed, and the images are decoded again."
    from noisy_student.datasets import load_images
    s = samples()
    items = sorted(str(o) for o in (s["pictures"]/"train").rglob("*.png"))
    cache = s["work"]/"cache"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_images(items, 8, cache)
        next(cache.glob("*.json")).write_bytes(data)
        found = load_images(items, 8, cache)
    assert np.array_equal(found.images, load_images(items, 8).images)
    return "used"


def craft_notes(rng):
    return text_of(crafted(dict(bad=[["x", "y"]], bad_rows=[0], pixels="x", sha256="x"), rng)).encode()


def check_state(data):
    "A checkpoint: used, or passed over with a warning."
    from noisy_student.checkpoints import Checkpoint
    (f := samples()["work"]/"state.safetensors").write_bytes(data)
    used = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Checkpoint(f).load(lambda s: used.append([s["epoch"] + 1, s["model"]["a"].item()]))
    return "used" if used else "refused"


def craft_state(rng):
    import torch
    from safetensors.torch import save
    whole = dict(dict=[["epoch", 1], ["model", dict(dict=[["a", dict(tensor="state.model.a")]])]])
    if rng.random() < .95: whole = crafted(whole, rng)
    return save({"state.model.a": torch.zeros(1)}, dict(skeleton=text_of(whole)))


class Stream(io.TextIOWrapper):
    "A terminal of few characters, or one that fails."
    def __init__(self, coding, error):
        super().__init__(io.BytesIO(), encoding=coding, write_through=True)
        self.error = error
    def write(self, text):
        if self.error: raise OSError(self.error, os.strerror(self.error))
        return super().write(text)


def check_streams(words, rng):
    "A command line whose streams are closed, full, or of another coding: an exit code, and no traceback."
    import errno, sys
    from noisy_student import cli
    s = samples()
    def stream(): return Stream(["ascii", "cp1252", "utf-8", "latin-1"][rng.integers(4)],
                                [0, 0, errno.ENOSPC, errno.EBADF, errno.EPIPE, errno.EIO][rng.integers(6)])
    argv = [o.replace("{folder}", str(s["folder"])).replace("{work}", str(s["work"])) for o in words]
    before = sys.stdout, sys.stderr
    try:
        sys.stdout, sys.stderr = stream(), stream()
        code = cli.main(argv)
        said = sys.stderr.buffer.getvalue()
    finally: sys.stdout, sys.stderr = before
    assert code in (0, 1, 2) and b"Traceback" not in said, (argv, code, said)
    return "used" if code == 0 else "refused"


STREAMED = [["recipes"], ["--help"], ["--version"], ["evaluate", "{folder}"], ["evaluate", "{folder}", "--json"],
            ["nonsense"],
            ["predict", "{folder}", "{work}/d\u00fcne \u6c99.png", "--device", "cpu"],
            ["predict", "{work}/f\u00fcr", "x.png"],
            ["report", "{work}"], ["recipes", "--json"]]
CHECKS |= dict(manifest=check_manifest)
CRAFTED = {
    "crafted run": (craft_sealed("run"), check_run), "crafted leaks": (craft_sealed("leaks"), check_leaks),
    "crafted metrics": (craft_metrics, check_metrics), "crafted weights": (craft_weights, check_weights),
    "crafted part": (craft_table("part"), check_part), "crafted selection": (craft_table("selection"), check_selection),
    "crafted history": (craft_csv("history"), check_unsealed_history),
    "crafted manifest": (craft_manifest, check_manifest),
    "crafted notes": (craft_notes, check_notes), "crafted state": (craft_state, check_state),
    "crafted png": (craft_png, check_image), "tar": (craft_tar, lambda b: check_archive(b, ".tar")),
    "pool": (craft_pool, lambda b: check_archive(b, ".parquet"))}

KINDS = ["image", *CHECKS, *CRAFTED, "line", "streams"]
