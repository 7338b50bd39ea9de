"""Everything that wants a GPU, in one command: the tests marked gpu, the benchmarks of speed, and two runs on CIFAR-10.

    python benchmarks/gpu.py [--only tests step label] [--out DIR] [--device cpu --quick]

Every part is a process of its own with its own time limit; one that fails or runs out of time does not stop the others.
All together stay below ten minutes; `few` (CIFAR-10 with 4,000 labels, 15 minutes) and `compile` run only when they are
named. The CSV files go to --out (default: $OUT, else benchmarks/results), with what each part printed beside them in
PART.txt, and a short table is printed at the end. `loader` wants Imagenette, `full` and `few` CIFAR-10 and Tiny
ImageNet where fastai keeps its data, or a network to fetch them. The exit code is 1 if a part failed. With `--device
cpu --quick` the same parts run for a moment each, to see that they work, with fifteen minutes for each part.
"""
import argparse, os, subprocess, sys, tempfile, time
from pathlib import Path

import pandas as pd

HERE = Path(__file__).parent
PARTS = {  # name: (seconds it may take, script or module with its arguments, what --quick changes)
    "tests": (60, ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"], None),
    "bench": (40, ["-c", "import sys; from noisy_student.cli import main; sys.exit(main())", "bench", "--json"],
              ["--arch", "resnet9_4", "--size", "16", "--bs", "8"]),
    "randaugment": (70, ["randaugment.py", "--seconds", "10"], ["--seconds", ".1"]),
    "stochastic_depth": (100, ["stochastic_depth.py", "--seconds", "8"],
                         ["--seconds", ".1", "--models", "resnet9_24", "resnet9_64"]),
    "step": (80, ["step.py", "--seconds", "6"], ["--seconds", ".1", "--models", "resnet9_8", "resnet9_64"]),
    "label": (60, ["label.py", "--seconds", "12"], ["--seconds", ".1", "--models", "resnet9_24", "resnet9_64"]),
    "loader": (70, ["loader.py", "--seconds", "10"], ["--seconds", ".5"]),
    "compile": (400, ["compile.py", "--seconds", "15"], ["--seconds", ".1"]),
    "full": (110, ["cifar_gpu.py", "full"], ["--quick"]),
    "few": (1000, ["cifar_gpu.py", "few"], ["--quick"]),
}
PLAIN = ("tests",)  # look for a GPU themselves
NAMED = ("few", "compile")  # take long


def run(name: str, a: argparse.Namespace) -> dict:
    "Run a part; its output goes to a file."
    limit, command, quick = PARTS[name]
    if command[0].endswith(".py"): command = [str(HERE / command[0]), *command[1:]]
    if name not in PLAIN: command = [*command, "--device", a.device]
    if name not in ("tests", "bench"): command += ["--out", str(a.out)]
    if a.quick: command, limit = [*command, *(quick or [])], 900
    a.out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with open(a.out / f"{name}.txt", "w") as log:
        try:
            code = subprocess.run([sys.executable, "-W", "ignore", *command], cwd=HERE.parent, stdout=log,
                                  stderr=subprocess.STDOUT, timeout=limit).returncode
        except subprocess.TimeoutExpired: code = "out of time"
    ok = code == 0 or (name == "tests" and code == 5)  # 5: no test has the marker
    return dict(part=name, result="ok" if ok else f"failed: {code}", seconds=round(time.monotonic() - start),
                limit=limit, output=str(a.out / f"{name}.txt"))


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", nargs="+", choices=PARTS, help="these parts")
    p.add_argument("--device", default="cuda")
    p.add_argument("--quick", action="store_true", help="a moment each, to see that they work")
    p.add_argument("--out", type=Path,
                   help="default: $OUT, else benchmarks/results, or with --quick a temporary folder")
    a = p.parse_args()
    a.out = a.out or Path(tempfile.mkdtemp() if a.quick else os.environ.get("OUT", HERE / "results"))
    rows = []
    for name in a.only or [o for o in PARTS if o not in NAMED]:
        rows.append(run(name, a))
        print("{part}: {result} in {seconds} s".format(**rows[-1]), flush=True)
    print(pd.DataFrame(rows).to_string(index=False))
    for name in [o["part"] for o in rows if o["result"] == "ok"]:
        file = a.out / f"{dict(full='cifar_gpu_full', few='cifar_gpu_few').get(name, name)}.csv"
        if file.exists(): print(f"\n{name}\n" + pd.read_csv(file).query("device == @a.device").to_string(index=False))
    sys.exit(any(o["result"] != "ok" for o in rows))
