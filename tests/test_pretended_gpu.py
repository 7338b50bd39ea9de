"""What CUDA code does, watched without a GPU: it never mixes devices, and no training step and no labeled batch makes
the host wait. See pretended_gpu.py for what this can show and what it cannot: it is no GPU.

The laws marked `gpu` are the same on a real one, where PyTorch itself raises when it has to wait (`pytest -m gpu`).
"""
import contextlib, copy
from types import SimpleNamespace

import fastai.callback.progress  # noqa: F401, no_bar
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from pretended_gpu import CUDA, PretendedGPU, on_gpu
from torch import nn

from noisy_student.checkpoints import RunState
from noisy_student.dataloaders import PadCropFlip, ResizedCropFlip, mixed_dataloaders
from noisy_student.datasets import Split, Splits
from noisy_student.evaluation import evaluate_run
from noisy_student.fitting import fit_resumably, splitter
from noisy_student.label_table import read_metadata
from noisy_student.learner import Noise, noisy_student_learner
from noisy_student.mixup import MIXES
from noisy_student.models import create_model
from noisy_student.precision import Half, in_bf16
from noisy_student.pseudo_labels import PseudoLabelError, predict_pseudo_labels, read_selection, select_pseudo_labels
from noisy_student.randaugment import BatchRandAugment
from noisy_student.recipes import get_recipe
from noisy_student.resolution import accuracy_by_size, fix_resolution
from noisy_student.on_the_fly import AverageTeacher, TeacherTargets
from noisy_student.rounds import NoisyStudent, load_model
from noisy_student.tabular import TabularNoisyStudent, TabularRecipe
from noisy_student.teacher import Teacher
from noisy_student.training import EMA, optimizer

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
# bytes that a copy may have that is not from pinned memory: the driver takes so many at once
CLASSES, SMALL = list("abc"), 64 << 10
rng = np.random.default_rng(0)


def pictures(n): return rng.integers(0, 256, (n, 16, 16, 3), dtype=np.uint8)
def pile(n): return Split(pictures(n), rng.permutation(np.arange(n) % 3))


IMAGES, LABELS = pictures(48), np.arange(48) % 3
PROBS = rng.dirichlet(np.ones(3), 48).astype(np.float32)
DATA = Splits(pile(36), Split(pictures(40)), pile(18), pile(12), CLASSES)


@pytest.fixture
def gpu():
    with PretendedGPU() as g: yield g


class Real:
    "Where there is a GPU, PyTorch watches."
    @contextlib.contextmanager
    def no_waits(self):
        torch.cuda.set_sync_debug_mode("error")
        try: yield
        finally: torch.cuda.set_sync_debug_mode("default")


class Pretended:
    def __init__(self, gpu): self.gpu = gpu
    @contextlib.contextmanager
    def no_waits(self):
        before = len(self.gpu.events)
        yield
        seen = self.gpu.events[before:]
        assert not [str(o) for o in seen if o.kind == "wait"]
        for o in seen:  # images are pinned, the draws of a batch need not be
            most = 1024 if "dataloaders" in o.where or "pseudo_labels" in o.where else SMALL
            assert o.kind != "pageable" or int(o.what.split()[2]) <= most, str(o)


@pytest.fixture(params=["pretended", pytest.param("real", marks=pytest.mark.gpu)])
def watched(request):
    if request.param == "real":
        if not torch.cuda.is_available(): pytest.skip("there is no GPU")
        yield Real()
        torch.cuda.set_sync_debug_mode("default")
    else:
        with PretendedGPU() as g: yield Pretended(g)


class Steps(Callback):
    "Nothing waits from the second batch to the end of the last but one, the making of batches in between included"
    order = 200
    def __init__(self, watched): self.watched, self.seen = watched, 0
    def before_train(self): self.stack = contextlib.ExitStack()
    def after_batch(self):
        if not self.training: return
        if self.iter == 1: self.stack.enter_context(self.watched.no_waits())
        self.seen += self.iter > 1
        if self.iter == self.n_iter - 2: self.stack.close()


