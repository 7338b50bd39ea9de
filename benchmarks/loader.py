"""Images per second of the input path with RandAugment (two operations per image), against fastai's stock loader.

    python benchmarks/loader.py [--threads 2] [--workers 2] [--device cuda]

Imagenette (160 px) at 128 px, random resized crop, flip, RandAugment, normalization. `fastai stock`: `ImageDataLoaders`
with `RandomResizedCrop` and our PIL RandAugment as item transforms, in two worker processes. `ours, decoding`: what the
first epoch costs once per run, decoding into the cache. `ours, delivery`: from the second epoch on, what the host has
to do when a GPU augments: batches of uint8 from the memory-mapped cache. `ours, all`: delivery and all augmentation on
the device; on the CPU this is RandAugment on the same two cores. `ratio` is speed over fastai's. The target of 10 is
for delivery with the augmentation on the device; on a machine without a GPU the host's part alone can be measured, so
`delivery` is an upper bound there of what a fast GPU would see. Time that passes is measured: run it on an idle
machine. Without Imagenette and a network that brings it, 1,000 images are made, which the column `case` says: they are
easier to decode than photographs, so that the first two rows are no measure there, and the last two still are.
"""
import tempfile, time
from pathlib import Path

import numpy as np
import torch
from common import arguments, save
from fastai.data.external import URLs, untar_data
from fastai.data.transforms import Normalize, get_image_files, parent_label
from fastai.vision.augment import RandomResizedCrop
from fastai.vision.data import ImageDataLoaders
from PIL import Image

from noisy_student.dataloaders import ArrayDL, ResizedCropFlip, mixed_dataloaders
from noisy_student.datasets import load_images
from noisy_student.randaugment import BatchRandAugment, RandAugment

SIZE, BATCH, STATS = 128, 64, ([.485, .456, .406], [.229, .224, .225])


def rate(batches, device, limit) -> tuple[float, int]:
    """Images per second until `limit` seconds are over, and how many those were; the first batch, which starts workers,
    is left out"""
    n, start, it = 0, None, iter(batches)
    for x, *_ in it:
        if device == "cuda": torch.cuda.synchronize()
        if start is None: start = time.perf_counter()
        else: n += len(x)
        if time.perf_counter() - start > limit: break
    return n / (time.perf_counter() - start), n


def again(loader):
    while True: yield from loader


def photographs(tmp: Path) -> tuple[Path, str]:
    "A folder whose `train` has a folder of images per class, and words for them if they are not Imagenette's."
    try: return untar_data(URLs.IMAGENETTE_160), ""
    except OSError as e: print(f"Imagenette cannot be had ({e}): images are made instead", flush=True)
    rng = np.random.default_rng(0)
    for i in range(1000):
        coarse = Image.fromarray(rng.integers(0, 256, (20, 26, 3), dtype=np.uint8))
        file = tmp / "train" / "ab"[i % 2] / f"{i}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        coarse.resize((213, 160), Image.Resampling.BICUBIC).save(file)
    return tmp, ", made images"


def cases(a, tmp):
    path, made = photographs(tmp)
    files = get_image_files(path / "train")
    rng, speeds = np.random.default_rng(0), {}
    files = [files[i] for i in rng.permutation(len(files))[:3000]]
    def row(candidate, speed, n):
        speeds[candidate] = speed
        return [dict(device=a.device, case=f"{SIZE} px{made}", candidate=candidate, images_per_s=round(speed),
                     ratio=round(speed / speeds["fastai stock"], 2), images=n)]
    stock = ImageDataLoaders.from_path_func(path, files, parent_label, valid_pct=.01, bs=BATCH, num_workers=a.workers,
                                            device=torch.device(a.device),
                                            item_tfms=[RandomResizedCrop(SIZE, min_scale=.35), RandAugment(2, 10)],
                                            batch_tfms=[Normalize.from_stats(*STATS, cuda=False)])
    yield row("fastai stock", *rate(again(stock.train), a.device, a.seconds))
    start = time.perf_counter()
    images = load_images([str(o) for o in files], SIZE, tmp / "cache").images
    yield row("ours, decoding, once", len(images) / (time.perf_counter() - start), len(images))
    labels = np.zeros(len(images), np.int64)
    dls = mixed_dataloaders((images, labels), (images[:64], labels[:64]), ["a", "b"], bs=BATCH, stats=STATS,
                            device=a.device, augment=[ResizedCropFlip(.35), BatchRandAugment(2, 10)])
    plain = ArrayDL(dls.train.dataset, bs=BATCH, shuffle=True)
    yield row("ours, delivery", *rate(again(plain), a.device, a.seconds / 2))
    yield row("ours, all on the " + ("CPU" if a.device == "cpu" else "GPU"),
              *rate(again(dls.train), a.device, a.seconds))


if __name__ == "__main__":
    p = arguments(__doc__, seconds=10)
    p.add_argument("--workers", type=int, default=2, help="processes of fastai's loader")
    p.set_defaults(threads=2)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    with tempfile.TemporaryDirectory() as tmp: save("loader", cases(a, Path(tmp)), a)
