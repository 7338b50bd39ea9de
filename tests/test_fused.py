"""The kernels for a GPU, without one: Triton carries them out with numpy, and compiles them for GPUs that are
elsewhere.

Triton decides when a kernel is defined whether to interpret it, so each test is a process of its own."""
import os, subprocess, sys
from pathlib import Path

import pytest
import torch

from noisy_student import kernels

pytest.importorskip('triton', reason='Triton is not made for this system')


def python(program, **env):
    done = subprocess.run([sys.executable, '-c', program], env={**os.environ, **env}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


INTERPRETED = """
import numpy as np, torch
from noisy_student.fused import augment
from noisy_student import batch_ops
from noisy_student.randaugment import BatchRandAugment, OPS

rng = np.random.default_rng(0)
for h, w, c, reference in ((9, 14, 3, False), (1, 1, 1, False), (67, 63, 3, True)): # the last: more than one step
    tfm = BatchRandAugment(n=2, m=27, ops=OPS, schedule='random', seed=h, reference=reference)
    draws = tfm.draw(16, (h, w))
    draws.op[:] = np.arange(16), rng.permutation(16)
    x = torch.from_numpy(rng.integers(0, 256, (16, c, h, 2 * w), dtype=np.uint8))
    x[::2, 0] //= 8 # a narrow range
    x[1::4] = x[1::4, :, :1, :1] # a constant
    every_second_column = x[..., ::2]
    for case in (every_second_column, every_second_column.float() / 255)[:1 + (h < 20)]:
        before, made = case.clone(), augment(case, draws, reference)
        bad = (made != batch_ops.augment(case, draws, reference)).flatten(1).any(1)
        assert not bad.any(), (h, w, c, reference, case.dtype, [(OPS[i], OPS[j]) for i, j in draws.op[:, bad].T])
        assert torch.equal(case, before) and made.dtype == case.dtype and made.shape == case.shape

from pretended_gpu import PretendedGPU

x = torch.rand(16, 3, 32, 32)
tfm = BatchRandAugment(seed=0)
draws = tfm.draw(16, (32, 32))
expected = tfm.apply(x, draws)
with PretendedGPU() as gpu:
    y = tfm.apply(x.to('cuda'), draws) # tried, found to be right
    gpu.forget()
    z = tfm.apply(x.to('cuda', non_blocking=True), draws)
    asked = [o.kind for o in gpu.events if o.where.startswith('noisy_student')]
    assert asked == ['to device'], gpu.events # one copy, of pinned memory, and no wait
    assert torch.equal(y.cpu(), expected) and torch.equal(z.cpu(), expected)
"""


def test_interpreted_the_kernels_equal_torch():
    """Odd sizes, more pixels than one program takes, one pixel, views with gaps, constants, arguments past the scale's
    end; and a pretended GPU takes them, with one copy to the device"""
    python(INTERPRETED, TRITON_INTERPRET='1', PYTHONPATH=os.pathsep.join([str(Path(__file__).parent), *sys.path]))


COMPILED = """
import inspect, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from noisy_student import fused

launches = dict(zip((fused._tables_kernel, fused._pixels_kernel), fused._launches(224 * 224)))
for capability, read, write in ((75, '*u8', '*fp16'), (90, '*fp32', '*bf16')): # T4; H100 and H200
    for kernel, launch in launches.items():
        constants = dict(C=3, BLOCK=launch['BLOCK'], REFERENCE=False)
        options = dict(enable_fp_fusion=False, num_warps=launch['num_warps'])
        names = inspect.signature(kernel.fn).parameters
        pointers = dict(x=read, out=write, tables='*u8', plan='*i64')
        types = {o: pointers.get(o, 'constexpr' if o in constants else 'i32') for o in names}
        source = ASTSource(kernel, types, {o: constants[o] for o in names if o in constants})
        code = triton.compile(source, GPUTarget('cuda', capability, 32), options).asm
        assert code['cubin'] and 'fma.rn.f' not in code['ptx'] and 'div.full' not in code['ptx']
"""


def test_the_kernels_compile_for_gpus_and_round_each_step(tmp_path):
    python(COMPILED, TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET='0')


@pytest.mark.parametrize('fails', (True, False), ids=('raising', 'wrong'))
def test_kernels_that_do_not_work_are_named_and_replaced(monkeypatch, fails):
    "A GPU is pretended: its tensors stay on the CPU"
    from noisy_student import fused
    def augment(x, draws, reference=False):
        if fails: raise RuntimeError('Failed to find C compiler.\nPlease specify one')
        return x
    monkeypatch.setattr(fused, 'augment', augment)
    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, 'to', lambda x, *a,
                        **kw: x if a[:1] == (torch.device('cuda:0'),) else to(x, *a, **kw))
    kernels._fused.cache_clear()
    with pytest.warns(UserWarning, match='C compiler' if fails else 'wrong'):
        assert kernels._fused(torch.device('cuda:0'), torch.float32, False) is None
    kernels._fused.cache_clear()



def test_what_is_tried_once_is_launched_as_all_others_of_its_kind():
    "Small images and large ones are two kinds, each compiled for itself"
    fused = pytest.importorskip('noisy_student.fused')
    kinds = {}
    for h, w in ((1, 1), (32, 32), (64, 64), (64, 65), (224, 224), (800, 600)):
        x = torch.empty(0, 3, h, w)
        tried, _ = kernels._trial(torch.uint8, kernels._is_large(x))
        assert fused._launches(h * w) == fused._launches(tried[0, 0].numel())
        kinds[kernels._is_large(x)] = fused._launches(h * w)
    assert kinds[False] != kinds[True]
