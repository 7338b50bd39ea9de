"""Mutated inputs of every kind that the library reads, for test_fuzz.py and benchmarks/fuzz.py.

A check takes bytes, or a list of words for command lines, and returns what came of it: 'used' or 'refused'. It raises
if anything but one clear message comes out."""
import contextlib, copy, io, itertools, json, os, struct, tarfile, tempfile, warnings, zlib
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
    return CHECKS[kind](mutate(sample(kind), rng))


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
        new = copy.deepcopy(NASTY[rng.integers(len(NASTY))])  # it may be put into, too
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
        d = json.loads(sample(kind))
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
        t = pd.read_csv(io.BytesIO(sample(kind))).astype(object)
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
    one = [samples()["image b.png"], b"", bytes(int(rng.integers(1, 200_000))), None, "x"][rng.integers(5)]
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


# Tables of users: labels, pools, test images, images to predict; and what a competition wants

TABLE = "image,label,valid,group\n" + "".join(f"train/{c}/{i}.png,{c},{i % 2},{i}\n" for c in ("blue", "red")
                                              for i in range(8))
CELLS = ["", " ", "nan", "None", "1", "0", "1.5", "-1", "1e999", "10" * 200, "x" * 20_000, '"', "'", ",", ";", "\t",
         "\0", "\ufeff", "\ud800", "../x", "/", "/dev/zero", "train/blue/0.png", "train/blue", "true", "=1+1", "\r",
         "a.tar/b.png", "image", "label", "confidence", "id", "blue", "007", "\u00fc" * 300]


def craft_lines(text):
    "Rows and columns that are nasty, missing, doubled, unnamed, or of other separators and codings."
    def craft(rng):
        rows = [o.split(",") for o in text.splitlines()]
        def cell(): return CELLS[rng.integers(len(CELLS))]
        for _ in range(rng.integers(1, 4)):
            how, i = rng.integers(10), int(rng.integers(len(rows)))
            j, k = int(rng.integers(max(1, len(rows[i])))), int(rng.integers(len(rows[0]) or 1))
            if how < 3 and rows[i]: rows[i][j] = cell()
            elif how == 3: rows[0][k:k + 1] = [cell()]
            elif how == 4: rows = [o[:k] + o[k + 1:] for o in rows]
            elif how == 5: rows = [o[:k + 1] + o[k:] for o in rows]
            elif how == 6: v = cell(); rows = rows[:1] + [o[:k] + [v] + o[k + 1:] for o in rows[1:]]
            elif how == 7: rows = rows[:i + 1]
            elif how == 8: rows[i:i] = rows[i:i + 1] * int(rng.integers(1, 3000))
            else: rows = [o + [cell() + str(n) for n in range(rng.integers(2000))] for o in rows[:1]] + rows[1:]
            rows = rows[:5000]
        sep, end = [",", ",", ",", ";", "\t", "|"][rng.integers(6)], ["\n", "\n", "\r\n", "\r"][rng.integers(4)]
        coding = ["utf-8", "utf-8", "utf-8", "utf-16", "latin-1", "utf-8-sig"][rng.integers(6)]
        size = itertools.accumulate((sum(map(len, o)) for o in rows), initial=0)
        rows = [o for o, before in zip(rows, size) if before < 2_000_000]  # the same long row may be there 3,000 times
        return end.join(sep.join(o) for o in rows).encode(coding, errors="replace")[:2_000_000]
    return craft


def any_used(*ways):
    "Of several outcomes one."
    return "used" if "used" in ways else "refused"