def learner(place="cuda", noise=Noise(2, 10, .2, .6), augment=PadCropFlip(2), arch="resnet9_4", free=None, fly=False,
            steps=5, opt="adamw", **kwargs):
    device = torch.device(place)
    dls = mixed_dataloaders((IMAGES, LABELS), (IMAGES[:8], LABELS[:8]), CLASSES, pseudo=(IMAGES, PROBS), bs=8,
                            steps=steps, stats=([.5] * 3, [.25] * 3), augment=[augment], device=device)
    if free is not None:
        for o in dls.train.dataset.parts: o.to(device, free)
    if fly is not False:
        dls.train.after_batch.add(TeacherTargets(create_model(arch, 3).to(device), dls.clean_view, 8, **fly))
    learn = noisy_student_learner(dls, arch, noise, opt_func=optimizer(opt, device), label_smoothing=.1, **kwargs)
    learn.model.to(device, memory_format=torch.channels_last)
    return learn


STUDENTS = {
    "bf16, average": dict(cbs=lambda: [EMA(.9)]),
    "no skipping, all operations": dict(noise=Noise(2, 10, .2, .6, "reference"), augment=ResizedCropFlip(.5)),
    "a draw per batch, folded weights": dict(noise=Noise(2, 10, .2, .6, "keras"), arch="resnet10t"),
    "images on the host": dict(free=0),
    "teacher on the fly": dict(fly={}),
    "average as teacher, by confidence": dict(fly=dict(threshold=.4, smoothing=0.),
                                              cbs=lambda: [EMA(.9), AverageTeacher()]),
    "average as teacher, by share": dict(fly=dict(share=.5), cbs=lambda: [EMA(.9), AverageTeacher()]),
    **{o: dict(cbs=lambda o=o: [MIXES[o]()]) for o in MIXES},
    "rmsprop": dict(opt="rmsprop"),
    "Nesterov momentum": dict(opt="sgd"),
}


@pytest.mark.parametrize("name", STUDENTS)
def test_training_step_never_waits(watched, name):
    kwargs = dict(STUDENTS[name])
    cbs, learn = kwargs.pop("cbs", list)(), learner(**kwargs)
    with in_bf16(learn.model, torch.device("cuda")), learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(1, 1e-3, cbs=[*cbs, steps := Steps(watched)])
    assert steps.seen == 3 and len(learn.recorder.losses) == 5
    assert all(o.device.type == "cpu" for o in learn.recorder.losses)
    assert all(o.is_cuda for o in learn.model.parameters())


@pytest.mark.parametrize("name", ["adamw", "rmsprop", "sgd"])
def test_float16_trains_as_fastai_does_and_waits_less(name):
    "Steps that overflow, the first ones here, are left out; a fused optimizer does it without asking"
    def train(cb):
        torch.manual_seed(0)
        with PretendedGPU(bf16=False) as gpu:
            learn, waits, seen = learner(opt=name, steps=8), [], []
            class Note(Callback):
                order = 200
                def after_batch(self):
                    if self.training: waits.append([str(o) for o in gpu.waits])
                    seen.append(self.learn.scaler._scale.clone())
            with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3, cbs=[cb(init_scale=2. ** 34), Note()])
            assert not {"grad_scale", "found_inf"} & set(vars(learn.opt.opt))
            return waits[-1][len(waits[0]):], [o.item() for o in seen], [o.detach().cpu().clone()
                                                                         for o in learn.model.parameters()]
    (ours, seen, weights), (_, expected, other) = train(Half), train(MixedPrecision)
    assert seen == expected and {2. ** 33, 2. ** 32} < set(seen)
    assert all(map(torch.equal, weights, other))
    assert all("grad_scaler" in o for o in ours) and bool(ours) == (name == "rmsprop"), ours


def test_progress_bar_does_not_wait_in_every_step(gpu, monkeypatch):
    monkeypatch.setattr("noisy_student.learner.time", SimpleNamespace(monotonic=lambda: 0.))  # no half second passes
    learn, count = learner(), []
    class Note(Callback):
        order = 200
        def after_batch(self):
            if self.training: count.append(len(gpu.waits))
    learn.fit(1, 1e-3, cbs=Note())
    assert hasattr(learn, "progress") and len(count) == 5 and count[-1] == count[0]
    assert "smooth_loss" not in vars(learn.progress)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
def test_randaugment_never_waits(watched, dtype):
    x = torch.from_numpy(IMAGES).permute(0, 3, 1, 2).to("cuda")
    x, augment = x if dtype == torch.uint8 else x.to(dtype) / 255, BatchRandAugment(2, 27, seed=0)
    augment.augment(x)  # the first batch is looked at
    with watched.no_waits(): y = augment.augment(x)
    assert y.is_cuda and y.dtype == dtype


def teachers():
    model = create_model("resnet9_4", 3)
    yield model.cuda(), dict(size=16, mean=[.5] * 3, std=[.25] * 3, classes=CLASSES)
    yield learner(), {}


