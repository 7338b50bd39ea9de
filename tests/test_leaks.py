"Leaks: what is planted is found and left out, nothing else changes; degenerate images; memory."
import io
import json
import tracemalloc
import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from hypothesis import given, settings, strategies as st

from noisy_student.leaks import dct_low, find_leaks
from test_rounds import SETTINGS, miniature

ONE = {**SETTINGS, "rounds": 1, "epochs": 1, "teacher_epochs": 2}


def smooth(n, size=32, seed=0, colors=3):
    "Random pictures with large structures, as photographs have."
    rng = np.random.default_rng(seed)
    waves = np.cos(np.pi * np.arange(6)[:, None] * (2 * np.arange(size) + 1) / (2 * size))
    x = np.einsum("ncuv,ui,vj->nijc", rng.normal(size=(n, colors, 6, 6)), waves, waves)
    return np.clip(128 + 20 * x + rng.normal(size=x.shape) * 4, 0, 255).astype(np.uint8)


def saved_again(image, quality):
    file = io.BytesIO()
    Image.fromarray(image.squeeze()).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file)).reshape(image.shape)


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(0, 40), st.sampled_from([1, 2, 5, 8, 33]),
       st.sampled_from([1, 3]))
def test_identical_images_are_those_with_equal_pixels(seed, n, m, size, colors):
    "Whatever the number and size: two gray levels make coincidences likely."
    rng = np.random.default_rng(seed)
    a, b = (np.repeat(rng.integers(0, 2, (k, 1, 1, colors)), size, 1).repeat(size, 2).astype(np.uint8) * 200
            for k in (n, m))
    if size > 1 and n: a[0, 0, 0] ^= 1
    found = find_leaks(a, b)
    others = {o.tobytes() for o in b}
    assert found[found.kind == "identical"].position.tolist() == [i for i in range(n) if a[i].tobytes() in others]
    assert all(np.array_equal(a[o.position], b[o.other]) for o in found[found.kind == "identical"].itertuples())


@pytest.mark.parametrize("quality", [95, 75, 50])
def test_saved_again_is_found_with_its_partner(quality):
    test = smooth(300)
    pool = np.concatenate([smooth(1000, seed=1), np.stack([saved_again(o, quality) for o in test])])
    found = find_leaks(pool, test)
    assert (found.position >= 1000).all() and (found.position - 1000 == found.other).all()
    assert len(found) >= 297 and (found.kind == "re-encoded").mean() > .99


def test_gray_copies_of_color_images_are_found():
    test = smooth(50)
    gray = np.stack([np.asarray(Image.fromarray(o).convert("L")) for o in test])[..., None]
    found = find_leaks(gray, test)
    assert found.other.tolist() == list(range(50)) and set(found.kind) == {"re-encoded"}


def test_images_without_contrast_raise_no_alarm():
    rng = np.random.default_rng(0)
    nearly_flat = (np.full((400, 16, 16, 3), 120) + rng.integers(-2, 3, (400, 16, 16, 3))).astype(np.uint8)
    assert not len(find_leaks(nearly_flat[:200], nearly_flat[200:]))
    assert len(find_leaks(np.zeros((3, 8, 8, 1), np.uint8), np.zeros((2, 8, 8, 1), np.uint8))) == 3


def test_memory_does_not_grow_with_the_pool():
    test, pool = smooth(500), np.concatenate([smooth(500, seed=s) for s in range(8)])
    peaks = []
    for part in (pool[:1000], pool):
        tracemalloc.start()
        find_leaks(part, test)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 2 * peaks[0] and dct_low(pool).nbytes == 4000 * 64 * 4


def planted():
    """The miniature, with three test digits in its pool, one validation digit among its labels, and one test digit
    saved again."""
    data = miniature()
    pool, labeled = data.unlabeled.images.copy(), data.labeled.images.copy()
    pool[[5, 50, 150]], pool[100], labeled[3] = data.test.images[[7, 8, 9]], saved_again(data.test.images[20],
                                                                                         95), data.valid.images[4]
    return replace(data, unlabeled=replace(data.unlabeled, images=pool), labeled=replace(data.labeled, images=labeled))


def fit(data, path, **settings):
    from noisy_student.rounds import NoisyStudent
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run = NoisyStudent(data, "resnet9_4", path, **{**ONE, **settings})
        run.fit()
    return run, [str(o.message) for o in seen]


