"SVHN's files as people have them: missing, damaged, changed, read-only, converted already."
import errno
import os
import subprocess
import sys

import numpy as np
import pytest
from scipy.io import savemat

from noisy_student import datasets, images, svhn as svhn_module
from noisy_student.datasets import SVHN_STATS, Split, svhn

SIZES = dict(train=60, test=20, extra=40)


def write(folder, name, n, seed=0):
    "A .mat file in the layout of the real ones: X (32, 32, 3, N), y (N, 1) with 10 for zero."
    rng = np.random.default_rng([seed, *name.encode()])
    X = rng.integers(0, 256, (32, 32, 3, n), dtype=np.uint8)
    y = (np.arange(n) % 10 + 1).astype(np.uint8)[:, None]
    savemat(folder / f"{name}_32x32.mat", dict(X=X, y=y), do_compression=True)
    return np.stack([X[..., i] for i in range(n)]), y.ravel() % 10


@pytest.fixture
def folder(tmp_path):
    for name, n in SIZES.items(): write(tmp_path, name, n)
    return tmp_path


@pytest.fixture(autouse=True)
def no_internet(monkeypatch):
    def fail(*args, **kwargs): raise OSError("no route to host")
    monkeypatch.setattr("torchvision.datasets.utils.download_url", fail)


def load(folder, **kwargs): return svhn(root=folder, n_valid=10, **kwargs)


def test_same_as_torchvision(folder, monkeypatch):
    from torchvision.datasets import SVHN
    monkeypatch.setattr(SVHN, "_check_integrity", lambda self: True)  # the checksums are those of the real files
    s = load(folder)
    for split, name in ((Split(s.unlabeled.images, s.unlabeled.hidden), "extra"), (s.test, "test")):
        peer = SVHN(folder, name)
        assert np.array_equal(split.images, peer.data.transpose(0, 2, 3, 1))
        assert np.array_equal(split.labels, peer.labels)


def test_reference_split(tmp_path):
    "As proc_svhn.py of the reference implementation: 4,000 of the shuffled training images are held out."
    (X, y), *_ = [write(tmp_path, name, n) for name, n in dict(SIZES, train=4100).items()]
    np.random.seed(0)
    perm = np.arange(4100)
    np.random.shuffle(perm)
    s = svhn(root=tmp_path)
    assert np.array_equal(s.valid.images, X[perm[:4000]]) and np.array_equal(s.valid.labels, y[perm[:4000]])
    assert np.array_equal(s.labeled.images, X[perm[4000:]]) and np.array_equal(s.labeled.labels, y[perm[4000:]])


def test_global_generator_is_left_alone(folder):
    np.random.seed(7); before = np.random.get_state()[1].copy()
    load(folder)
    assert np.array_equal(np.random.get_state()[1], before)


def test_labels_are_hidden(folder):
    s = load(folder)
    assert s.unlabeled.labels is None and len(s.unlabeled.hidden) == SIZES["extra"]
    s = load(folder, n_labeled=20, unlabeled="rest")
    assert s.unlabeled.labels is None and np.bincount(s.labeled.labels).tolist() == [2] * 10
    assert (len(s.labeled), len(s.unlabeled), len(s.valid), len(s.test)) == (20, 30, 10, 20)


def test_pool_is_memory_mapped_and_opened_once_made(folder, monkeypatch):
    first = load(folder)
    monkeypatch.setattr(svhn_module, "_read_mat", None)  # not needed any more
    again = load(folder)
    assert isinstance(again.unlabeled.images, np.memmap) and not again.unlabeled.images.flags.writeable
    for name in ("labeled", "unlabeled", "valid", "test"):
        assert np.array_equal(getattr(first, name).images, getattr(again, name).images)
    for f in folder.glob("*.mat"): f.unlink()  # the converted files are enough
    assert np.array_equal(load(folder).unlabeled.images, first.unlabeled.images)


def test_changed_file_is_converted_again(folder):
    old = np.array(load(folder).unlabeled.images)
    X, _ = write(folder, "extra", 50, seed=1)
    assert np.array_equal(load(folder).unlabeled.images, X) and len(old) != 50


@pytest.mark.parametrize("name", ["extra_32x32-images.npy", "extra_32x32-labels.npy", "extra_32x32.json"])
def test_damaged_conversion_is_made_again(folder, name):
    X = np.array(load(folder).unlabeled.images)
    for content in (b"", (folder / name).read_bytes()[:-7]):
        (folder / name).write_bytes(content)
        assert np.array_equal(load(folder).unlabeled.images, X)
    (folder / name).unlink()
    assert np.array_equal(load(folder).unlabeled.images, X)
    assert not [f for f in folder.iterdir() if f.name.startswith(".")]


def test_missing_files_are_named(folder):
    (folder / "extra_32x32.mat").unlink(); (folder / "test_32x32.mat").unlink()
    with pytest.raises(FileNotFoundError) as e: load(folder)
    text = str(e.value)
    assert "\n" not in text and str(folder) in text and "train_32x32.mat" not in text
    assert "housenumbers/test_32x32.mat" in text and "housenumbers/extra_32x32.mat" in text
    write(folder, "test", 20)
    assert len(load(folder, unlabeled="rest").labeled) == 50  # extra is not asked for where it is not needed


