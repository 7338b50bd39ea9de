"""Two whole runs on CIFAR-10 against the clock, on a GPU.

    python benchmarks/cifar_gpu.py full    # all labels, 110,000 ImageNet-32 images as pool: 94.28 % in 60 s
    python benchmarks/cifar_gpu.py few     # 4,000 labels, the rest as pool: 95.7 % in 15 minutes

`full` is the Keras study's setting: a teacher without noise, ImageNet-32 images labeled by it, a noised student; its
best test accuracy was 94.28 %. `few` is that of FixMatch (4.3 % error, in hours). The settings below are a first guess:
they are to be chosen on 1,000 validation images before a figure is quoted, over at least three seeds. The data are
decoded before the clock starts, and every kernel is compiled and planned: the same networks, batches and noise for
three steps a round, on a few images, into another folder. `mirrored_accuracy` is that of the mean of an image and its
mirror image, as other figures of CIFAR-10 are given; nothing is chosen by it. A seed's row is written after each of its
rounds, for a visit that ends too soon; judging it takes no part of `seconds`. `--quick` runs the same code in seconds,
on a few images and a small network; its figures mean nothing and are not written.
"""
import argparse, tempfile, time
from pathlib import Path

import numpy as np
import pandas as pd
from common import write

from noisy_student.datasets import Split, Splits, cifar10, load_images
from noisy_student.learner import Noise
from noisy_student.network import Network
from noisy_student.rounds import NoisyStudent, load_model

COMMON = dict(rounds=1, optimizer="adamw", schedule="one-cycle", wd=.05, pad=4, min_scale=1., label_smoothing=.1,
              temperature=1., soft=True)
RUNS = {
    "full": dict(data=dict(n_labeled=None, unlabeled="imagenet32", n_valid=1000), archs=["resnet9_64", "resnet9_96"],
                 target=.9428, seconds=60,
                 settings=dict(COMMON, bs=512, ratio=1, epochs=14, teacher_epochs=12, lr=8e-3, threshold=.5,
                               noise=Noise(1, 5, .2, .9), teacher_noise=Noise.none())),
    "few": dict(data=dict(n_labeled=4000, unlabeled="rest", n_valid=1000), archs=["resnet9_64", "resnet9_128"],
                target=.957, seconds=900,
                settings=dict(COMMON, rounds=4, bs=64, ratio=7, epochs=40, teacher_epochs=120, steps=None, lr=3e-3,
                              threshold=.3, ema=.999, noise=Noise(2, 10, .3, .8), teacher_noise=Noise(1, 5, .2, .9))),
}


def few_of(data: Splits) -> Splits:
    "Of every class: labels may be in order."
    def some(s, n): return s[np.linspace(0, len(s) - 1, min(n, len(s))).astype(int)]
    return Splits(some(data.labeled, 200), some(data.unlabeled, 300), some(data.valid, 100), some(data.test, 100),
                  data.classes)


def decoded(data: Splits, cache: Path) -> Splits:
    def pile(s):
        d = load_images(s.images, 32, cache)
        return Split(d.images[:], None if s.labels is None else s.labels[d.good])
    return Splits(pile(data.labeled), pile(data.unlabeled), pile(data.valid), pile(data.test), data.classes)


def warm_up(data: Splits, archs: list[str], path: Path, settings: dict, device: str) -> float:
    "Seconds that the first steps and passes took, which a run in the same process then need not."
    start = time.perf_counter()
    short = dict(settings, rounds=1, epochs=1, teacher_epochs=1, steps=3, threshold=0.)
    NoisyStudent(few_of(data), archs, path, device=device, seed=0, force=True, **short).fit()
    return time.perf_counter() - start


def accuracy(network: Network, data: Split) -> float:
    return float((network.scores(data.images).argmax(1) == data.labels).mean())


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", choices=RUNS)
    p.add_argument("--seeds", type=int, nargs="+", default=[0])
    p.add_argument("--device", default="cuda")
    p.add_argument("--cache", type=Path, help="folder for decoded images; default: a temporary one")
    p.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the CSV")
    p.add_argument("--quick", action="store_true", help="try the code only")
    a = p.parse_args()
    o, rows = RUNS[a.run], []
    with tempfile.TemporaryDirectory() as tmp:
        for seed in a.seeds:
            data = cifar10(**o["data"], seed=seed)
            data = decoded(few_of(data) if a.quick else data, a.cache or Path(tmp) / "cache")
            archs, settings = o["archs"], o["settings"]
            if a.quick:
                archs, settings = ["resnet9_4"], dict(settings, rounds=1, epochs=1, teacher_epochs=1, bs=20, ratio=1,
                                                      threshold=0.)
            warm = warm_up(data, archs, Path(tmp) / f"{seed}-warm", settings, a.device)
            run = NoisyStudent(data, archs, Path(tmp) / str(seed), seed=seed, device=a.device, force=a.quick,
                               **settings)
            seconds, rows = 0., [*rows, {}]
            for k in range(settings["rounds"] + 1):
                start = time.perf_counter()
                summary = run.fit_to(k)
                seconds += time.perf_counter() - start
                network, best = load_model(run.path, a.device), summary.set_index("round").loc[run.best]
                network.mirrored = True
                rows[-1] = dict(device=a.device, case=a.run, seed=seed, seconds=round(seconds, 1),
                                warm_up=round(warm, 1), rounds=k, round=run.best,
                                teacher_accuracy=summary.test_accuracy[0], valid_accuracy=best.valid_accuracy,
                                test_accuracy=best.test_accuracy, mirrored_accuracy=accuracy(network, data.test),
                                target_accuracy=o["target"], target_seconds=o["seconds"])
                print(pd.DataFrame(rows[-1:]).to_string(index=False), flush=True)
                if not a.quick: write(f"cifar_gpu_{a.run}", rows, a)
