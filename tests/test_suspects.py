"Suspect labels: degenerate tables, cleanlab as a peer, tables that do not belong together."
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from noisy_student.datasets import ImageFileError
from noisy_student.pseudo_labels import PseudoLabelError, predict_pseudo_labels
from noisy_student.suspects import flipped_labels, rank_suspects, show_suspects

torch.set_num_threads(1)


class Fixed(torch.nn.Module):
    "Gives the logits that are written in the first pixels of the image, times a factor; the first one with a bias."
    def __init__(self, k, factor=1., bias=0.):
        super().__init__()
        self.k, self.factor = k, factor
        self.register_buffer("bias", torch.eye(k)[0] * bias)
    def forward(self, x): return x.flatten(1)[:, :self.k] * 255 / 16 * self.factor + self.bias


def coded(logits):  # int 0..255 (n, k) -> images for Fixed
    return np.asarray(logits, dtype=np.uint8)[:, None, :, None]


def random_pool(n=300, k=4, seed=0): return coded(np.random.default_rng(seed).integers(0, 256, (n, k)))


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 12),
       st.sampled_from([np.float16, np.float32, np.float64]), st.booleans())
def test_any_table(seed, k, n, dtype, hard):
    "Every image once, in order of quality, whatever classes are absent, single, or never predicted."
    pytest.importorskip("cleanlab")
    rng = np.random.default_rng(seed)
    probs = np.eye(k)[rng.integers(0, k, n)] if hard else rng.dirichlet(np.full(k, .3), n)
    labels = rng.integers(0, k, n)
    table = rank_suspects(labels, probs.astype(dtype))
    assert list(table) == ["position", "label", "predicted", "quality", "issue", "probability"]
    assert sorted(table.position) == list(range(n)) and table.issue.dtype == bool
    assert table.quality.between(0, 1).all() and table.quality.is_monotonic_increasing
    assert (table.label == labels[table.position]).all()
    for _, same in table.groupby("quality"): assert same.position.is_monotonic_increasing


def test_cleanlab_agrees():
    filters, rank = pytest.importorskip("cleanlab.filter"), pytest.importorskip("cleanlab.rank")
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 5, 500)
    labels = np.where(rng.random(500) < .1, rng.integers(0, 5, 500), truth)
    probs = rng.dirichlet(np.ones(5), 500) * .5; probs[np.arange(500), truth] += .5
    table = rank_suspects(labels, probs)
    ranked = filters.find_label_issues(labels, probs, n_jobs=1, return_indices_ranked_by="normalized_margin")
    assert table.position[table.issue].tolist() == ranked.tolist()
    quality = rank.get_label_quality_scores(labels, probs, method="normalized_margin")
    np.testing.assert_allclose(table.quality, quality[table.position])
    wrong = labels != truth
    assert wrong[table.position[:wrong.sum()]].mean() > .9


def test_two_classes():
    pytest.importorskip("cleanlab")
    p = np.r_[np.full(20, .9), np.full(20, .1)]
    labels = (p < .5).astype(int); labels[[3, 30]] ^= 1
    table = rank_suspects(labels, np.stack([p, 1 - p], 1))
    assert set(table.position[:2]) == {3, 30} and set(table.position[table.issue]) == {3, 30}
    assert table.predicted[:2].tolist() == (1 - table.label[:2]).tolist()


half = np.full((2, 2), .5)


@pytest.mark.parametrize("labels, probs, text", [
    ([0, 1], np.full((3, 2), .5), "do not fit"), ([0, 1], [.5, .5], "do not fit"),
                                                 ([], np.ones((0, 2)), "at least one"),
    ([0, 2], half, "0..1"), ([-1, 0], half, "0..1"), ([0., 1.], half, "whole numbers"),
    ([0, 1], half * np.nan, "sum to 1"), ([0, 1], [[2, -1], [.5, .5]], "sum to 1"), ([0, 1], half * 3, "softmax")])
def test_mistakes(labels, probs, text):
    pytest.importorskip("cleanlab")
    with pytest.raises(ValueError, match=text): rank_suspects(np.array(labels), probs)


def test_without_cleanlab(monkeypatch):
    for name in [o for o in sys.modules if o.split(".")[0] == "cleanlab"]: monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cleanlab", None)
    with pytest.raises(ImportError, match=r"pip install cleanlab"):
        rank_suspects(np.array([0]), np.ones((1, 1)))