def test_labeling_waits_once_per_part(gpu, tmp_path):
    for i, (teacher, kwargs) in enumerate(teachers()):
        def labels(bs, part, name):
            before = len(gpu.events)
            predict_pseudo_labels(teacher, IMAGES, tmp_path/f"{i}{name}", bs=bs, part_size=part, **kwargs)
            new = gpu.events[before:]
            assert not [str(o) for o in new if o.kind == "pageable" and int(o.what.split()[2]) > 64]
            return sum(o.kind == "wait" for o in new), sum(o.kind == "to device" for o in new)
        (few, n), (many, m), (parts, _) = labels(24, 48, "a"), labels(6, 48, "b"), labels(6, 24, "c")
        assert few == many and parts == many + 1 and (n, m) == (2, 8), (few, many, parts, n, m)


def test_labeled_batch_never_waits(watched):
    for teacher, kwargs in teachers():
        t = Teacher(teacher, IMAGES, CLASSES, **{k: v for k, v in kwargs.items() if k != "classes"})
        views = [t.view(IMAGES[i:i + 16])[0] for i in (0, 16, 32)]
        assert all(o.dtype == torch.uint8 and o.is_pinned() for o in views)
        with t.evaluating():
            t.logits(views[0])
            with watched.no_waits(): z = torch.cat([t.logits(o) for o in views])
        assert z.is_cuda and z.shape == (48, 3)


def test_forward_passes_stay_small_enough_for_kernels_that_count_in_32_bits(gpu, monkeypatch):
    monkeypatch.setattr("noisy_student.teacher._PIXELS", 20 * 16 * 16)
    teacher, kwargs = next(teachers())
    t, sizes = Teacher(teacher, IMAGES, CLASSES, 16), []
    with t.evaluating():
        whole = t.logits(t.view(IMAGES[:16])[0])
        teacher.register_forward_pre_hook(lambda _, x: sizes.append(len(x[0])))
        assert torch.equal(t.logits(t.view(IMAGES)[0])[:16].argmax(1), whole.argmax(1)) and sizes == [16, 16, 16]


@pytest.mark.parametrize("where", ["network", "view"])
def test_full_memory_halves_the_batch(gpu, tmp_path, where):
    learn = learner()
    def full(n):
        if n > 5: raise torch.cuda.OutOfMemoryError("CUDA out of memory")
    predict_pseudo_labels(learn, IMAGES, tmp_path/"a", bs=48)
    if where == "network": learn.model.register_forward_pre_hook(lambda _, x: full(len(x[0])))
    else:
        real = learn.dls.clean_view
        learn.dls.clean_view = lambda x: (full(len(x)), real(x))[1]
    predict_pseudo_labels(learn, IMAGES, tmp_path/"b", bs=48)
    a, b = (read_selection(select_pseudo_labels(tmp_path/o, tmp_path/f"{o}.parquet", 0., None)) for o in "ab")
    np.testing.assert_allclose(a.probs, b.probs, atol=2e-2)  # bfloat16, in other batches
    assert len(a) == 48


@pytest.mark.parametrize("bf16", [True, False])
def test_labeling_takes_the_half_precision_that_a_gpu_is_fast_at(tmp_path, bf16):
    teacher, kwargs = create_model("resnet9_4", 3), dict(size=16, classes=CLASSES)
    def labels(name, **more): return read_selection(select_pseudo_labels(predict_pseudo_labels(
        teacher, IMAGES, tmp_path/name, **kwargs, **more), tmp_path/f"{name}.parquet", 0., None)).probs
    exact = labels("exact")
    with PretendedGPU(bf16):
        half = labels("half", device="cuda")
        off = labels("off", device="cuda", bf16=False)
    assert np.array_equal(off, exact) and 0 < np.abs(half - exact).max() < .03
    assert read_metadata(next((tmp_path/"half").glob("*.parquet")))["precision"] == ("bfloat16" if bf16 else "float16")


