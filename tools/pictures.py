"""Draw the pictures of the documentation: nbs/images/social-card.png and nbs/images/loop.png.

    python tools/pictures.py

The first is the gain on digits, round by round, from benchmarks/results. The second shows the loop on images of a run
with seed 0, which is made for it (about a minute on two cores).
"""
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes

from noisy_student.datasets import Splits, digits
from noisy_student.randaugment import BatchRandAugment
from noisy_student.recipes import RECIPES
from noisy_student.rounds import NoisyStudent

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "nbs" / "images"
RUNS = pd.read_csv(ROOT / "benchmarks" / "results" / "runs_digits.csv").dropna(subset="round")
SEEDS = f"{RUNS.seed.nunique()} seeds and their mean"
NIGHT, TEXT, DIM, BLUE, ORANGE = "#14202b", "#dfe7ee", "#5d6f80", "#7fb7e6", "#ffb454"


def save(fig: plt.Figure, name: str) -> None:
    fig.savefig(IMAGES / name, facecolor=NIGHT, metadata={"Software": None})


def gain(ax: Axes, size: float) -> None:
    "Test accuracy on digits by round: every seed, and the mean."
    accuracy = 100 * RUNS[RUNS.role.isin(["teacher", "student"])].pivot(index="round", columns="seed",
                                                                        values="test_accuracy")
    ax.set_facecolor(NIGHT)
    ax.plot(accuracy, color=BLUE, alpha=0.35, lw=size / 7)
    ax.plot(accuracy.mean(axis=1), "o-", color=ORANGE, lw=size / 3.5, ms=size * 0.75)
    ax.set_xticks(range(4), ["teacher", "student 1", "student 2", "student 3"])
    ax.tick_params(colors=TEXT, labelsize=size)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(DIM)


def social_card() -> None:
    fig, ax = plt.subplots(figsize=(12, 6.3), dpi=100)
    fig.subplots_adjust(left=0.56, right=0.94, top=0.78, bottom=0.2)
    gain(ax, 14)
    ax.set_title(f"digits, 100 labels: test accuracy (%)\n{SEEDS}", color=TEXT, fontsize=17, pad=14)
    fig.text(0.05, 0.66, "noisy_student", color="white", fontsize=44, weight="bold")
    words = "Noisy Student Training\nfor fastai: teacher, pseudo\nlabels, noised student,\nagain, in one call."
    fig.text(0.05, 0.34, words, color=TEXT, fontsize=24, linespacing=1.35, va="center")
    save(fig, "social-card.png")


def pseudo_labels(data: Splits) -> pd.DataFrame:  # The teacher's, of the pool: item, label, confidence, ...
    with tempfile.TemporaryDirectory() as tmp:
        NoisyStudent(data, "resnet9_8", Path(tmp) / "run", recipe="digits", rounds=1, seed=0).fit()
        return pd.read_parquet(Path(tmp) / "run" / "round_1" / "pseudo_labels", columns=["item", "label", "confidence"])


def loop(rows: int = 3, cols: int = 6) -> None:
    "Three panels: what the teacher is sure of and what not, what the student gets to see, what comes of it."
    data, recipe = digits(n_labeled=100, seed=0), RECIPES["digits"]
    labels = pseudo_labels(data).sort_values("confidence", ascending=False)
    # Two rows of what is kept, evenly spread over their confidences, one of what is left out
    kept = labels[labels.confidence >= recipe.threshold]
    kept = kept.iloc[np.linspace(0, len(kept) - 1, (rows - 1) * cols).round().astype(int)]
    left_out = labels[labels.confidence < recipe.threshold].iloc[-cols:]
    fig = plt.figure(figsize=(12, 4), dpi=100)
    panels = fig.subfigures(1, 3, width_ratios=[1, 1, 0.9])
    heads = (("The teacher labels the pool", "what it doubts is left out"),
             ("A student learns under noise", "distorted images, layers dropped at random"),
             ("The student becomes the teacher", "100 labeled digits: test accuracy (%)"))
    for number, (panel, (head, under)) in enumerate(zip(panels, heads), 1):
        panel.set_facecolor(NIGHT)
        panel.text(0.5, 0.9, f"{number}   {head}", color="white", fontsize=13, ha="center")
        panel.text(0.5, 0.82, under, color=TEXT, fontsize=10.5, ha="center")
    axes = panels[0].subplots(rows, cols, gridspec_kw=dict(left=0.03, right=0.97, top=0.71, bottom=0.03, hspace=0.4,
                                                           wspace=0.1))
    for ax, o in zip(axes.flat, pd.concat([kept, left_out]).itertuples()):
        ok = o.confidence >= recipe.threshold
        ax.imshow(data.unlabeled.images[o.item, ..., 0], cmap="gray", alpha=1 if ok else 0.45)
        ax.set_title(f"{data.classes[o.label]}: {100 * o.confidence:.0f} %", fontsize=9,
                     color=TEXT if ok else "#8fa1b1", pad=3)
        ax.set_facecolor(NIGHT)
        ax.axis("off")
    images = torch.from_numpy(np.asarray(data.unlabeled.images)[kept.item]).permute(0, 3, 1, 2)
    big = torch.nn.functional.interpolate(images.float(), size=32, mode="bilinear").round().byte()
    noised = BatchRandAugment(n=recipe.noise.randaugment_n, m=recipe.noise.randaugment_m,
                              seed=3)(torch.cat([big, big[:cols]]))
    axes = panels[1].subplots(rows, cols, gridspec_kw=dict(left=0.05, right=0.95, top=0.74, bottom=0.03, hspace=0.08,
                                                           wspace=0.08))
    for ax, image in zip(axes.flat, noised):
        ax.imshow(image[0], cmap="gray", vmin=0, vmax=255)
        ax.axis("off")
    ax = panels[2].subplots(gridspec_kw=dict(left=0.1, right=0.91, top=0.74, bottom=0.11))
    gain(ax, 10)
    ax.text(0.98, 0.05, SEEDS, color=TEXT, fontsize=10, ha="right", transform=ax.transAxes)
    save(fig, "loop.png")


if __name__ == "__main__":
    social_card()
    loop()
