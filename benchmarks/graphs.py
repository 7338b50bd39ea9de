"""Would CUDA graphs pay? A training step through our learner as it is, and with its network in a graph.

    python benchmarks/graphs.py --device cuda

`ours` is that of `step.py`, without noise. `graphed`: the forward and the backward pass of the network are captured by
`torch.cuda.make_graphed_callables` for the one size of its batches and replayed, each as one launch; what comes before
and after, loss, optimizer, callbacks, stays as it is. `compiled`: `torch.compile(mode="reduce-overhead")`, which
compiles the network and replays graphs of what it compiled; `first_step` is the seconds of the first one.

Before the clock starts, each trains the same network for 20 steps on the same batches: `different` counts the tensors
of weights and statistics that are then not equal to those of `ours` in every bit, `most` is the largest difference.
The row of `ours` compares a second training like the first: where that is not 0, the device does not repeat itself,
and no graph can be blamed. A switch would be worth it where `different` is 0 and `ratio_high` clearly below 1.

A CPU has no graphs: there nothing is captured or compiled, and the code around it runs, for a rehearsal.
"""
import copy, time
from functools import partial

import torch
from common import arguments, in_turns, save
from step import made, ours
from torch import nn

CASES = {"cpu": (("linear", 8, 8, 30), ("resnet9_4", 16, 8, 5)),
         "cuda": (("resnet9_64", 32, 64, 100), ("resnet9_64", 32, 512, 50), ("resnet18", 64, 128, 50))}
STEPS = 20  # until weights are compared


def plain(model: nn.Module, x: torch.Tensor) -> nn.Module: return model


def graphed(model: nn.Module, x: torch.Tensor) -> nn.Module:
    "The network; in training it replays its passes. Trying them on `x` leaves no trace in its statistics."
    before = copy.deepcopy(model.state_dict())
    with torch.autocast(x.device.type, torch.bfloat16, cache_enabled=False):
        if x.is_cuda: torch.cuda.make_graphed_callables(model.train(), (x,))
        else: model.train()(x)
    model.load_state_dict(before)
    return model


def compiled(model: nn.Module, x: torch.Tensor) -> nn.Module:
    return torch.compile(model, **dict(mode="reduce-overhead") if x.is_cuda else dict(backend="eager"))


def trained(change, model, images, labels, batch, device, steps=STEPS) -> dict:
    "Its weights and statistics after some steps."
    model = copy.deepcopy(model)
    x = torch.rand(batch, *images.shape[1:], device=device).permute(0, 3, 1, 2)  # laid out as the batches are
    torch.manual_seed(0)
    ours(change(model, x), images, labels, batch, steps, False, device)()
    return {k: v.cpu().clone() for k, v in model.state_dict().items()}


def differences(a: dict, b: dict) -> dict:
    "Of two trainings."
    assert a.keys() == b.keys()
    far = [(a[k].double() - b[k].double()).abs().max().item() for k in a if not torch.equal(a[k], b[k])]
    return dict(different=len(far), most=float(f"{max(far, default=0):.2g}"))


def case(device, change, arch, size, batch, steps, budget):
    model, images, labels = made(device, arch, size, batch, max(steps, STEPS))
    again = partial(trained, model=model, images=images, labels=labels, batch=batch, device=device)
    start = time.perf_counter()
    again(change, steps=1)  # its weights were taken from the device
    name, first = change.__name__, time.perf_counter() - start
    expected = again(plain)
    equal = {"ours": differences(expected, again(plain)), name: differences(expected, again(change))}
    x = torch.rand(batch, size, size, 3, device=device).permute(0, 3, 1, 2)
    fs = {k: ours(f(copy.deepcopy(model), x), images, labels, batch, steps, False, device)
          for k, f in (("ours", plain), (name, change))}
    rows = in_turns(fs, device, budget, "ours")
    for v in rows.values(): v["seconds"] = float(f"{v['seconds'] / steps:.4g}")
    rows[name]["first_step"] = round(first, 1)
    return [dict(device=device, model=arch, case=name, size=size, batch=batch, candidate=k, **equal[k], **v)
            for k, v in rows.items()]


def cases(a):
    for change in (graphed, compiled):
        for o in CASES[a.device]:
            rows = case(a.device, change, *o, a.seconds)
            if a.device == "cpu":
                rows[1] |= dict(ratio="skipped: a CPU has no graphs", ratio_low=None, ratio_high=None, seconds=None)
            yield rows


if __name__ == "__main__":
    a = arguments(__doc__, seconds=6).parse_args()
    torch.set_num_threads(a.threads)
    save("graphs", cases(a), a)
