"""What a checkpoint costs a training: milliseconds for which it waits, written at once and written behind it.

    python benchmarks/checkpoints.py

A network with the state of AdamW, all of which is written. `waits_ms` is the median by the clock until `save` returns,
which is what a training step is late; `done_ms` until the file is in place and synced. Files go to --folder: give it a
folder on the disk that matters.
"""
import tempfile, time
from pathlib import Path

import numpy as np
import torch
from common import arguments, save

from noisy_student.background_work import Behind
from noisy_student.checkpoints import Checkpoint
from noisy_student.models import create_model


def state(arch: str, device: str) -> dict:
    "What a training of this network has to save after a step."
    model = create_model(arch, 10).to(device)
    opt = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 3, 32, 32, device=device)).sum().backward()
    opt.step()
    return dict(model=model.state_dict(), opt=opt.state_dict())


def measured(arch: str, how: str, folder: Path, a) -> dict:
    "One network, written in one way again and again."
    training, waits, done = state(arch, a.device), [], []
    with Behind() as behind:
        files = Checkpoint(folder/"state.safetensors", **({} if how == "at once" else dict(behind=behind)))
        while len(waits) < 3 or sum(done) < a.seconds:
            begun = time.perf_counter()
            files.save(training)
            waits.append(time.perf_counter() - begun)
            files.wait()
            done.append(time.perf_counter() - begun)
    def ms(o): return round(1e3 * float(np.median(o[1:])), 1)  # the first one warms up
    return dict(device=a.device, model=arch, candidate=how,
                megabytes=round(files.file.stat().st_size / 1e6, 1), waits_ms=ms(waits),
                done_ms=ms(done), repetitions=len(waits) - 1)


if __name__ == "__main__":
    p = arguments(__doc__, seconds=10)
    p.add_argument("--folder", type=Path, help="where to write; else a temporary folder")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    def cases():
        for arch in ("resnet9_24", "resnet9_96", "resnet50"):
            for how in ("at once", "behind"):
                with tempfile.TemporaryDirectory(dir=a.folder) as d: yield [measured(arch, how, Path(d), a)]
    save("checkpoints", cases(), a)