def check_table(data):
    "As labels, with and without names of columns, as a pool, as test images, as images to predict, as a command."
    from noisy_student.predictions import named_images
    from noisy_student.tables import from_csv
    s = samples()
    (f := s["work"]/"train.csv").write_bytes(data)
    (good := s["work"]/"good.csv").write_text(TABLE)
    p, named = s["pictures"], (f, "column", "row", "table", "label", "test", "group", "files", "folder", "valid")
    ways = (lambda: from_csv(f, p), lambda: from_csv(f, p, valid="valid", group="group"),
            lambda: from_csv(f, p, 0, 1, valid=2, group=-1), lambda: from_csv(good, p, unlabeled=f),
            lambda: from_csv(good, p, test=f), lambda: named_images(f, p), lambda: named_images(f, p, 0))
    return any_used(*(refused(o, *named) for o in ways), check_line(["run", str(f), "--images", str(p)]))


@cache
def predictions():
    "As `predict_table` gives them."
    import pandas as pd
    p = np.linspace(.5, 1, 6)
    return pd.DataFrame(dict(image=[f"test/{i}.png" for i in range(6)], label="blue", confidence=p, blue=p, red=1 - p))


def check_sample(data):
    "A sample submission."
    import pandas as pd
    from noisy_student.predictions import write_submission
    s = samples()
    (f := s["work"]/"sample.csv").write_bytes(data)
    ways = (dict(), dict(columns=["id", "label"]), dict(columns=dict(id="image", p="red")), dict(fill="red"))
    def write(how):
        out = write_submission(predictions(), s["work"]/"mine.csv", like=f, **how)
        assert len(pd.read_csv(out, skip_blank_lines=False)) <= len(data)
    return any_used(*(refused(lambda o=o: write(o)) for o in ways))


def check_predictions(data):
    "A table that was written, read with pandas, and is to be written again."
    import pandas as pd
    from noisy_student.predictions import write_submission
    s = samples()
    if data.count(b"\n") * data.count(b",") > 10**6: return "refused"  # a matter of pandas
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try: table = pd.read_csv(io.BytesIO(data))
        except (ValueError, OverflowError): return "refused"
    ways = (dict(), dict(stem=True, fill="red"), dict(columns=["id", "blue", "red"]))
    return any_used(*(refused(lambda o=o: write_submission(table, s["work"]/"mine.csv", **o)) for o in ways))


# Weights of others, in every form of torch.save

@cache
def network():
    from noisy_student.models import create_model
    return create_model("resnet9_4", 2)


def saved(value, new=True):
    import torch
    torch.save(value, b := io.BytesIO(), _use_new_zipfile_serialization=new)
    return b.getvalue()


def check_checkpoint(data):
    from noisy_student.models import load_pretrained
    (f := samples()["work"]/"weights.pth").write_bytes(data)
    return refused(lambda: load_pretrained(copy.deepcopy(network()), f), f)


def craft_checkpoint(rng):
    "State dicts within others, under odd names, of odd tensors, beside odd things."
    import argparse, collections, datetime, torch
    sd = dict(network().state_dict())
    key = [*sd][rng.integers(len(sd))]
    odd = [torch.zeros(0), torch.zeros(()), torch.zeros(2, 2).to_sparse(), torch.zeros(1, dtype=torch.complex64),
           torch.zeros(3, dtype=torch.bool), torch.zeros(1).expand(1 << 30), torch.empty(2, 2, device="meta"),
           torch.quantize_per_tensor(torch.zeros(2), 1., 0, torch.qint8), None, "x", [1], {}, 1.5, float("nan"),
           sd[key] * float("nan"), sd[key].double(), torch.nn.Parameter(sd[key].float()), DEEP,
           np.zeros(3), np.float64(1), set(), argparse.Namespace(a=1), datetime.date(2020, 1, 1), Path("x"), print,
           collections.OrderedDict(sd), network(), network]
    def thing(): return odd[rng.integers(len(odd))]
    for _ in range(rng.integers(0, 4)):
        name = [key, "", ".", "module.", "n_averaged", "model", "state_dict", "_conv_stem.weight", "_blocks.0.x.y", 1,
                None, ("a", 1), "x" * 100_000, "\ud800", "\0"][rng.integers(15)]
        if rng.random() < .2: sd.pop(key, None)
        else: sd[name] = thing()
    for _ in range(rng.integers(0, 4)):
        place = ["state_dict", "model", "state_dict_ema", "model_ema", "model_state_dict", "x", 0][rng.integers(7)]
        how = rng.integers(6)
        if how == 0 and all(isinstance(o, str) for o in sd): sd = {f"module.{k}": v for k, v in sd.items()}
        elif how == 1 and all(isinstance(o, str) for o in sd): sd = {f"x.{k}": v for k, v in sd.items()}
        elif how == 2: sd = {place: thing(), "state_dict": sd}
        elif how == 3: sd = [sd]
        elif how == 4: sd = {place: sd, "optimizer": thing()}; sd["loop"] = sd if rng.random() < .3 else 1
        else: sd = {place: sd}
        if not isinstance(sd, dict): break
    try: return saved(sd, bool(rng.integers(2)))
    except Exception: return saved(thing() if rng.random() < .1 else {}, bool(rng.integers(2)))  # not to be saved


