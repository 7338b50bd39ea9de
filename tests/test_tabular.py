"Tables: swap noise, preprocessing that sees no held-out row, runs that resume, and mistakes that are named."
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.block import CategoryBlock, RegressionBlock
from fastai.data.transforms import Normalize
from fastai.tabular.core import Categorify, FillMissing
from fastai.tabular.data import TabularDataLoaders

from noisy_student.models import load_tensors
from noisy_student.pseudo_labels import read_selection
from noisy_student.tabular import (FillMedian, TabularNoise, TabularNoisyStudent, TabularRecipe, swap_noise,
                                   tabular_noisy_student_learner)

torch.set_num_threads(1)
SMALL = TabularRecipe(rounds=2, epochs=2, steps=5, bs=8, ratio=2, threshold=0.)


def table(n=120, known=50, seed=0):
    "Two columns that decide the class, one with gaps, one of categories; the target is missing from `known` on."
    rng = np.random.default_rng(seed)
    kind = rng.choice(["no", "yes"], n)
    df = pd.DataFrame(dict(a=rng.normal(size=n) + 3 * (kind == "yes"), b=rng.normal(size=n),
                           c=np.where(rng.random(n) < 0.8, np.where(kind == "yes", "x", "y"), "z"), y=kind))
    df.loc[rng.random(n) < 0.1, "b"] = np.nan
    df.loc[known:, "y"] = None
    return df


def student(path, df=None, **kwargs):
    args = dict(layers=[[8], [12]], cat_names=["c"], cont_names=["a", "b"], valid_idx=range(20), recipe=SMALL, seed=1)
    return TabularNoisyStudent(table() if df is None else df, "y", path, **(args | kwargs))


def outcome(path):
    weights = [load_tensors(path/f"round_{k}"/"model.safetensors")[0] for k in range(3)]
    return pd.read_csv(path/"summary.csv").drop(columns="seconds"), weights


def same(a, b):
    pd.testing.assert_frame_equal(a[0], b[0])
    for v, w in zip(a[1], b[1]): assert v.keys() == w.keys() and all(torch.equal(v[k], w[k]) for k in v)


# noise

@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_swap_keeps_columns_and_rate(dtype):
    torch.manual_seed(0)
    x = (torch.arange(64)[:, None] + 100 * torch.arange(5)).to(dtype)
    many = torch.stack([swap_noise(x, 0.25) for _ in range(400)])
    assert many.dtype == dtype and (many // 100 == (x // 100)).all()
    assert abs((many != x).float().mean() - 0.25) < 0.01
    counts = torch.stack([(many[:, :, 0] == i).sum() for i in range(64)]) / 400
    assert abs(counts.mean() - 1) < 1e-6 and (counts - 1).abs().max() < 0.2  # every value as often as before
    steps = (many - x)[many != x].long() % 64
    shares = torch.bincount(steps, minlength=64)[1:] / len(steps)
    assert (steps > 0).all() and (shares * 63 - 1).abs().max() < 0.2  # any other row is as likely as the next


def learner(bs=16, noise=TabularNoise(0.5, 0.3), **kwargs):
    df = table(known=120).fillna(dict(b=0.))
    dls = TabularDataLoaders.from_df(df, procs=[Categorify, Normalize], cat_names=["c"], cont_names=["a", "b"],
                                     y_names="y", y_block=CategoryBlock(), valid_idx=range(40), bs=bs, device="cpu")
    torch.manual_seed(0)
    return tabular_noisy_student_learner(dls, [8], noise, **kwargs)


def test_noise_in_training_only():
    class Watch(Callback):
        order = 10  # after the noise
        def before_fit(self): self.seen = []
        def before_batch(self): self.seen.append((self.training, [o.clone() for o in self.xb], self.yb[0].clone()))
    learn, watch = learner(bs=80), Watch()
    learn.dls.train.shuffle = False
    clean = [dl.one_batch() for dl in learn.dls]
    with learn.no_bar(), learn.no_logging(): learn.fit(3, 1e-2, cbs=watch)
    assert [t for t, *_ in watch.seen] == [True, False] * 3
    for training, xb, yb in watch.seen:
        assert torch.equal(yb, clean[not training][2])
        for x, c in zip(xb, clean[not training]):
            assert x.dtype == c.dtype and torch.equal(x, c) == (not training)
            if training: assert all(set(x[:, j].tolist()) <= set(c[:, j].tolist()) for j in range(x.shape[1]))
    assert not any(m._forward_pre_hooks for m in learn.model.modules())  # dropout is gone
    with learn.no_bar(): a, b = (learn.get_preds()[0] for _ in range(2))
    assert torch.equal(a, b)


def test_mistakes_of_noise_are_named():
    for bad in (dict(swap=1.), dict(swap=-0.1), dict(dropout=1.)):
        with pytest.raises(ValueError, match=r"\[0, 1\)"): TabularNoise(**bad)
    with pytest.raises(ValueError, match="at least 2 rows"): swap_noise(torch.zeros(1, 3), 0.1)
    df = table(known=120).assign(y=lambda o: o.a)
    dls = TabularDataLoaders.from_df(df[["a", "y"]], procs=[Normalize], cont_names=["a"], y_names="y",
                                     y_block=RegressionBlock(), bs=16)
    with pytest.raises(ValueError, match="y is not categorical"): tabular_noisy_student_learner(dls)


def test_no_noise_is_fastai():
    from fastai.tabular.learner import tabular_learner
    ours = learner(noise=TabularNoise.none())
    torch.manual_seed(0)
    theirs = tabular_learner(ours.dls, [8], n_out=2)
    for learn in (ours, theirs):
        learn.dls.train.rng.seed(0); np.random.seed(0); torch.manual_seed(0)
        with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2)
    for a, b in zip(ours.model.parameters(), theirs.model.parameters()): torch.testing.assert_close(a, b)


