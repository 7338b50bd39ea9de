"Draw nbs/images/social-card.png, the picture that goes with a link to the site: the digits tutorial's gain, round by round."
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    runs = pd.read_csv(ROOT / "benchmarks" / "results" / "runs_digits.csv").dropna(subset="round")
    accuracy = 100 * runs[runs.role.isin(["teacher", "student"])].pivot(index="round", columns="seed", values="test_accuracy")
    fig, ax = plt.subplots(figsize=(12, 6.3), dpi=100, facecolor="#14202b")
    fig.subplots_adjust(left=0.56, right=0.94, top=0.78, bottom=0.2)
    ax.set_facecolor("#14202b")
    ax.plot(accuracy, color="#7fb7e6", alpha=0.35, lw=2)
    ax.plot(accuracy.mean(axis=1), "o-", color="#ffb454", lw=4, ms=11)
    ax.set_xticks(range(4), ["teacher", "student 1", "student 2", "student 3"])
    ax.set_title(f"digits, 100 labels: test accuracy (%)\n{accuracy.shape[1]} seeds and their mean", color="#dfe7ee", fontsize=17, pad=14)
    ax.tick_params(colors="#dfe7ee", labelsize=14)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#5d6f80")
    fig.text(0.05, 0.66, "noisy_student", color="white", fontsize=44, weight="bold")
    fig.text(0.05, 0.34, "Noisy Student Training\nfor fastai: teacher, pseudo\nlabels, noised student,\nagain, in one call.", color="#dfe7ee", fontsize=24, linespacing=1.35, va="center")
    fig.savefig(ROOT / "nbs" / "images" / "social-card.png", facecolor=fig.get_facecolor(), metadata={"Software": None})


if __name__ == "__main__":
    main()