# Arrays on disk: a cache of images, of corrupted ones, of SVHN

def craft_array(rng):
    "Headers that lie about type, shape and order, and data of any length."
    kinds = ["|u1", "<i8", "<f2", "|O", "|V8", "|S0", "<U1", "<M8[s]", "x", [("a", "|u1")], "|u1" * 1000, None, 3]
    sizes = [0, 1, 4, 8, 16, 24, 32, 2**31, 2**63, 10**30, -1, True, None, "x", 1.5]
    shape = tuple(sizes[rng.integers(len(sizes))] for _ in range(rng.integers(0, 6)))
    shapes = [(22, 8, 8, 3), (4, 32, 32, 3), (4,), (40, 32, 32, 3), (40,), shape, shape, (8,) * 100, [4], None, 3]
    head = dict(descr=kinds[rng.integers(len(kinds)) * int(rng.integers(2))], fortran_order=bool(rng.integers(2)),
                shape=shapes[rng.integers(len(shapes))])
    if rng.random() < .2: head[["descr", "shape", "fortran_order", "x"][rng.integers(4)]] = NASTY[rng.integers(20)]
    text = [repr(head), "(" * 5000, "1+" * 3000 + "1"][rng.integers(3) * int(rng.random() < .1)]
    text = text.encode("latin-1", "replace") + b"\n"
    data = bytes(int(rng.choice([0, 4, 40, 320, 22 * 192, 4 * 3072, 40 * 3072, 100_000])))
    version = [1, 1, 2, 3, 9][rng.integers(5)]
    size = struct.pack("<H" if version == 1 else "<I", [len(text), 0, 2**16 - 1][rng.integers(3) * (rng.random() < .1)])
    return b"\x93NUMPY" + bytes([version, 0]) + size + text + data


def check_array(data):
    "In the place of decoded images, with the checksum that makes it right; of corrupted ones; of digits."
    from noisy_student.corruptions import corrupted_set
    from noisy_student.datasets import load_images, svhn
    from noisy_student.files import file_sha256
    s = samples()
    items = sorted(str(o) for o in (s["pictures"]/"train").rglob("*.png"))
    root = s["work"]/"arrays"
    def images():
        load_images(items, 8, root)
        (file := next(root.glob("images-*.npy"))).write_bytes(data)
        meta = file.with_suffix(".json")
        d = {k: v for k, v in json.loads(meta.read_text()).items() if k != "sha256"}
        meta.write_text(json.dumps(dict(d, sha256=file_sha256(file, json.dumps(d)))))
        found = load_images(items, 8, root)
        assert found.images.shape == (len(items), 8, 8, 3) and found.images.dtype == np.uint8
    def corrupted():
        x = np.zeros((1, 32, 32, 3), np.uint8)
        corrupted_set(x, "brightness", 1, root/"c")
        next((root/"c").glob("*.npy")).write_bytes(data)
        found = corrupted_set(x, "brightness", 1, root/"c")
        assert found.shape == x.shape and found.dtype == np.uint8
    def digits():
        from scipy.io import savemat
        for name, n in dict(train=40, test=4).items():
            if (f := s["work"]/"svhn"/f"{name}_32x32.mat").exists(): continue
            f.parent.mkdir(exist_ok=True)
            savemat(f, dict(X=np.zeros((32, 32, 3, n), np.uint8), y=np.arange(n)[:, None] % 10 + 1))
        svhn(root=f.parent, n_valid=5, unlabeled="rest")
        arrays = sorted(f.parent.glob("*.npy"))
        arrays[len(data) % len(arrays)].write_bytes(data)
        d = svhn(root=f.parent, n_valid=5, unlabeled="rest")
        assert len(d.test) == 4 and len(d.valid) == 5 and d.test.images.shape == (4, 32, 32, 3)
    return any_used(*(refused(o, root, s["work"]/"svhn") for o in (images, corrupted, digits)))