# runs

def test_held_out_rows_fit_nothing(tmp_path):
    df, test = table(), table(30, 30, seed=1)
    a = student(tmp_path/"a", df, test=test)
    other = df.copy()
    other.loc[:19, ["a", "b"]] *= 1000
    other.loc[:19, "c"] = "new"
    b = student(tmp_path/"b", other, test=test.assign(a=1e6, c="newer"))
    pd.testing.assert_frame_equal(a.dls.train_ds.items, b.dls.train_ds.items)
    pd.testing.assert_frame_equal(a.task.loaders.pool.items, b.task.loaders.pool.items)
    # means are those of all rows that train, the pool included, and the target has no part in it
    train = df.iloc[20:]
    scaled = (train.a[:30] - train.a.mean()) / (train.a.std(ddof=0) + 1e-7)
    np.testing.assert_allclose(a.dls.train_ds.items.a, scaled, rtol=1e-6)
    flipped = student(tmp_path/"c", df.assign(y=df.y.map(dict(no="yes", yes="no"))))
    pd.testing.assert_frame_equal(a.task.loaders.pool.items.drop(columns="y"),
                                  flipped.task.loaders.pool.items.drop(columns="y"))


def test_run_resumes_and_repeats(tmp_path):
    test = table(40, 40, seed=1)
    summary = student(tmp_path/"a", test=test).fit()
    assert list(summary.role) == ["teacher", "student", "student"] and list(summary.pseudo_labeled) == [0, 70, 70]
    assert list(summary.arch) == ["[8]", "[12]", "[12]"] and summary.test_accuracy.between(0, 1).all()
    expected = outcome(tmp_path/"a")
    student(tmp_path/"b", test=test).fit()
    same(expected, outcome(tmp_path/"b"))
    labels = (tmp_path/"a"/"round_1"/"selected.parquet").read_bytes()

    class Stop(Exception): pass
    for n in (2, 16):
        calls = []
        def progress(*a):
            calls.append(a)
            if len(calls) == n: raise Stop
        path = tmp_path/f"stopped{n}"
        with pytest.raises(Stop): student(path, test=test, progress=progress).fit()
        student(path, test=test).fit()
        same(expected, outcome(path))
        assert (path/"round_1"/"selected.parquet").read_bytes() == labels


def test_soft_labels_reach_the_student(tmp_path):
    run = student(tmp_path/"a")
    run.fit()
    selection = read_selection(tmp_path/"a"/"round_1"/"selected.parquet")
    learn = run.task.start(1, selection, TabularNoise.none())
    cats, conts, y = learn.dls.train.one_batch()
    assert y.shape == (24, 2) and len(cats) == len(conts) == 24 and cats.dtype == torch.int64
    assert set(y[:8].flatten().tolist()) == {0., 1.} and not set(y[8:].flatten().tolist()) <= {0., 1.}
    soft = {tuple(np.float32(o)) for o in selection.probs}
    assert all(tuple(o.numpy()) in soft for o in y[8:])
    # and each goes with its own row: the teacher gives it that label
    teacher = run.learner(0).model.eval()
    with torch.no_grad(): probs = teacher(cats[8:], conts[8:]).softmax(1)
    np.testing.assert_allclose(probs, y[8:], atol=1e-3)