def test_leaks_of_arrays_are_left_out_before_labeling(tmp_path):
    data = planted()
    run, said = fit(data, tmp_path / "a", threshold=0., per_class=None)
    assert any("3 unlabeled images are also test images (number 5 = number 7, ...): left out of the pool" in o
               for o in said)
    assert any("1 labeled image is also a validation image (number 3 = number 4)" in o for o in said)
    assert any("1 unlabeled image looks like a re-encoded test image (number 100 = number 20)" in o for o in said)
    gone = [5, 50, 150]
    for table in ("pseudo_labels", "selected.parquet"):
        items = pd.read_parquet(run.path / "round_1" / table).item
        assert sorted(items) == [i for i in range(200) if i not in gone]  # positions are those of the given array
    skipped = pd.read_csv(run.path / "skipped.csv")
    assert skipped.item.tolist() == gone and (skipped.reason.str.startswith("also a test image")).all()
    page = (run.path / "report.html").read_text()
    assert "left out of the pool" in page and "Images in two splits" in page
    again, silent = fit(data, tmp_path / "a", threshold=0., per_class=None, rounds=2)  # goes on, and knows
    assert len(again.summary) == 3 and not any("also test" in o for o in silent)
    assert not set(gone) & set(pd.read_parquet(run.path / "round_2" / "pseudo_labels").item)


def test_without_leaks_nothing_changes(tmp_path):
    from noisy_student.files import unsealed
    run, said = fit(miniature(), tmp_path / "a")
    assert unsealed(run.path / "leaks.json") == dict(searched=["labeled", "unlabeled"], found=[])
    assert not (run.path / "skipped.csv").exists() and not any("also" in o for o in said)
    assert sorted(pd.read_parquet(run.path / "round_1" / "pseudo_labels").item) == list(range(200))


def test_labels_made_on_the_fly_and_elsewhere_are_without_leaks(tmp_path):
    fly, _ = fit(planted(), tmp_path / "fly", on_the_fly=True, threshold=0, per_class=None, temperature=1.)
    assert fly.summary.pseudo_labeled.tolist() == [0, 197]
    from noisy_student.pseudo_labels import predict_pseudo_labels, select_pseudo_labels
    data = planted()
    predict_pseudo_labels(fly.learner(0), data.unlabeled, tmp_path / "labels")
    select_pseudo_labels(tmp_path / "labels", tmp_path / "s.parquet", threshold=0., per_class=None)
    given, _ = fit(data, tmp_path / "given", rounds=0, pseudo_labels=tmp_path / "s.parquet")
    assert given.summary.pseudo_labeled.tolist() == [197]


def test_a_test_file_in_the_unlabeled_folder(tmp_path):
    "Byte by byte the same under another name, and saved again; an unreadable file is between them."
    from noisy_student.datasets import from_folder
    rng = np.random.default_rng(0)
    images = smooth(60, size=24)
    for part, n in (("train", 6), ("valid", 4), ("test", 4)):
        for c in "ab":
            (tmp_path / "data" / part / c).mkdir(parents=True)
            for i in range(n):
                Image.fromarray(smooth(1, 24, rng.integers(1 << 30))[0]).save(tmp_path / "data" / part / c / f"{i}.png")
    pool, test = tmp_path / "data" / "unlabeled", tmp_path / "data" / "test"
    pool.mkdir()
    for i in range(10): Image.fromarray(images[i]).save(pool / f"p{i}.png")
    (pool / "p3.png").write_text("no image")
    (pool / "innocent.png").write_bytes((test / "a" / "1.png").read_bytes())
    Image.open(test / "b" / "2.png").save(pool / "photo.jpg", quality=85)
    run, said = fit(from_folder(tmp_path / "data"), tmp_path / "run", size=24, threshold=0., per_class=None, bf16=False)
    assert any("1 unlabeled image is also a test image (data/unlabeled/innocent.png = test/a/1.png): left out" in o or
               "unlabeled/innocent.png = test/a/1.png" in o for o in said)
    found = json.loads((run.path / "leaks.json").read_text())["found"]
    assert [(o["item"], o["other"], o["kind"]) for o in found] == [(str(pool / "innocent.png"),
                                                                    str(test / "a" / "1.png"), "identical"),
                                                                   (str(pool / "photo.jpg"), str(test / "b" / "2.png"),
                                                                    "re-encoded")]
    items = set(pd.read_parquet(run.path / "round_1" / "pseudo_labels").item)
    assert items == {str(o) for o in pool.iterdir()} - {str(pool / "innocent.png"), str(pool / "p3.png")}
    assert sorted(o.split("/")[-1] for o in pd.read_csv(run.path / "skipped.csv").item) == ["innocent.png", "p3.png"]
    run.opened.find_leaks()  # a later start knows it from the file
    assert list(run.opened.left_out().values()) == [f"also a test image: {test / 'a' / '1.png'}"]
