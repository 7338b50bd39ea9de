"""What holds on a GPU: its kernels, losses, noise, checkpoints and labels are those of the CPU (`pytest -m gpu`).

Wherever it can be, the same law is tried on the CPU, too, or on a pretended GPU, so that a test is known to fail when
it should. Tolerances are guesses where a rounding is the device's own; equal is equal.
"""
import contextlib, os, warnings

import fastai.callback.progress  # noqa: F401, no_bar
import numpy as np
import pytest
import torch
from pretended_gpu import PretendedGPU
from test_leaks import smooth
from test_pretended_gpu import CLASSES, DATA, IMAGES, Plug, learner, run

from noisy_student import batch_ops, kernels
from noisy_student.checkpoints import RunState
from noisy_student.fitting import fit_resumably, splitter
from noisy_student.leaks import find_leaks
from noisy_student.learner import Noise
from noisy_student.losses import SoftLabelCrossEntropy
from noisy_student.models import create_model, save_weights
from noisy_student.precision import Half, in_bf16
from noisy_student.pseudo_labels import predict_pseudo_labels, read_selection, select_pseudo_labels
from noisy_student.randaugment import OPS, BatchRandAugment
from noisy_student.recipes import get_recipe
from noisy_student.rounds import NoisyStudent, load_model
from noisy_student.survival_probability import DropBranch
from noisy_student.training_state import random_state, set_random_state

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
DTYPES = torch.uint8, torch.float32, torch.bfloat16, torch.float16
GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(),
                                                                      reason="there is no GPU")])
on_both = pytest.mark.parametrize("place", ["cpu", GPU])


@pytest.fixture(params=["cpu", "pretended", GPU])
def place(request):
    "Where tensors go: to the CPU, to a GPU that is pretended, or to one that is there"
    with PretendedGPU() if request.param == "pretended" else contextlib.nullcontext():
        yield "cpu" if request.param == "cpu" else "cuda"


def fused(place, dtype, is_large):
    "The kernels; on a GPU those that RandAugment takes there, and a fallback is an error"
    pytest.importorskip("triton", reason="Triton is not made for this system")
    from noisy_student.fused import augment
    if place == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1": pytest.skip("where there is a GPU, Triton compiles")
        return augment
    kernels._fused.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernels._fused(torch.device("cuda", 0), dtype, is_large) is augment
    return augment


def check_kernels(place, dtype, n, h, w, c, nhwc):
    augment, rng = fused(place, dtype, h * w > 4096), np.random.default_rng(0)
    for reference in (False, True) if place == "cuda" and w == 32 else (False,):
        tfm = BatchRandAugment(2, 27, ops=OPS, schedule="random", seed=n, reference=reference)
        draws = tfm.draw(n, (h, w))
        draws.op[0] = np.arange(n) % len(OPS)  # each operation, and another one after it
        x = torch.from_numpy(rng.integers(0, 256, (n, h, w, c) if nhwc else (n, c, h, w), dtype=np.uint8))
        x[::3] //= 8
        x[1::7] = 77
        x = x.permute(0, 3, 1, 2) if nhwc else x
        if dtype != torch.uint8: x = (x.double() / 255).to(dtype)
        made, expected = augment(x.to(place), draws, reference).cpu(), batch_ops.augment(x, draws, reference)
        assert made.dtype == dtype and made.stride() == x.stride()
        # the interpreter cuts float32 off to bfloat16
        step = 1 / 256 if place == "cpu" and dtype == torch.bfloat16 else 0
        bad = ((made.float() - expected.float()).abs() > step).flatten(1).any(1).numpy()
        assert not bad.any(), [(OPS[i], OPS[j]) for i, j in draws.op[:, bad].T]


# every dtype, memory format and kind of size (divisible by 16 or not) is compiled anew, a second for each kernel
CASES = [("cpu", o, *case) for case in ((16, 7, 5, 3, True), (16, 4, 9, 1, False)) for o in DTYPES] + [
    pytest.param("cuda", o, *case, marks=GPU.marks)
    for dtypes, *case in ((DTYPES, 64, 32, 32, 3, True), (DTYPES, 64, 32, 32, 3, False),
                          (DTYPES, 16, 224, 224, 3, True),
                          (DTYPES[:2], 17, 37, 53, 3, True), (DTYPES[:2], 33, 28, 28, 1, False),
                          (DTYPES[:1], 16, 1, 1, 1, False)) for o in dtypes]


@pytest.mark.parametrize("place, dtype, n, h, w, c, nhwc", CASES)
def test_fused_kernels_equal_torch(place, dtype, n, h, w, c, nhwc): check_kernels(place, dtype, n, h, w, c, nhwc)


