"""Seconds of a training step with stochastic depth (last survival .8), against the same step without it.

    python benchmarks/stochastic_depth.py [--device cuda]

The candidates: no stochastic depth; timm's DropPath with the same survival probabilities, which computes every branch
and multiplies by a mask; ours with `skip=False`, which does the same; ours, a draw per image; ours, one draw per batch.
A step is forward, backward and a fused AdamW step; each repetition times every candidate once, and `ratio` is the ratio
of mean times. `floor` is the share of the multiplications that is left on average: as linear decay drops 10 % of the
branches if every block has an identity skip, and a third to a half of the blocks of ResNets and EfficientNets change
the shape and cannot be dropped, it lies between .89 and .95; no implementation can be faster. Gathering and scattering
read and write the kept rows of the branch's input and output once more each. On the CPU both precisions are measured;
there, before the repetitions, ours with a draw per image makes 30 steps that the others do not: every number of kept
images makes oneDNN compile its kernels once.
"""
import copy
from contextlib import ExitStack
from types import SimpleNamespace

import timm
import torch
from common import arguments, in_turns, save
from timm.layers import DropPath
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from noisy_student.models import create_model
from noisy_student.stochastic_depth import StochasticDepth, residual_blocks

CASES = {  # device: (model, side of the images, images of a batch)
    "cpu": (("resnet9_24", 32, 64), ("resnet18", 64, 32), ("efficientnet_b0", 64, 32), ("convnext_atto", 64, 32),
            ("vit_tiny_patch16_224", 64, 32)),
    "cuda": (("resnet9_64", 32, 2048), ("resnet50", 128, 512), ("efficientnet_b0", 128, 512),
             ("convnext_tiny", 128, 512), ("vit_small_patch16_224", 224, 256)),
}


def timm_drop_path(model: nn.Module, probs: list) -> None:
    "timm's own layer at the end of every branch"
    for block, p in probs:
        for name in block.branches: setattr(block.module, name, DropPath(1 - p))


def floor(model: nn.Module, x: torch.Tensor, probs: list) -> float:
    "Share of the multiplications of a step that are left on average"
    names = {o.name: p for o, p in probs}
    with FlopCounterMode(display=False) as counter: model(x[:1])
    counts, top = counter.get_flop_counts(), type(model).__name__
    total = sum(counts["Global"].values())
    saved = sum((1 - p) * sum(counts.get(f"{top}.{name}", {}).values()) for name, p in names.items())
    return round(1 - saved / total, 3)


def step(model, x, y, bf16, per=None, skip=True):
    "A function that makes one training step, with stochastic depth attached for good if `per` is given"
    model.train()
    if per:
        cb = StochasticDepth(.8, per=per, skip=skip)
        cb.learn = SimpleNamespace(model=model)
        cb.attach(ExitStack())
    opt = torch.optim.AdamW(model.parameters(), fused=True)
    def run():
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        opt.step()
        opt.zero_grad()
    return run


def case(device, arch, size, batch, budget, bf16):
    torch.manual_seed(0)
    kw = dict(img_size=size) if "vit" in arch else {}
    model = (timm.create_model(arch, num_classes=10, **kw) if kw
             else create_model(arch, 10)).to(device, memory_format=torch.channels_last)
    x = torch.randn(batch, 3, size, size, device=device).to(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (batch,), device=device)
    def plan(m): return StochasticDepth(.8).plan(m)
    least = floor(copy.deepcopy(model).train(), x.repeat(2, 1, 1, 1)[:2], plan(model))
    plain = copy.deepcopy(model)
    fs = dict(none=step(plain, x, y, bf16))
    if hasattr(residual_blocks(model)[0].module, residual_blocks(model)[0].branches[0]):
        timm_drop_path(m := copy.deepcopy(model), plan(model))
        fs["timm DropPath"] = step(m, x, y, bf16)
    fs["ours, skip=False"] = step(copy.deepcopy(model), x, y, bf16, "sample", False)
    fs["ours, per sample"] = step(copy.deepcopy(model), x, y, bf16, "sample")
    fs["ours, per batch"] = step(copy.deepcopy(model), x, y, bf16, "batch")
    if device == "cpu":
        for _ in range(30): fs["ours, per sample"]()
    rows = in_turns(fs, device, budget, "none")
    return [dict(device=device, model=arch, size=size, batch=batch, precision="bf16" if bf16 else "float32",
                 candidate=k, **v, floor=least if "ours" in k else None)
            for k, v in rows.items()]


if __name__ == "__main__":
    p = arguments(__doc__, seconds=25)
    p.add_argument("--models", nargs="+", help="some of the models only")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    save("stochastic_depth", (case(a.device, arch, size, batch, a.seconds, bf16)
                              for arch, size, batch in CASES[a.device] if not a.models or arch in a.models
                              for bf16 in ((True, False) if a.device == "cpu" else (True,))), a)
