"""What `torch.compile` would bring: seconds of a training step of the bare loop of `step.py`, eager and compiled.

    python benchmarks/compile.py [--device cuda]

The network is compiled by itself, with the defaults of `torch.compile`, and trains without noise, which for a compiler
is the best case: stochastic depth that skips work gives its blocks other sizes in each step. The precision is the one
that training would have there. `compile_seconds` is the time of the first repetition, by the clock on the wall, less
that of a later one. A compilation is paid back after `compile_seconds` / (seconds eager - seconds compiled) steps,
column `steps_to_pay`; empty if it never is.
"""
import copy, time

import torch
from common import arguments, in_turns, save
from step import CASES, bare, made

from noisy_student.precision import has_fast_bf16


def case(device, arch, size, batch, steps, budget):
    model, images, labels = made(device, arch, size, batch, steps)
    networks = dict(eager=copy.deepcopy(model), compiled=torch.compile(copy.deepcopy(model)))
    half = has_fast_bf16(torch.device(device))
    fs = {k: bare(m, images, labels, batch, steps, False, device, half) for k, m in networks.items()}
    def wall(f):
        start = time.monotonic()
        f()
        if device != "cpu": torch.cuda.synchronize()
        return time.monotonic() - start
    fs["eager"]()
    compiling = wall(fs["compiled"]) - wall(fs["compiled"])
    rows = in_turns(fs, device, budget, "eager")
    for v in rows.values(): v["seconds"] = float(f"{v['seconds'] / steps:.4g}")
    saved = rows["eager"]["seconds"] - rows["compiled"]["seconds"]
    rows["compiled"] |= dict(compile_seconds=round(compiling, 1),
                             steps_to_pay=round(compiling / saved) if saved > 0 else None)
    return [dict(device=device, model=arch, size=size, batch=batch, precision="bfloat16" if half else "float32",
                 candidate=k, **v) for k, v in rows.items()]


if __name__ == "__main__":
    p = arguments(__doc__, seconds=20)
    p.add_argument("--models", nargs="+", help="some of the models only")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    wanted = [o for o in CASES[a.device] if not a.models or o[0] in a.models]
    save("compile", (case(a.device, *o, a.seconds) for o in wanted), a)