def test_where_the_classifier_alone_is_trained_suspects_are_found_by_it(tmp_path):
    "Of each label by a classifier that has not seen it, in seconds; a class of one image is no error."
    pytest.importorskip("cleanlab")
    from noisy_student.models import create_model, save_weights
    from noisy_student.datasets import Split, Splits
    from noisy_student.rounds import NoisyStudent
    rng = np.random.default_rng(0)
    def images(labels):
        color = 80 * np.eye(3, dtype=int)[labels][:, None, None]
        return (rng.integers(0, 30, (len(labels), 12, 12, 3)) + color).astype(np.uint8)
    true = np.array([0, 1] * 20 + [2])
    given = true.copy()
    given[[4, 7]] = 1 - true[[4, 7]]
    pool = images(rng.integers(0, 2, 30))
    data = Splits(Split(images(true), given), Split(pool), Split(images(true[:12]), true[:12]), None, ["a", "b", "c"])
    weights = save_weights(create_model("resnet9_4", 3, 3), tmp_path/"w.safetensors")
    ns = NoisyStudent(data, "resnet9_4", tmp_path/"r", pretrained=str(weights), rounds=1, head_rounds=2, threshold=0.,
                      size=12, force=True, progress=lambda *_: None)
    ns.fit()
    found = ns.suspects(0)
    assert set(found[found.kind == "labeled"].item[:2]) == {4, 7}
    assert not list((tmp_path/"r"/"suspects").rglob("checkpoint"))  # nothing was trained


def test_flips_as_pandas_finds_them(tmp_path):
    pool = random_pool()
    a = predict_pseudo_labels(Fixed(4), pool, tmp_path / "a", classes="abcd")
    b = predict_pseudo_labels(Fixed(4, .5), pool, tmp_path / "b", classes="abcd")
    assert len(flipped_labels(a, b)) == 0  # half the logits: less sure, but of the same classes
    biased = Fixed(4, .5, bias=3.)  # turns some
    for s in range(3):
        predict_pseudo_labels(biased, pool, tmp_path / "c", classes="abcd", shard=s, num_shards=3, part_size=40)
    table = flipped_labels(a, tmp_path / "c")
    x, y = (pd.read_parquet(tmp_path / o).set_index("item").sort_index() for o in "ac")
    assert set(table.item) == set(x.index[x.label != y.label]) and 20 < len(table) == table.item.nunique() < 280
    assert table.confidence_after.is_monotonic_decreasing
    for row in table.itertuples():
        assert (row.label_before, row.label_after) == ("abcd"[x.label[row.item]], "abcd"[y.label[row.item]])
        assert (row.confidence_before, row.confidence_after) == (x.confidence[row.item], y.confidence[row.item])
    names = [f"it's {i:03d}.png" for i in range(300)]
    for o, teacher in dict(d=Fixed(4), e=biased).items():
        predict_pseudo_labels(teacher, pool, tmp_path / o, names=names, classes="abcd")
    assert flipped_labels(tmp_path / "d", tmp_path / "e").item.tolist() == [names[i] for i in table.item]


def test_what_does_not_belong_together(tmp_path):
    pool = random_pool()
    tables = dict(a=(pool, "abcd"), other=(random_pool(seed=1), "abcd"), words=(pool, "wxyz"))
    for name, (images, classes) in tables.items():
        predict_pseudo_labels(Fixed(4), images, tmp_path / name, classes=classes)
    predict_pseudo_labels(Fixed(4, 2.), pool, tmp_path / "half", classes="abcd", shard=0, num_shards=2)
    wrong = dict(other="different pools", words="must be the same", half="missing", nowhere="no such file or folder")
    for name, text in wrong.items():
        with pytest.raises(PseudoLabelError, match=text): flipped_labels(tmp_path / "a", tmp_path / name)
    file = next((tmp_path / "a").glob("*.parquet"))
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(PseudoLabelError, match="part-00000"): flipped_labels(tmp_path / "a", tmp_path / "words")


def test_pictures(tmp_path):
    import matplotlib
    matplotlib.use("Agg")
    table = pd.DataFrame(dict(position=[2, 0, 1], label=[0, 1, 0], predicted=[1, 0, 0], issue=[True, False, False]))
    images = np.stack([np.full((5, 5, 3), 80 * i, np.uint8) for i in range(3)])
    fig = show_suspects(table, images, ["cat", "dog"], n=2)
    titles = [ax.get_title() for ax in fig.axes]
    assert titles == ["cat → dog", "dog → cat"] and fig.axes[0].title.get_color() == "tab:red"
    assert (fig.axes[0].images[0].get_array() == 160).all()
    for i, img in enumerate(images): Image.fromarray(img).resize((40, 30)).save(tmp_path / f"{i}.png")
    files = [str(tmp_path / f"{i}.png") for i in range(3)]
    assert len(show_suspects(table, files, ["cat", "dog"]).axes) == 3
    assert show_suspects(table, images[..., :1], ["cat", "dog"]).axes[0].images[0].get_array().shape == (5, 5)
    (tmp_path / "2.png").write_text("no picture")
    with pytest.raises(ImageFileError, match="2.png"): show_suspects(table, files, ["cat", "dog"])
    with pytest.raises(ValueError, match="nothing to show"): show_suspects(table[:0], files, ["cat", "dog"])
    matplotlib.pyplot.close("all")
