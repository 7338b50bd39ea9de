"""Seconds of `import noisy_student.learner`, against `import fastai.vision.all`, each in a fresh interpreter.

    python benchmarks/imports.py

In turns, CPU time of the whole process, with the bytecode of a first import at hand. Almost all of it is torch and
torchvision, fastai and timm, which fastai imports too; the row of torch says how much of it.
"""
import os, subprocess, sys

import common
from common import arguments, in_turns, save

LINES = {"fastai.vision.all": "import fastai.vision.all", "noisy_student.learner": "import noisy_student.learner",
         "noisy_student.rounds": "import noisy_student.rounds", "noisy_student.cli": "import noisy_student.cli",
         "torch and torchvision": "import torch, torchvision"}
ENV = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}


def cpu_seconds(f, device):
    before = os.times()
    f()
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


if __name__ == "__main__":
    a = arguments(__doc__, seconds=60).parse_args()
    common.seconds_of = cpu_seconds
    fs = {name: (lambda line=line: subprocess.run([sys.executable, "-W", "ignore", "-c", line], check=True, env=ENV))
          for name, line in LINES.items()}
    rows = in_turns(fs, "cpu", a.seconds, "fastai.vision.all")
    save("imports", [[dict(candidate=k, **v) for k, v in rows.items()]], a)