def test_trained_learner_is_fastais(tmp_path):
    test = table(40, 40, seed=1)
    run = student(tmp_path/"a", test=test)
    summary = run.fit()
    learn = run.learner()
    with learn.no_bar(), learn.no_logging():
        probs, targs = learn.get_preds(dl=learn.dls.test_dl(test))
        row, label, p = learn.predict(test.iloc[0])
    right = (np.array(["no", "yes"])[probs.argmax(1)] == test.y.to_numpy()).mean()
    assert right == summary.test_accuracy[run.best] and learn.dls.vocab[label] in ("no", "yes")
    np.testing.assert_allclose(p, probs[0], atol=1e-6)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)  # goes on from there
    assert "rows" in [ax.get_ylabel() for ax in run.report().axes]


def test_other_configurations_are_refused(tmp_path):
    student(tmp_path/"a").fit()
    def refused(match, **kwargs):
        with pytest.raises(ValueError, match=match): student(tmp_path/"a", **kwargs).fit()
    refused("seed: 1 there, 2 here", seed=2)
    refused("layers", layers=[[8], [16]])
    refused("noise.swap: 0.15 there, 0.5 here", recipe=replace(SMALL, noise=TabularNoise(swap=0.5)))
    refused(r"data.unlabeled: 70 rows \(.*\) there, 60 rows", df=table().iloc[:110])
    refused("procs", procs=[FillMedian, Categorify])
    assert len(student(tmp_path/"a", recipe=replace(SMALL, rounds=3)).fit()) == 4


@pytest.mark.parametrize("change, message", [
    (dict(df=table().drop(columns="y")), "no column y"), (dict(valid_idx=[]), "valid_idx is empty"),
    (dict(valid_idx=[100]), "whose y is known"), (dict(cont_names=["a", "c"]), "continuous column c"),
    (dict(cont_names=["a", "d"]), "no column d"), (dict(cat_names=[], cont_names=[]), "no column to learn from"),
    (dict(layers=[]), "layers"), (dict(df=table(50)), "no unlabeled rows"), (dict(valid_idx=range(50)), "no row that"),
    (dict(procs=[FillMedian]), "add Categorify"), (dict(procs=[Categorify, Normalize]), "b has missing .* FillMedian"),
    (dict(test=table(9, 9).assign(y="maybe")), "test rows have a class .*: maybe"),
    (dict(df=table().assign(y=lambda o: o.y.where(o.y.isna(), "no"))), "1 class of y, no"),
    (dict(df=table().assign(y=["no", "yes", *[None] * 118]), valid_idx=None), "too few")])
def test_mistakes_are_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=message): student(tmp_path/"a", **change)
    assert not (tmp_path/"a").exists()


@pytest.mark.filterwarnings("ignore")
def test_fastais_fill_missing_works_or_is_named(tmp_path):
    try: run = student(tmp_path/"a", procs=[FillMissing, Categorify, Normalize])
    except ValueError as e: assert "pandas 3" in str(e)
    else: assert run.dls.train_ds.items.b.notna().all()


def test_frames_of_many_kinds(tmp_path):
    df = table(120, 50)
    two = student(tmp_path/"two", df[:50], unlabeled=df[50:].drop(columns="y"))  # the same pool as a second frame
    a, b = (o.task.loaders.pool.items.drop(columns="y") for o in (student(tmp_path/"one", df), two))
    pd.testing.assert_frame_equal(a, b, check_dtype=False)
    numbers = df.assign(y=df.y.map(dict(no=3, yes=7)), d=np.arange(120) % 2 == 0)  # numbers as classes, no names given
    run = student(tmp_path/"numbers", numbers, cat_names=None, cont_names=None, valid_idx=None)
    assert set(run.data.cat_names) == {"c", "d"} and set(run.data.cont_names) == {"a", "b"}
    assert len(run.data.valid) == 10
    run.fit()
    small = student(tmp_path/"small", layers=[[12], [8]])
    with pytest.warns(UserWarning, match="smaller than its teacher"): small.fit()
