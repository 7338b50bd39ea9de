"""Make the photographs of the quick forms: python tools/photographs.py, with fastai's CIFAR-10 in its data folder.

It writes noisy_student/cifar10_sample.tar.gz, 60 of the 5,000 training images of each class as they lie in the folder,
byte by byte: `cifar10_sample` reads them. It was run once, on the copy in JPEG of quality 75 that nbs/cards.md speaks
of; another copy gives other bytes.

CIFAR-10 is by Alex Krizhevsky, Vinod Nair and Geoffrey Hinton, a labeled part of 80 Million Tiny Images. Its page,
https://www.cs.toronto.edu/~kriz/cifar.html, states no license and asks to cite A. Krizhevsky, Learning Multiple Layers
of Features from Tiny Images, 2009. The license of this package does not cover these images.
"""
import gzip, io, tarfile
from pathlib import Path

import numpy as np
from fastai.data.external import URLs, untar_data

TARGET = Path(__file__).resolve().parent.parent / "noisy_student" / "cifar10_sample.tar.gz"
PER_CLASS = 60


def sample(folder: Path, n: int, seed: int = 0) -> list[Path]:  # n files of every class
    rng = np.random.default_rng(seed)
    classes = [sorted(o.iterdir()) for o in sorted(folder.iterdir()) if o.is_dir()]
    return [files[i] for files in classes for i in np.sort(rng.choice(len(files), n, replace=False))]


def pack(files: list[Path], target: Path) -> None:
    "The same bytes from the same files: nothing of the machine or the hour goes in."
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as t:
        for o in files:
            member = tarfile.TarInfo(f"{o.parent.name}/{o.name}")
            member.size = o.stat().st_size
            with open(o, "rb") as f: t.addfile(member, f)
    target.write_bytes(gzip.compress(packed.getvalue(), mtime=0))


if __name__ == "__main__":
    pack(sample(untar_data(URLs.CIFAR) / "train", PER_CLASS), TARGET)
    print(f"{TARGET}: {TARGET.stat().st_size:,} bytes")