@on_both
@pytest.mark.parametrize("fails", [True, False], ids=["does not compile", "is wrong"])
def test_a_kernel_that_does_not_work_fails_the_test(place, fails, monkeypatch):
    def augment(x, draws, reference=False):
        if fails: raise RuntimeError("ptxas fatal")
        return x.clone()
    monkeypatch.setattr("noisy_student.fused.augment", augment)
    try:
        with pytest.raises((AssertionError, RuntimeError, UserWarning)): check_kernels(place, DTYPES[0], 16, 7, 5, 3, 0)
    finally: kernels._fused.cache_clear()


@on_both
@pytest.mark.parametrize("c, size", [(3, (16, 16)), (1, (5, 9)), (3, (37, 53))])
def test_torchs_operations_equal_those_on_the_cpu(place, c, size, monkeypatch):
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.integers(0, 256, (48, c, *size), dtype=np.uint8))
    draws = BatchRandAugment(2, 27, ops=OPS, seed=0).draw(48, size)
    expected = batch_ops.augment(x, draws)
    if place == "cpu": monkeypatch.setattr(batch_ops, "_on_cpu", lambda x: False)
    assert torch.equal(batch_ops.augment(x.to(place), draws).cpu(), expected)


@pytest.mark.parametrize("kind", ["labels", "distributions", "mixed, weighted"])
def test_losses_are_those_of_the_cpu_in_double_precision(place, kind):
    g = torch.Generator().manual_seed(0)
    pred = torch.randn(64, 10, generator=g) * 4
    targ = torch.rand(64, 10, generator=g).softmax(1) if kind != "labels" else torch.arange(64) % 10
    kwargs = dict(labeled=24, unlabeled_weight=2., weight=torch.linspace(.5, 2, 10)) if "mixed" in kind else {}
    def loss_and_gradient(device, dtype):
        x = pred.to(dtype).to(device).detach().clone().requires_grad_()
        loss = SoftLabelCrossEntropy(.1, **kwargs).to(device)(x, targ.to(device))
        loss.backward()
        return loss.detach().cpu().double(), x.grad.cpu().double()
    torch.testing.assert_close(loss_and_gradient(place, torch.float32), loss_and_gradient("cpu", torch.float64),
                               rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dropped_branch_is_what_a_mask_makes(place, layout, dtype):
    torch.manual_seed(0)
    x = torch.randn(100, 8, 4, 4).to(dtype).to(place).contiguous(memory_format=layout).requires_grad_()
    drop, sizes = DropBranch(.6).train(), set()
    for _ in range(3):
        x.grad = None
        y = drop.enter(x)
        sizes.add(len(y))
        y = drop(y * 2)
        y.float().sum().backward()
        kept = (y.detach().cpu() != 0).flatten(1).any(1)[:, None, None, None]
        assert 30 < kept.sum() < 90
        factor = torch.tensor(1 / .6, dtype=torch.float64)
        expected = (torch.where(kept, 2 * factor, 0.) * x.detach().cpu().double()).to(dtype)
        torch.testing.assert_close(y.detach().cpu(), expected, check_stride=False)
        gradient = torch.where(kept, 2 * factor, 0.).to(dtype).expand_as(expected)
        torch.testing.assert_close(x.grad.cpu(), gradient, check_stride=False)
    if place == "cuda": assert all(o % 8 == 0 for o in sizes)  # few sizes, each planned once
    else: assert any(o % 8 for o in sizes)


@on_both
def test_random_state_of_the_device_comes_back(place):
    def draws(): return torch.rand(5, device=place).cpu(), torch.rand(5), np.random.rand()
    draws()
    state = random_state()
    first = draws()
    set_random_state(state)
    again = draws()
    assert all(map(torch.equal, first[:2], again[:2])) and first[2] == again[2]


@on_both
@pytest.mark.parametrize("noise", [Noise.none(), Noise(1, 5, .2, .8)], ids=["plain", "noised"])
def test_a_student_learns(place, noise):
    "Without noise as on the CPU: what is drawn, the order and the shifts, is drawn on the host"
    def losses(device):
        torch.manual_seed(0)
        learn = learner(device, noise, steps=30)
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
        assert all(o.isfinite().all() for o in learn.model.state_dict().values())
        return torch.stack(learn.recorder.losses).cpu()
    there = losses(place)
    assert there[-1] < there[0]
    if noise == Noise.none(): torch.testing.assert_close(there, losses("cpu"), rtol=.05, atol=.02)


@pytest.mark.parametrize("place", ["pretended", GPU])
@pytest.mark.parametrize("half", ["bf16", "fp16"])
def test_half_precision_is_near_float32(place, half):
    "Weights stay float32, overflowing steps are left out"
    with PretendedGPU(bf16=half == "bf16") if place == "pretended" else contextlib.nullcontext():
        def losses(cbs, bf16):
            torch.manual_seed(0)
            learn = learner("cuda", Noise.none(), steps=20)
            with in_bf16(learn.model, torch.device("cuda")) if bf16 else contextlib.nullcontext():
                with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3, cbs=cbs)
            assert {o.dtype for o in learn.model.parameters()} == {torch.float32}
            assert all(o.isfinite().all() for o in learn.model.parameters())
            return torch.stack(learn.recorder.losses).cpu().float()
        full = losses([], False)
        torch.testing.assert_close(losses([] if half == "bf16" else [Half(init_scale=2. ** 20)], half == "bf16"), full,
                                   rtol=.1, atol=.1)