def test_another_kind_of_device_goes_on_with_a_labeling(tmp_path):
    teacher, kwargs = create_model("resnet9_4", 3), dict(size=16, classes=CLASSES, part_size=12)
    def stop(done, total):
        if done >= 24: raise KeyboardInterrupt
    with PretendedGPU(), pytest.raises(KeyboardInterrupt):
        predict_pseudo_labels(teacher, IMAGES, tmp_path/"a", device="cuda", bs=12, progress=stop, **kwargs)
    with PretendedGPU(bf16=False): predict_pseudo_labels(teacher, IMAGES[:], tmp_path/"a", device="cuda", **kwargs)
    predict_pseudo_labels(teacher, IMAGES, tmp_path/"a", **kwargs)
    found = [read_metadata(o)["precision"] for o in sorted((tmp_path/"a").glob("*.parquet"))]
    assert len(found) == 4 and set(found) == {"bfloat16", "float16"}
    with pytest.raises(PseudoLabelError, match="precision"):
        predict_pseudo_labels(teacher, IMAGES, tmp_path/"a", bf16=False, **kwargs)


def test_what_float16_cannot_hold_is_labeled_in_float32(tmp_path):
    "Half of the images overflow: only the parts that they are in are computed once more"
    class Loud(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.seen = nn.Linear(1, 3), []
        def forward(self, x):
            y = self.head(x.mean((1, 2, 3))[:, None] ** 2 * 1e5)
            self.seen.append(y.dtype)
            return y / 1e5
    images = np.concatenate([np.full((24, 4, 4, 3), 20, np.uint8), np.full((24, 4, 4, 3), 250, np.uint8)])
    teacher = Loud()
    nn.init.constant_(teacher.head.weight, 1.)
    def labels(name, **more): return read_selection(select_pseudo_labels(predict_pseudo_labels(
        teacher, images, tmp_path/name, size=4, classes=CLASSES, part_size=24, **more), tmp_path/f"{name}.parquet", 0.,
                                                                         None)).probs
    exact = labels("exact")
    teacher.seen.clear()
    with PretendedGPU(bf16=False): half = labels("half", device="cuda")
    assert teacher.seen == [torch.float16, torch.float16, torch.float32]
    np.testing.assert_allclose(half, exact, atol=2e-3)
    with PretendedGPU(bf16=False), pytest.raises(PseudoLabelError, match="not finite"):
        nn.init.constant_(teacher.head.weight, float("nan"))
        labels("nan", device="cuda")


def run(path, device="cuda", **kwargs):
    settings = dict(rounds=1, epochs=1, bs=12, threshold=0., noise=Noise(2, 10, .2, .8), progress=lambda *_: None,
                    force=True)
    ns = NoisyStudent(DATA, ["resnet9_4"], path, device=device, **{**settings, **kwargs})
    ns.write_report = lambda: None  # takes the most of the time, and nothing of a GPU
    return ns


def test_whole_run_and_what_follows(gpu, tmp_path):
    ns = run(tmp_path/"a")
    assert len(ns.fit()) == 2 and gpu.kernels
    learn = ns.learner()
    assert all(o.is_cuda for o in learn.model.parameters())
    assert learn.dls.valid.dataset.there and on_gpu(learn.dls.valid.dataset.there[0])
    with learn.no_bar(), learn.no_logging():
        assert len(learn.validate()) == 2
        assert learn.get_preds(dl=learn.dls.test_dl(DATA.test.images))[0].device.type == "cpu"
        assert str(learn.predict(DATA.test.images[0])[0]) in CLASSES
    assert load_model(ns.path, "cuda").predict(DATA.test.images).is_cuda
    table = evaluate_run(ns, DATA.test, limit=4, corruptions=(), perturbations=("tilt",), device="cuda")
    assert table.accuracy.between(0, 1).all()
    tuned = fix_resolution(learn, DATA, 24)
    assert list(accuracy_by_size(tuned, DATA.test, [16, 24])) == [16, 24]
    learn.export(tmp_path/"x.pkl")


def test_table(gpu, tmp_path):
    import pandas as pd
    df = pd.DataFrame(dict(a=rng.normal(size=120), b=rng.choice(list("xyz"), 120)))
    df["y"] = np.where(df.a > 0, "p", "q"); df.loc[60:, "y"] = None
    ns = TabularNoisyStudent(df, "y", tmp_path/"a", recipe=TabularRecipe(rounds=1, epochs=1, steps=3), device="cuda",
                             progress=lambda *_: None)
    assert len(ns.fit()) == 2 and gpu.kernels


def test_run_on_the_cpu_leaves_the_gpu_alone(gpu, tmp_path):
    ns = run(tmp_path/"a", "cpu")
    ns.fit(); ns.learner().validate()
    assert not gpu.kernels and not gpu.events


class Plug(Callback):
    order = 90
    def after_batch(self):
        if self.training and self.epoch == 1 and self.iter == 1: raise RuntimeError("pulled")


@pytest.fixture
def ending(tmp_path, monkeypatch):
    "Weights after two epochs, interrupted within the second one and resumed elsewhere, or not"
    monkeypatch.setattr(RunState, "every", property(lambda self: 0. if (self.epoch, self.iter) == (1, 1) else 1e9))
    def weights(name, *wheres):
        (tmp_path/name).mkdir()
        for i, where in enumerate(wheres):
            with PretendedGPU(where == "bf16") if where != "cpu" else contextlib.nullcontext():
                torch.manual_seed(0)
                learn, last = learner("cpu" if where == "cpu" else "cuda", steps=3, noise=Noise(1, 10, .5, .8),
                                      splitter=splitter(get_recipe("default"))), i == len(wheres) - 1
                with contextlib.nullcontext() if last else pytest.raises(RuntimeError, match="pulled"):
                    fit_resumably(learn, 2, get_recipe("default", ema=.9), tmp_path/name, None,
                                  [] if last else [Plug()])
                found = {k: v.cpu() for k, v in learn.model.state_dict().items()}
        return found
    return weights


@pytest.mark.parametrize("where", ["bf16", "fp16"])
def test_resumed_training_ends_the_same(ending, where):
    a, b = ending("a", where), ending("b", where, where)
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("wheres", [("bf16", "cpu"), ("cpu", "bf16"), ("bf16", "fp16"), ("cpu", "fp16")])
def test_training_goes_on_elsewhere(ending, wheres):
    assert all(o.isfinite().all() for o in ending("a", *wheres).values())


# The instrument itself: what it must see

def test_waits_are_seen(gpu):
    x = torch.arange(6., device="cuda")
    y = x.as_subclass(type("Other", (torch.Tensor,), {}))[1:].T
    assert x.device == y.device == CUDA and copy.deepcopy(x).is_cuda and not torch.zeros(2).is_cuda
    asks = [x[0].item, lambda: float(x.sum()), lambda: bool((x > 0).all()), x.tolist, x.cpu, x.nonzero,
            lambda: x[x > 2], lambda: x[torch.tensor([1])],
            lambda: torch.ones(2).to("cuda"), lambda: torch.tensor([1.], device="cuda"), lambda: x.copy_(torch.ones(6)),
            torch.cuda.synchronize, lambda: nn.Linear(2, 2).cuda(), lambda: f"{x}", lambda: y[0].item()]
    for ask in asks:
        gpu.forget()
        ask()
        assert gpu.waits, ask
    gpu.forget()
    (x * 2 + 1).sum().sqrt(); x.new_zeros(3); torch.zeros_like(x); x[1:3] = 0; x * torch.tensor(2.)
    torch.ones(4).to("cuda", non_blocking=True)
    torch.ones(4).pin_memory().to("cuda", non_blocking=True)
    assert [o.kind for o in gpu.events] == ["pageable", "to device"]


def test_mixed_devices_are_refused(gpu):
    x = torch.ones(3, device="cuda", requires_grad=True)
    for mix in (lambda: x + torch.ones(3), lambda: torch.cat([x, torch.ones(3)]), lambda: nn.Linear(3, 2)(x),
                lambda: x.index_select(0, torch.tensor([0])),
                lambda: torch.rand(3, device="cuda", generator=torch.Generator())):
        with pytest.raises(RuntimeError, match="device"): mix()
    with pytest.raises(TypeError, match="numpy"): x.detach().numpy()
    with torch.autocast("cuda", torch.bfloat16): z = nn.Linear(3, 2).cuda()(x)
    z.sum().backward()
    assert z.dtype == torch.bfloat16 and x.grad.is_cuda


def test_device_has_random_numbers_of_its_own(gpu):
    torch.manual_seed(0); a = torch.rand(3)
    torch.manual_seed(0); torch.rand(9, device="cuda"); assert torch.equal(torch.rand(3), a)
    state = torch.cuda.get_rng_state(); b = torch.rand(3, device="cuda")
    torch.cuda.set_rng_state(state); assert torch.equal(torch.rand(3, device="cuda"), b)


@pytest.mark.parametrize("spoil", ["number", "host tensor"])
def test_laws_fail_when_they_should(gpu, spoil):
    learn = learner()
    def bad(module, args):
        if spoil == "number": float(args[0].mean())
        else: return args[0] + torch.zeros(args[0].shape)
    learn.model.fc.register_forward_pre_hook(bad)
    with pytest.raises((AssertionError, RuntimeError)), learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3, cbs=Steps(Pretended(gpu)))