def check_mat(data):
    from noisy_student.datasets import svhn
    s = samples()
    (folder := s["work"]/"mat").mkdir(exist_ok=True)
    for o in folder.iterdir(): o.unlink()
    for name in ("train", "test"): (folder/f"{name}_32x32.mat").write_bytes(data if name == "train" else sample("mat"))
    return refused(lambda: svhn(root=folder, n_valid=5, unlabeled="rest"), folder)


# A run with folds, and one with a time limit

@cache
def folded():
    "A finished teacher of two folds."
    (run := noisy_student(samples()["pictures"], samples()["folder"].with_name("folded"), rounds=0, teacher_epochs=1,
                          folds=2)).fit()
    return run


def _in_folded(data, name, f):
    "With a file of the run, with and without its checksum."
    root = folded().path
    before = {o: o.read_bytes() for o in root.rglob("*") if o.is_file()}
    try:
        (root/name).write_bytes(data)
        (root/name).with_name("SHA256SUMS").unlink()
        return refused(f, root/name)
    finally:
        for o, old in before.items(): o.write_bytes(old)


def check_answers(data):
    "What was said of every labeled image."
    def read():
        table = folded().oof(0)
        p = table[list(folded().data.classes)].to_numpy()
        assert len(table) == len(folded().data.labeled) and (abs(p.sum(1) - 1) < 1e-3).all()
    return _in_folded(data, "round_0/answers.safetensors", read)


def check_oof(data):
    "Whether validation images trained a run: asked before it is evaluated on them."
    from noisy_student.commands_judge import _trained_by_all
    from noisy_student.datasets import from_folder
    pictures = from_folder(samples()["pictures"])
    pictures.valid.images.append("elsewhere.png")
    def evaluate():
        _trained_by_all(folded().path, pictures)
        folded().dir.check(0)
    return _in_folded(data, "round_0/oof.csv", evaluate)


def _joined(data, name):
    "With the networks of a round put together again."
    def join():
        for o in folded().parts: o.task.learners.forget(None)
        folded().task._join(0)
    return _in_folded(data, f"fold_1/round_0/{name}", join)


def check_fold_history(data): return _joined(data, "history.csv")
def check_fold_weights(data): return _joined(data, "model.safetensors")


def check_trained(data):
    "The history of a run that is compared with others."
    from noisy_student.ablation import _trained_images
    s = samples()
    (f := s["folder"]/"round_0"/"history.csv").write_bytes(data)
    try: f.with_name("SHA256SUMS").unlink(); return refused(lambda: _trained_images(_this_run()), f)
    finally: f.write_bytes(s["history"]); f.with_name("SHA256SUMS").write_bytes(s["sums"])


@cache
def planned():
    "A run with a time limit, before its first round."
    from noisy_student.speed import Rates
    run = noisy_student(samples()["pictures"], samples()["folder"].with_name("planned"), rounds=1, time_limit=600)
    run.task.timing._rates = Rates({0: .01, 1: .01}, {0: 1e3, 1: 1e3})
    run.open_dir()
    run.opened.all_given()
    return run