@on_both
def test_an_interrupted_training_ends_the_same(place, tmp_path, monkeypatch):
    "On a GPU with deterministic kernels"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(RunState, "every", property(lambda self: 0. if (self.epoch, self.iter) == (1, 1) else 1e9))
    recipe = get_recipe("default", ema=.9)
    def weights(name, times):
        (tmp_path/name).mkdir()
        for left in reversed(range(times)):
            torch.manual_seed(0)
            learn = learner(place, Noise(1, 10, .5, .8), steps=3, splitter=splitter(get_recipe("default")))
            with pytest.raises(RuntimeError, match="pulled") if left else contextlib.nullcontext():
                fit_resumably(learn, 2, recipe, tmp_path/name, None, [Plug()] if left else [])
        return {k: v.cpu() for k, v in learn.model.state_dict().items()}
    a, b = weights("a", 1), weights("b", 2)
    for k in a: torch.testing.assert_close(b[k], a[k], rtol=1e-3, atol=1e-4)
    if place == "cpu": assert all(torch.equal(a[k], b[k]) for k in a)


def test_leaks_are_those_that_numpy_finds(place, monkeypatch):
    pool, held, rng = smooth(700, 16), smooth(600, 16, seed=1), np.random.default_rng(0)
    held[:40] = np.minimum(pool[:40], 250) + rng.integers(0, 6, (40, 16, 16, 3), dtype=np.uint8)
    held[40:45] = pool[40:45]
    found = find_leaks(pool, held, device=place)
    assert len(found) >= 45 and set(found.kind) == {"identical", "re-encoded"}
    def near(a, b_signs): return np.flatnonzero((np.where(a > 0, 1, -1) @ b_signs.cpu().numpy().astype(int)) >= 48)
    monkeypatch.setattr("noisy_student.leaks._near", near)
    assert find_leaks(pool, held).equals(found)


def test_labels_are_those_of_the_cpu(place, tmp_path):
    torch.manual_seed(0)
    teacher = create_model("resnet9_4", 3)
    def labels(device):
        predict_pseudo_labels(teacher.to(device), IMAGES, tmp_path/device, bs=20, size=16, classes=CLASSES)
        return read_selection(select_pseudo_labels(tmp_path/device, tmp_path/f"{device}.parquet", 0., None)).probs
    expected = labels("cpu")
    if place == "cpu": (tmp_path/"cpu").rename(tmp_path/"before")
    np.testing.assert_allclose(labels(place), expected, atol=.02)  # half precision


def test_classifiers_and_clusters_label_as_on_the_cpu(place, tmp_path):
    weights = save_weights(create_model("resnet9_4", 3), tmp_path/"weights.safetensors")
    def labels(name, device):
        ns = run(tmp_path/name, device, pretrained=str(weights), head_rounds=2, clusters=True, share=.5)
        assert ns.fit().test_accuracy.between(0, 1).all() and list((ns.path/"cache").glob("clusters-*"))
        return read_selection(ns.path/"round_1"/"selected.parquet")
    there, here = labels("there", place), labels("here", "cpu")
    both = sorted({*there.items} & {*here.items})
    assert len(both) > .8 * len(here) > 8  # half precision may order a few otherwise
    np.testing.assert_allclose(*(o.probs[[list(o.items).index(i) for i in both]] for o in (there, here)), atol=.02)


def test_a_whole_run_and_its_model_elsewhere(place, tmp_path):
    ns = run(tmp_path/"a", place)
    assert ns.fit().test_accuracy.between(0, 1).all()
    there, here = (load_model(ns.path, o).predict(DATA.test.images).cpu() for o in (place, "cpu"))
    torch.testing.assert_close(there, here, rtol=0, atol=.02)
    again = NoisyStudent(DATA, ["resnet9_4"], ns.path, device=place, rounds=1, epochs=1, bs=12, threshold=0.,
                         noise=Noise(2, 10, .2, .8), progress=lambda *_: None, force=True)
    before = {o: o.stat().st_mtime_ns for o in ns.path.glob("round_*/*.safetensors")}
    assert len(again.fit()) == 2 and before == {o: o.stat().st_mtime_ns for o in before}  # nothing is left to do
