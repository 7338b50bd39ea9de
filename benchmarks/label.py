"""Seconds of a pseudo-label pass, against a bare forward loop over the same images.

    python benchmarks/label.py [--device cuda]

`bare`: index the images, normalize, forward in inference mode, softmax, and collect the probabilities on the host;
nothing is checked and nothing is written. `ours`: `predict_pseudo_labels` in the same precision, which also hashes
model and images, checks every probability, and writes the table, in parts of 1,024 images so that writing and resuming
are in it. The network is in float32 on the CPU and under bfloat16 autocast on a GPU. On the CPU the CPU time of all
threads counts, on a GPU the time that passes: there writing and making the next batch overlap with the network.
"""
import shutil, tempfile
from pathlib import Path

import numpy as np
import torch
from common import arguments, in_turns, save

from noisy_student.models import create_model
from noisy_student.pseudo_labels import predict_pseudo_labels

CASES = {"cpu": (("resnet9_24", 32, 4096, 64), ("resnet18", 64, 1024, 64)),
         "cuda": (("resnet9_64", 32, 50000, 2048), ("resnet50", 224, 8192, 512))}
MEAN, STD = [.5] * 3, [.25] * 3


def case(device, arch, size, n, batch, budget):
    torch.manual_seed(0)
    images = np.random.default_rng(0).integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    model = create_model(arch, 10).to(device, memory_format=torch.channels_last).eval()
    mean, std = (torch.tensor(o, device=device)[:, None, None] for o in (MEAN, STD))
    def bare():
        probs = []
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            for i in range(0, n, batch):
                x = torch.from_numpy(images[i:i + batch]).to(device, non_blocking=True).permute(0, 3, 1, 2)
                probs.append(model((x.float().div_(255) - mean) / std).float().softmax(1))
        torch.cat(probs).cpu()
    out = Path(tempfile.mkdtemp())
    def ours():
        shutil.rmtree(out)
        predict_pseudo_labels(model, images, out, size=size, bs=batch, mean=MEAN, std=STD,
                              classes=list(map(str, range(10))), part_size=max(1024, batch))
    rows = in_turns(dict(bare=bare, ours=ours), device, budget, "bare")
    shutil.rmtree(out)
    return [dict(device=device, model=arch, size=size, images=n, batch=batch, candidate=k,
                 images_per_s=round(n / v["seconds"]), **v)
            for k, v in rows.items()]


if __name__ == "__main__":
    p = arguments(__doc__, seconds=15)
    p.add_argument("--models", nargs="+", help="some of the models only")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    save("label", (case(a.device, *o, a.seconds) for o in CASES[a.device] if not a.models or o[0] in a.models), a)
