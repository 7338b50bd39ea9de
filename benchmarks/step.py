"""Seconds of a training step through our learner, against a bare PyTorch loop over the same network and batches.

    python benchmarks/step.py [--device cuda]

All candidates train the same network on the same in-memory CIFAR-sized images, channels last, bfloat16 autocast, AdamW
fused, one-cycle rates, one epoch of some steps per repetition. `bare`: index the images, normalize, forward, backward,
step, and nothing else. `ours`: `noisy_student_learner` as `NoisyStudent` trains it, without noise. `fastai`: a stock
`Learner` with fastai's own Adam, over a stock `DataLoader` of the same tensors. With `augment`, bare and ours also
shift and mirror every image (`PadCropFlip`), and ours has all three noises in `ours with noise`, which bare has not.
`linear` is a network that takes no time: what is left is the host's part of a step, and `every callback asked` is ours
with fastai's `Learner` instead of `QuickLearner`.
"""
import copy
from functools import partial

import numpy as np
import torch
from common import arguments, in_turns, save
from fastai.callback.core import Callback, CancelValidException
from fastai.callback.schedule import fit_one_cycle  # noqa: F401, a method of Learner
from fastai.data.core import DataLoaders, TfmdDL
from fastai.data.transforms import IntToFloatTensor, Normalize
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import TensorCategory, TensorImage
from torch import nn

from noisy_student.dataloaders import PadCropFlip, mixed_dataloaders
from noisy_student.learner import Noise, noisy_student_learner
from noisy_student.models import create_model
from noisy_student.precision import in_bf16
from noisy_student.quick_learner import QuickLearner
from noisy_student.training import optimizer

CASES = {"cpu": (("linear", 8, 8, 300), ("resnet9_8", 32, 64, 10), ("resnet9_24", 32, 64, 5), ("resnet18", 64, 32, 4)),
         "cuda": (("linear", 8, 8, 300), ("resnet9_64", 32, 512, 50), ("resnet18", 64, 512, 30),
                  ("resnet50", 128, 256, 30))}
STATS = [.5] * 3, [.25] * 3


class NoValidation(Callback):
    def before_validate(self): raise CancelValidException()


def bare(model, images, labels, batch, steps, augment, device, half=True):
    "A function that trains for some steps, in bfloat16 or not"
    opt = torch.optim.AdamW(model.parameters(), fused=True)
    mean, std = (torch.tensor(o, device=device)[:, None, None] for o in STATS)
    shift = PadCropFlip(4)
    def run():
        model.train()
        rates = torch.optim.lr_scheduler.OneCycleLR(opt, 1e-3, total_steps=steps + 1)
        order = np.random.permutation(len(images))
        for i in range(steps):
            rows = order[i * batch:(i + 1) * batch]
            x = torch.from_numpy(images[rows]).permute(0, 3, 1, 2).to(device, non_blocking=True)
            if augment: x = shift(TensorImage(x), split_idx=0).as_subclass(torch.Tensor)
            x = x.float().div_(255).sub_(mean).div_(std)
            y = labels[torch.from_numpy(rows)].to(device, non_blocking=True)
            with torch.autocast(x.device.type, torch.bfloat16, enabled=half): logits = model(x)
            nn.functional.cross_entropy(logits.float(), y).backward()
            opt.step()
            rates.step()
            opt.zero_grad()
    return run


def ours(model, images, labels, batch, steps, augment, device, noise=Noise.none(), kind=QuickLearner):
    dls = mixed_dataloaders((images, labels.numpy()), (images[:batch], labels[:batch].numpy()),
                            list(map(str, range(10))), bs=batch,
                            steps=steps, augment=[PadCropFlip(4)] if augment else [], stats=STATS, device=device)
    learn = noisy_student_learner(dls, model, noise, opt_func=optimizer("adamw", torch.device(device)),
                                  cbs=[NoValidation()])
    learn.__class__ = kind
    def run():
        with in_bf16(learn.model, torch.device(device)), learn.no_bar(), learn.no_logging():
            learn.fit_one_cycle(1, 1e-3)
    return run


def fastai(model, images, labels, batch, steps, device):
    "What the stock library does with tensors in memory: one item after the other, collated"
    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    items = [(TensorImage(a), TensorCategory(b)) for a, b in zip(x[:batch * steps], labels)]
    tfms = [IntToFloatTensor(), Normalize.from_stats(*STATS, cuda=False)]
    dls = DataLoaders(*[TfmdDL(items, bs=batch, shuffle=s, num_workers=0, after_batch=tfms, device=torch.device(device))
                        for s in (True, False)])
    loss = CrossEntropyLossFlat()
    learn = Learner(dls, model, lambda pred, y: loss(pred.float(), y), cbs=[NoValidation()])
    def run():
        with in_bf16(learn.model, torch.device(device)), learn.no_bar(), learn.no_logging():
            learn.fit_one_cycle(1, 1e-3)
    return run


def made(device, arch, size, batch, steps):
    "A network, and as many images and labels as it takes steps with"
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (batch * steps, size, size, 3), dtype=np.uint8)
    labels = torch.from_numpy(rng.integers(0, 10, len(images)))
    linear = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10))
    model = (linear if arch == "linear" else create_model(arch, 10)).to(device, memory_format=torch.channels_last)
    return model, images, labels


def case(device, arch, size, batch, steps, augment, budget):
    model, images, labels = made(device, arch, size, batch, steps)
    make = partial(copy.deepcopy, model)
    fs = dict(bare=bare(make(), images, labels, batch, steps, augment, device),
              ours=ours(make(), images, labels, batch, steps, augment, device))
    if augment:
        fs["ours with noise"] = ours(make(), images, labels, batch, steps, augment, device, Noise(2, 10, .5, .8))
    else: fs["fastai"] = fastai(make(), images, labels, batch, steps, device)
    if arch == "linear":
        fs["every callback asked"] = ours(make(), images, labels, batch, steps, augment, device, kind=Learner)
    rows = in_turns(fs, device, budget, "bare")
    for v in rows.values(): v["seconds"] = float(f"{v['seconds'] / steps:.4g}")
    return [dict(device=device, model=arch, case="augment" if augment else "plain", size=size, batch=batch, candidate=k,
                 **v) for k, v in rows.items()]


if __name__ == "__main__":
    p = arguments(__doc__, seconds=6)
    p.add_argument("--models", nargs="+", help="some of the models only")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    save("step", (case(a.device, arch, size, batch, steps, augment, a.seconds)
                  for arch, size, batch, steps in CASES[a.device] if not a.models or arch in a.models
                  for augment in (False, True)[:1 if arch == "linear" else 2]), a)
