"""Ablation: every grid on the same number of images, odd recipes, interrupted and mixed-up folders; a noised labeling
teacher; loggers."""
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from noisy_student.ablation import ablate, ablation_table, n_images, same_images, variants
from noisy_student.datasets import digits
from noisy_student.learner import Noise
from noisy_student.models import load_tensors
from noisy_student.pseudo_labels import read_selection
from noisy_student.recipes import RECIPES, get_recipe
from noisy_student.rounds import NoisyStudent

TINY = dict(archs=("resnet9_4",), rounds=1, epochs=1, teacher_epochs=2, steps=6, bs=16, ratio=2, size=8, threshold=.01,
            noise=Noise(1, 3, .1, .95))


pytestmark = [pytest.mark.usefixtures("one_thread", "no_page")]


def miniature(seed=0):
    d = digits(seed=seed)
    return replace(d, unlabeled=d.unlabeled[:80], test=d.test[:60])


def quiet(*_): pass


@pytest.mark.parametrize("name", RECIPES)
def test_any_recipe(name):
    """Whatever the recipe: a variant differs from it, is a valid recipe, and sees as many images, within an epoch per
    training."""
    full = get_recipe(name, **({} if RECIPES[name].archs else dict(archs=("resnet18", "resnet34"))),
                      **({} if RECIPES[name].ratio else dict(steps=100)))
    grid, skipped = variants(full)
    assert len(grid) + len(skipped) == 13 and not set(grid) & set(skipped) and "supervised-no-noise" in grid
    total = n_images(full, 4000)
    for k, change in grid.items():
        r = same_images(full, change, 4000)
        epoch = max(1, r.rounds) * (r.steps or -(-4000 // r.bs)) * r.bs * (1 + (r.ratio or 0))
        assert r != full and abs(n_images(r, 4000) - total) <= epoch / 2, k


def test_the_first_teacher_stays():
    "Noise is taken from the students alone, also where the recipe says that the teacher is noised like them."
    full = get_recipe("default", archs=("resnet18",))
    assert full.teacher_noise is None
    for k in ("no-noise", "no-dropout"): assert same_images(full, variants(full)[0][k], 100).teacher_noise == full.noise


def test_paired_differences():
    rng = np.random.default_rng(0)
    runs = pd.DataFrame([dict(variant=v, changes="", seed=s, valid_accuracy=.5, test_accuracy=rng.random(), images=1,
                              seconds=1.)
                         for v in ("full", "a", "b") for s in range(5)])
    t = ablation_table(runs).set_index("variant")
    wide = runs.pivot(index="seed", columns="variant", values="test_accuracy")
    for v in ("a", "b"):
        assert t.difference[v] == pytest.approx((wide[v] - wide.full).mean())
        assert t.difference_std[v] == pytest.approx((wide[v] - wide.full).std(ddof=1))
    mixed = runs.sample(frac=1, random_state=1).sort_values("variant", key=lambda o: o != "full", kind="stable")
    assert ablation_table(mixed).set_index("variant").difference["a"] == pytest.approx(t.difference["a"])


def test_interrupted_and_gone_on_with(tmp_path):
    """Stopped in the middle, it goes on, and the table is that of a run in one go; another recipe in the same folder is
    refused."""
    calls = []
    def stop(stage, done, total):
        calls.append(stage)
        if stage.startswith("no-filter, seed 0: round 1: training") and done == 4: raise KeyboardInterrupt
    def go(out, **more):
        return ablate(miniature, tmp_path / out, "digits", ["no-filter"], [0, 1], progress=more.pop("progress", quiet),
                      **{**TINY, **more})
    with pytest.raises(KeyboardInterrupt): go("a", progress=stop)
    assert len(pd.read_csv(tmp_path / "a" / "runs.csv")) == 1 # the full recipe's
    pd.testing.assert_frame_equal(go("a").drop(columns="seconds"), go("b").drop(columns="seconds"))
    assert not any("no-filter" in o and "round 0: training" in o for o in calls) # the teacher is shared
    with pytest.raises(ValueError, match="other settings"): go("a", lr=1e-3)


def test_mistakes(tmp_path):
    def go(only=None, **more):
        ablate(miniature(), tmp_path / "x", **{"recipe": "digits", "only": only, "progress": quiet, **TINY, **more})
    for saying, args in (("did you mean no-noise", dict(only=["no-nose"])), ("no balancing", dict(only=["no-balance"])),
                         ("choose another name", dict(only=dict(full={}))),
                         ("epochs cannot be varied", dict(only=dict(long=dict(epochs=9)))),
                         ("unknown setting 'depth'", dict(only=dict(a=dict(depth=2)))),
                         ("no student", dict(rounds=0)), ("each of them once", dict(seeds=[1, 1])),
                         ("at least one seed", dict(seeds=[])),
                         ("names no architectures", dict(recipe="default", archs=()))):
        with pytest.raises(ValueError, match=saying): go(**args)
    assert not (tmp_path / "x").exists() # nothing was begun


def test_noised_teacher_labels_otherwise_and_repeatably(tmp_path):
    data, settings = miniature(), {k: v for k, v in TINY.items() if k != "archs"}
    strong = {**settings, "noise": Noise(2, 20, .5, .5)}
    def labels(name, **more):
        ns = NoisyStudent(data, "resnet9_4", tmp_path / name, recipe="digits", progress=quiet, **{**strong, **more})
        ns.fit()
        return read_selection(ns.path / "round_1" / "selected.parquet"), ns
    (plain, _), (a, ns), (b, _) = labels("plain"), labels("a", noised_teacher=True), labels("b", noised_teacher=True)
    def table(s): return pd.Series(list(s.probs), index=s.items).sort_index()
    assert all((x == y).all() for x, y in zip(table(a), table(b)))
    both = table(a).index.intersection(table(plain).index)
    assert np.mean([np.abs(table(a)[i] - table(plain)[i]).max() > .01 for i in both]) > .5
    teacher, weights = ns.labeling.teacher(0), load_tensors(ns.path / "round_0" / "model.safetensors")[0]
    state = teacher.model.state_dict()
    assert all(torch.equal(state[k].cpu(), v) for k, v in weights.items()) # labeling with noise moved no statistic
    before = torch.random.get_rng_state()
    x = teacher.dls.clean_view(data.unlabeled.images[:8])
    assert torch.equal(teacher.model(x), teacher.model(x))
    assert not torch.allclose(teacher.model(x), ns.learner(0).model.eval()(x))
    assert torch.equal(before, torch.random.get_rng_state())


def test_tensorboard(tmp_path):
    "fastai's own callback: scalars and a picture of every round, and a training that comes out as without it."
    pytest.importorskip("tensorboard")
    from fastai.callback.tensorboard import TensorBoardCallback
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    settings = {k: v for k, v in TINY.items() if k != "archs"}
    def fit(name, cbs=None, **more):
        return NoisyStudent(miniature(), "resnet9_4", tmp_path / name, recipe="digits", progress=quiet, cbs=cbs,
                            **settings, **more).fit()
    fit("plain")
    fit("logged", lambda k, folder: [TensorBoardCallback(folder / "board", trace_model=False)])
    for k in (0, 1):
        a, b = (load_tensors(tmp_path / o / f"round_{k}" / "model.safetensors")[0] for o in ("plain", "logged"))
        assert all(torch.equal(a[n], b[n]) for n in a)
        log = EventAccumulator(str(tmp_path / "logged" / f"round_{k}" / "board")); log.Reload()
        history = pd.read_csv(tmp_path / "logged" / f"round_{k}" / "history.csv")
        assert [o.value for o in log.Scalars("accuracy")] == pytest.approx(history.valid_accuracy.tolist(), abs=1e-6)
        assert len(log.Images("Sample results")) >= 1
    # every optimizer
    fit("rms", lambda k, folder: [TensorBoardCallback(folder / "board", trace_model=False)], optimizer="rmsprop",
        lr_per=None)
