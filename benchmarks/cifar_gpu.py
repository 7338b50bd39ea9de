"""Two whole runs on CIFAR-10 against the clock, on a GPU; the data are decoded before the clock starts.

    python benchmarks/cifar_gpu.py full    # all labels, 110,000 ImageNet-32 images as pool: 94.28 % in 60 s
    python benchmarks/cifar_gpu.py few     # 4,000 labels, the rest as pool: 95.7 % in 15 minutes

`full` is the Keras study's setting: a teacher without noise, ImageNet-32 images labeled by it, a noised student; its
best test accuracy was 94.28 %. `few` is that of FixMatch (4.3 % error, in hours). The settings below are a first guess:
they are to be chosen on validation data before a figure is quoted, over at least three seeds. `--quick` runs the same
code in seconds, on a few images and a small network; its figures mean nothing and are not written.
"""
import argparse, tempfile, time
from pathlib import Path

import numpy as np
import pandas as pd
from common import write

from noisy_student.datasets import Split, Splits, cifar10, load_images
from noisy_student.learner import Noise
from noisy_student.rounds import NoisyStudent

COMMON = dict(rounds=1, optimizer="adamw", schedule="one-cycle", wd=.05, pad=4, min_scale=1., label_smoothing=.1,
              temperature=1., soft=True)
RUNS = {
    "full": dict(data=dict(n_labeled=None, unlabeled="imagenet32"), archs=["resnet9_64", "resnet9_96"], target=.9428,
                 seconds=60,
                 settings=dict(COMMON, bs=512, ratio=1, epochs=14, teacher_epochs=12, lr=8e-3, threshold=.5,
                               noise=Noise(1, 5, .2, .9), teacher_noise=Noise.none())),
    "few": dict(data=dict(n_labeled=4000, unlabeled="rest"), archs=["resnet9_64", "resnet9_128"], target=.957,
                seconds=900,
                settings=dict(COMMON, rounds=4, bs=64, ratio=7, epochs=40, teacher_epochs=120, steps=None, lr=3e-3,
                              threshold=.3, ema=.999, noise=Noise(2, 10, .3, .8), teacher_noise=Noise(1, 5, .2, .9))),
}


def decoded(data: Splits, cache: Path, quick: bool) -> Splits:
    def pile(s, n):
        if quick: s = s[np.linspace(0, len(s) - 1, n).astype(int)]  # of every class: labels may be in order
        d = load_images(s.images, 32, cache)
        return Split(d.images[:], None if s.labels is None else s.labels[d.good])
    return Splits(pile(data.labeled, 200), pile(data.unlabeled, 300), pile(data.valid, 100), pile(data.test, 100),
                  data.classes)


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
            data = decoded(cifar10(**o["data"], seed=seed), a.cache or Path(tmp) / "cache", a.quick)
            archs, settings = o["archs"], o["settings"]
            if a.quick:
                archs, settings = ["resnet9_4"], dict(settings, rounds=1, epochs=1, teacher_epochs=1, bs=20, ratio=1,
                                                      threshold=0.)
            start = time.perf_counter()
            run = NoisyStudent(data, archs, Path(tmp) / str(seed), seed=seed, device=a.device, **settings)
            summary = run.fit()
            best = summary.set_index("round").loc[run.best]
            rows.append(dict(device=a.device, case=a.run, seed=seed, seconds=round(time.perf_counter() - start, 1),
                             round=run.best,
                             teacher_accuracy=summary.test_accuracy[0], valid_accuracy=best.valid_accuracy,
                             test_accuracy=best.test_accuracy,
                             target_accuracy=o["target"], target_seconds=o["seconds"]))
            print(pd.DataFrame(rows[-1:]).to_string(index=False), flush=True)
            if not a.quick: write(f"cifar_gpu_{a.run}", rows, a)