def test_download_that_breaks_off(tmp_path, monkeypatch):
    def half(url, root, filename, md5):
        os.makedirs(root)
        with open(os.path.join(root, filename), "wb") as f: f.write(b"half")
        raise RuntimeError("File not found or corrupted.")
    monkeypatch.setattr("torchvision.datasets.utils.download_url", half)
    with pytest.raises(FileNotFoundError, match="corrupted"): load(tmp_path)
    assert not list(tmp_path.iterdir())


def test_download(tmp_path, monkeypatch):
    def fetch(url, root, filename, md5):
        assert url.endswith(filename) and len(md5) == 32
        os.makedirs(root)
        name = filename.split("_")[0]
        write(root, name, SIZES[name])
    monkeypatch.setattr("torchvision.datasets.utils.download_url", fetch)
    assert len(load(tmp_path / "new").unlabeled) == 40


@pytest.mark.parametrize("keep", [0, 100, 5000, -100])
def test_damaged_mat(folder, keep):
    file = folder / "test_32x32.mat"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match="test_32x32.mat"): load(folder)
    assert not (folder / "test_32x32.json").exists()


pixels, ones = np.zeros((32, 32, 3, 4), np.uint8), np.ones((4, 1), np.uint8)


@pytest.mark.parametrize("content", [dict(X=pixels), dict(y=ones), dict(X=pixels.transpose(3, 0, 1, 2), y=ones),
                                     dict(X=pixels.astype(float), y=ones), dict(X=pixels, y=11 * ones)])
def test_other_mat(folder, content):
    savemat(folder / "test_32x32.mat", content)
    with pytest.raises(ValueError, match="test_32x32.mat is no file of SVHN"): load(folder)


def test_full_disk(folder, monkeypatch):
    def full(*args): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OSError, match="No space left on device.*room") as e: load(folder)
    assert e.value.errno == errno.ENOSPC and sorted(f.suffix for f in folder.iterdir()) == [".mat"] * 3


def test_several_processes_at_once(folder):
    code = ("import sys; from noisy_student.datasets import svhn; "
            "print(svhn(root=sys.argv[1], n_valid=10).unlabeled.images.sum())")
    command = [sys.executable, "-c", code, str(folder)]
    procs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert len({p.communicate()[0] for p in procs}) == 1 and not any(p.returncode for p in procs)


def test_mistakes(folder):
    wrong = [(dict(unlabeled="ekstra"), "ekstra"), (dict(unlabeled=None), "'extra', 'rest'"),
             (dict(n_labeled=5), "10 to 50")]
    for kwargs, text in wrong:
        with pytest.raises((ValueError, FileNotFoundError), match=text): load(folder, **kwargs)
    with pytest.raises(ValueError, match="n_valid=4000 must be in 1..59"): svhn(root=folder)


def test_pool_of_files(folder, tmp_path):
    from PIL import Image
    (tmp_path / "pool").mkdir()
    for i in range(3): Image.new("RGB", (40, 32)).save(tmp_path / "pool" / f"{i}.png")
    pool = load(folder, unlabeled=tmp_path / "pool").unlabeled
    assert pool.images == [str(tmp_path / "pool" / f"{i}.png") for i in range(3)]


@pytest.mark.download
def test_real_files(monkeypatch):
    monkeypatch.undo()  # the internet is there again
    s = svhn()
    assert [len(o) for o in (s.labeled, s.unlabeled, s.valid, s.test)] == [69_257, 531_131, 4000, 26_032]
    sample = s.labeled.images[::7] / 255
    np.testing.assert_allclose((sample.mean((0, 1, 2)), sample.std((0, 1, 2))), SVHN_STATS, atol=5e-3)


def test_decoding_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
    "The cache of an interrupted decoding is that of one in a single go, and nothing is decoded twice"
    from PIL import Image
    for i in range(3): Image.new("RGB", (12, 10), (80 * i, 10, 200)).save(tmp_path/f"{i}.png")
    (tmp_path/"broken.png").write_bytes(b"no image")
    files = [str(tmp_path/o) for o in ("0.png", "broken.png", "1.png", "2.png")] * 600  # more than two chunks
    decode, count = images._decode, []
    monkeypatch.setattr(images, "_decode", lambda *a: (count.append(1), decode(*a))[1])
    def interrupt(done, total): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): datasets.load_images(files, 8, tmp_path/"cache", interrupt)
    assert 0 < len(count) < len(files) and not list((tmp_path/"cache").glob("*.npy"))
    seen = []
    a = datasets.load_images(files, 8, tmp_path/"cache", lambda *o: seen.append(o))
    assert seen[0] == (2048, 2400) and len(count) == 2400
    b = datasets.load_images(files, 8, tmp_path/"other")
    assert np.array_equal(a.images, b.images) and np.array_equal(a.good, b.good) and a.bad == b.bad
    assert len(a.bad) == 600
    assert sorted(o.suffix for o in (tmp_path/"cache").glob("[!.]*")) == [".json", ".npy"]
