"""Images per second of RandAugment with two operations per image, uint8 in and out, against what else there is.

    taskset -c 1 python benchmarks/randaugment.py

The candidates: timm on PIL images with p=1, so that it too applies two operations to every image, as it comes (bilinear
or bicubic by chance) and with the nearest pixel, as ours; torchvision's v2 image by image and on a batch, where one
draw serves all images, as in kornia and torchaug, which are measured if they are installed; and BatchRandAugment, on a
GPU with its fused kernels and, to compare, with torch's operations only (`ours by groups`). Each repetition times every
candidate once, and medians of many repetitions are compared, because machines are noisy. On the CPU one thread is used
and its CPU time is counted, which waits for other processes are not part of; on a GPU, the time until the GPU is done.
`op_pairs` is the number of distinct pairs of operations drawn in one batch. Rows that this machine cannot measure say
"not measured". Writes results/randaugment.csv with the machine, the versions and the commit.

Notes on the CPU rows. Against timm as it comes, the targets (5 at 32 px, 2 at 224 px) are met from batches of 256 on at
32 px, and at 224 px; they are missed at 32 px with a batch of 64. A batch costs about 2.3 ms (some 470 calls of small
tensor operations) plus 13 us per image of 32 px, a line through the batches of 64 and 1024, so small batches pay mostly
calls. Against timm with the nearest pixel, ours is slower at 224 px, where a rotation by Pillow took .41 ns per byte.

The floor at 224 px, 150,528 bytes per image: with everything warm in the cache, a byte took .03 ns to copy, .45 to look
up, .75 to count, .85 to gather from elsewhere (half of it for index and frame), .75 for Color and 1.4 for Sharpness,
each measured by itself; in the mean over the 14 operations .76 ns, 230 us per image for two. The whole takes 455 us,
twice that; memory outside of the cache, page faults of the output and calls are what the single steps leave out.

Notes on a GPU. For a batch of 2048 images of 32 px a million images per second allow 2.0 ms. By groups, the host draws
(.7 ms), prepares tables and positions in numpy (1.8 ms) and issues some 440 small tensor operations. Fused, it draws,
prepares eleven numbers per image (.75 ms), and issues one copy and four kernels, all of it while the GPU computes what
came before. These are CPU times of machine B; what a GPU reaches with either is not measured.
"""
import argparse, time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from common import RESULTS, seconds_of, with_others
from PIL import Image
from runs import machine
from timm.data.auto_augment import rand_augment_transform
from torchvision.transforms import v2

from noisy_student import batch_ops
from noisy_student.randaugment import BatchRandAugment

try: from kornia.augmentation.auto import RandAugment as KorniaRandAugment
except ImportError: KorniaRandAugment = None
try: from torchaug.transforms import RandAugment as TorchaugRandAugment
except ImportError: TorchaugRandAugment = None

CASES = {"cpu": ((32, 64), (32, 256), (32, 1024), (224, 64), (224, 128)), "cuda": ((32, 2048), (224, 256))}
GPU_NAMES = ("torchvision per batch", "torchaug", "kornia", "ours")
NAMES = {"cpu": ("timm", "timm nearest", "torchvision per image", *GPU_NAMES), "cuda": (*GPU_NAMES, "ours by groups")}


class Logged:
    "A timm operation that notes that it was called"
    def __init__(self, op, log): self.op, self.log = op, log
    def __call__(self, img):
        self.log.append(self.op.name)
        return self.op(img)


def pairs(log): return len({tuple(log[i:i + 2]) for i in range(0, len(log), 2)})


def drawn_pairs(tfm, items) -> int:
    "Distinct pairs that torchvision's transform, or torchaug's after it, draws for `items`"
    draw, log = tfm._get_random_item, []
    def logging(space):
        item = draw(space)
        log.append(item[0])
        return item
    tfm._get_random_item = logging
    for i in items: tfm(i)
    tfm._get_random_item = draw
    return pairs(log)