def check_plan(data):
    run = planned()
    (f := run.dir.round(0)/"plan.json").parent.mkdir(exist_ok=True)
    f.write_bytes(data)
    def resume():
        timing = run.task.timing
        for k in (0, 1): timing.steps(k), timing.is_left_out(k), run.task.enough_for(k)
        run.learners.recipe_of(0), timing.keep(0), timing.gone, run.plan()
    return refused(resume, f)


def check_begun(data):
    "run.json of a run that chose its settings itself, and has begun."
    from noisy_student.rounds import NoisyStudent
    s = samples()
    (root := s["work"]/"begun").mkdir(exist_ok=True)
    (root/"run.json").write_bytes(data)
    (root/"round_0").mkdir(exist_ok=True)
    (root/"round_0"/"x").touch()
    return refused(lambda: NoisyStudent(s["pictures"], path=root, time_limit=600).open_dir(), root, "run.json")


NUMBERS = [0, -1, 1, 2, 1e-300, -.5, 1e18, 1e308, float("nan"), float("inf"), 2**31, 2**62, None]


def craft_plan(rng):
    "Numbers of the right kind, and absurd."
    from noisy_student.files import sealed
    if rng.random() < .3: return craft_sealed("plan")(rng)
    d = json.loads(sample("plan"))
    d.pop("sha256")
    for k in [*d]:
        if rng.random() < .3: d[k] = NUMBERS[rng.integers(len(NUMBERS))]
    if rng.random() < .3: d["epochs"] = {str(rng.integers(5)): int(rng.integers(-2**62, 2**62))}
    return sealed(d).encode()


def craft_begun(rng):
    "Choices that nobody has made."
    from noisy_student.files import sealed
    if rng.random() < .3: return craft_sealed("begun")(rng)
    d = json.loads(sample("begun"))
    d.pop("sha256")
    names = [o for o in NASTY if isinstance(o, str)] + ["resnet18", "package:x", "local-dir:/tmp", "timm/resnet18"]
    def name(): return names[rng.integers(len(names))]
    if rng.random() < .7: d["chosen"]["archs"] = [name() for _ in range(rng.integers(4))]
    if rng.random() < .4: d["chosen"]["pretrained"] = [True, False, "/dev/zero", name()][rng.integers(4)]
    for k in ("speed", "settled_for"):
        if rng.random() < .3: d[k] = NUMBERS[rng.integers(len(NUMBERS))]
    return sealed(d).encode(errors="surrogatepass")


def craft_tensors(kind):
    "Other tensors under the names of a file, with its checksum."
    def craft(rng):
        import torch
        from noisy_student.models import load_tensors, save_tensors
        (f := samples()["work"]/"old.safetensors").write_bytes(sample(kind))
        tensors, meta = load_tensors(f)
        key = [*tensors][rng.integers(len(tensors))]
        x = tensors[key]
        new = [torch.zeros(0), torch.zeros(()), x.flatten()[:1], x.flatten(), x.double(), x.half(), x > 0, x.long(),
               x * float("nan"), x - 1, x * 2, x[..., None], torch.zeros(len(x) if x.ndim else 1, 3), x * float("inf"),
               torch.zeros(2, dtype=torch.complex64), x.to(torch.float8_e4m3fn)][rng.integers(16)]
        if rng.random() < .2: tensors["x" if rng.random() < .5 else "models.7.x"] = tensors.pop(key)
        else: tensors[key] = new.contiguous()
        if meta and rng.random() < .3: meta[[*meta][rng.integers(len(meta))]] = text_of(NASTY[rng.integers(len(NASTY))])
        return save_tensors(tensors, f, meta).read_bytes()
    return craft


def sample(kind):
    "The bytes of a whole file of a kind."
    return samples()[kind] if kind in samples() else _more()[kind]


@cache
def _more():
    "What only the second runs have, and files of users."
    from noisy_student.checkpoints import Checkpoint
    from noisy_student.rounds import NoisyStudent
    from scipy.io import savemat
    import torch
    s, found = samples(), {}
    root = folded().path
    for name, file in {"answers": "round_0/answers.safetensors", "oof": "round_0/oof.csv",
                       "fold history": "fold_1/round_0/history.csv",
                       "fold weights": "fold_1/round_0/model.safetensors"}.items():
        found[name] = (root/file).read_bytes()
    planned().task.timing.note(0, steps=8, step_seconds=.01, left=1.5, begun=.5, enough=9., epochs={"0": 3})
    found["plan"] = (planned().dir.round(0)/"plan.json").read_bytes()
    own = NoisyStudent(s["pictures"], path=s["work"]/"own", time_limit=600)
    own.open_dir()
    found["begun"] = (s["work"]/"own"/"run.json").read_bytes()
    Checkpoint(s["work"]/"one.safetensors").save(dict(epoch=1, model=dict(a=torch.zeros(1)), seconds=1.))
    found["state"] = (s["work"]/"one.safetensors").read_bytes()
    savemat(b := io.BytesIO(), dict(X=np.zeros((32, 32, 3, 40), np.uint8), y=np.arange(40)[:, None] % 10 + 1))
    found["mat"] = b.getvalue()
    found["checkpoint"], found["old checkpoint"] = (saved(network().state_dict(), o) for o in (True, False))
    found |= dict(table=TABLE.encode(), sample=b"id,label\n" + b"".join(b"%d.png,blue\n" % i for i in range(6)),
                  predictions=predictions().to_csv(index=False).encode(), trained=s["history"])
    return found


STREAMED = [["recipes"], ["--help"], ["--version"], ["evaluate", "{folder}"], ["evaluate", "{folder}", "--json"],
            ["nonsense"],
            ["predict", "{folder}", "{work}/d\u00fcne \u6c99.png", "--device", "cpu"],
            ["predict", "{work}/f\u00fcr", "x.png"],
            ["report", "{work}"], ["recipes", "--json"]]
CHECKS |= {
    "manifest": check_manifest, "state": check_state, "table": check_table, "sample": check_sample,
    "predictions": check_predictions, "checkpoint": check_checkpoint, "old checkpoint": check_checkpoint,
    "mat": check_mat, "answers": check_answers, "oof": check_oof, "fold history": check_fold_history,
    "fold weights": check_fold_weights, "trained": check_trained, "plan": check_plan, "begun": check_begun}
CRAFTED = {
    "crafted run": (craft_sealed("run"), check_run), "crafted leaks": (craft_sealed("leaks"), check_leaks),
    "crafted metrics": (craft_metrics, check_metrics), "crafted weights": (craft_weights, check_weights),
    "crafted part": (craft_table("part"), check_part), "crafted selection": (craft_table("selection"), check_selection),
    "crafted history": (craft_csv("history"), check_unsealed_history),
    "crafted manifest": (craft_manifest, check_manifest),
    "crafted notes": (craft_notes, check_notes), "crafted state": (craft_state, check_state),
    "crafted png": (craft_png, check_image), "tar": (craft_tar, lambda b: check_archive(b, ".tar")),
    "pool": (craft_pool, lambda b: check_archive(b, ".parquet")),
    "crafted table": (craft_lines(TABLE), check_table), "array": (craft_array, check_array),
    "crafted sample": (lambda rng: craft_lines(sample("sample").decode())(rng), check_sample),
    "crafted predictions": (lambda rng: craft_lines(sample("predictions").decode())(rng), check_predictions),
    "crafted checkpoint": (craft_checkpoint, check_checkpoint), "crafted plan": (craft_plan, check_plan),
    "crafted begun": (craft_begun, check_begun), "crafted oof": (craft_csv("oof"), check_oof),
    "crafted answers": (craft_tensors("answers"), check_answers),
    "crafted fold weights": (craft_tensors("fold weights"), check_fold_weights),
    "crafted fold history": (craft_csv("fold history"), check_fold_history),
    "crafted trained": (craft_csv("trained"), check_trained)}

KINDS = ["image", *CHECKS, *CRAFTED, "line", "streams"]