def candidates(x, size) -> dict:
    "Per name a function of nothing, the number of its images, and one that counts the distinct pairs of operations"
    ours, made = BatchRandAugment(n=2, m=10, seed=0), {}
    def ours_pairs(): return len(set(zip(*ours.draw(len(x), (size, size)).op)))
    if x.device.type == "cpu":
        imgs = [Image.fromarray(a) for a in x.permute(0, 2, 3, 1).numpy()]
        few = imgs[:64]
        for name, hparams in (("timm", {}), ("timm nearest", dict(interpolation=Image.Resampling.NEAREST))):
            tfm = rand_augment_transform("rand-m10-n2-p1", dict(hparams))
            def timm_pairs(hparams=hparams):
                logged, log = rand_augment_transform("rand-m10-n2-p1", dict(hparams)), []
                logged.ops = [Logged(op, log) for op in logged.ops]
                for i in imgs: logged(i)
                return pairs(log)
            made[name] = lambda tfm=tfm: [tfm(i) for i in few], len(few), timm_pairs
    magnitude = dict(num_ops=2, magnitude=10, num_magnitude_bins=11, fill=128)
    tv = v2.RandAugment(**magnitude)
    if x.device.type == "cpu":
        made["torchvision per image"] = lambda: [tv(i) for i in x[:64]], len(x[:64]), lambda: drawn_pairs(tv, x)
    made["torchvision per batch"] = lambda: tv(x), len(x), lambda: drawn_pairs(tv, [x])
    if TorchaugRandAugment is not None:
        torchaug = TorchaugRandAugment(**magnitude)
        made["torchaug"] = lambda: torchaug(x), len(x), lambda: drawn_pairs(torchaug, [x])
    if KorniaRandAugment is not None:
        kornia = KorniaRandAugment(n=2, m=10)
        def kornia_pairs():  # a list of operations for the whole batch
            kornia(x[:2].float().div(255))
            return pairs([item.name for policy in kornia._params for item in policy.data])
        made["kornia"] = lambda: kornia(x.float().div_(255)).mul_(255).byte(), len(x), kornia_pairs
    made["ours"] = lambda: ours(x), len(x), ours_pairs
    if x.is_cuda:
        made["ours by groups"] = lambda: batch_ops.augment(x, ours.draw(len(x), (size, size))), len(x), ours_pairs
    return made


def measure(device, size, batch, budget) -> list:
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (batch, 3, size, size), dtype=np.uint8)).to(device)
    fs = candidates(x, size)
    for f, _, _ in fs.values(): f()
    times, start = [], time.monotonic()
    while len(times) < 7 or time.monotonic() - start < budget:
        times.append([seconds_of(f, device) for f, _, _ in fs.values()])
    speed = {name: n / t for (name, (_, n, _)), t in zip(fs.items(), np.median(times, axis=0))}
    def row(name):
        if name not in speed: return dict(images_per_s="not measured")
        to_timm, to_nearest = (round(speed[name] / speed.get(o, np.nan), 2) for o in ("timm", "timm nearest"))
        return dict(images_per_s=round(speed[name]), to_timm=to_timm, to_timm_nearest=to_nearest,
                    op_pairs=fs[name][2](), repetitions=len(times))
    return [dict(device=device, size=size, batch=batch, candidate=o, **row(o)) for o in NAMES[device]]


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", choices=CASES, help="only there")
    p.add_argument("--seconds", type=float, default=12, help="of repetitions per image size and batch size")
    p.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV")
    a = p.parse_args()
    torch.set_num_threads(1)
    rows, versions = [], {o: version(o) if found else "not installed" for o, found in dict(
        torchvision=v2, pillow=Image, kornia=KorniaRandAugment, torchaug=TorchaugRandAugment).items()}
    for device, cases in CASES.items():
        if a.device not in (None, device): continue
        for size, batch in cases:
            if device == "cpu" or torch.cuda.is_available(): made = measure(device, size, batch, a.seconds)
            else: made = [dict(device=device, size=size, batch=batch, candidate=o, images_per_s="not measured")
                          for o in NAMES[device]]
            rows += made
            print(pd.DataFrame(made).to_string(index=False), flush=True)
            table = with_others(pd.DataFrame(rows).assign(**machine(), **versions), "randaugment")
            a.out.mkdir(parents=True, exist_ok=True)
            table.astype(dict(op_pairs="Int64", repetitions="Int64")).to_csv(a.out / "randaugment.csv", index=False)
