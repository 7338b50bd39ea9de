"""Do the lowest versions that settings.ini allows work, each with the newest of everything else?

    python tools/floors.py                  every floor, minutes each; those of torch download gigabytes
    python tools/floors.py duckdb pandas    these floors
    python tools/floors.py duckdb==1.5      another version than the floor, to find the lowest that works

uv makes a fresh environment for each. In it a short run on digits, its report, a prediction, and the tests that use
the package most must pass, and none may be skipped.
"""
import os
import re
import subprocess
import sys
import tempfile
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LABELS = "tests/test_pseudo_labels.py", "select or binned or format"
LEARNER = "tests/test_learner_is_ordinary.py", "show or export or half_precision"
HELP = "tests/test_cli.py", "help or version"
TESTS = {  # Of a package: files, and what pytest -k takes
    "fastai": LEARNER, "torch": LEARNER, "pyarrow": LABELS, "duckdb": LABELS, "typer": HELP, "rich": HELP,
    "timm": ("tests/test_models.py", "parameters or timms or small_image or groups"),
    "pandas": ("tests/test_tables.py", "not polars"),
    "pillow": ("tests/test_randaugment.py tests/test_predictions.py", "pillow or pil or gray or broken"),
    "safetensors": ("tests/test_untrusted.py", "model_file"),
    "filelock": ("tests/test_torn.py", "without_locks"),
    "jinja2": ("tests/test_report.py", "names or made_of_rows"),
    "cleanlab": ("tests/test_suspects.py", "cleanlab or two_classes"),
    "imagecorruptions": ("tests/test_evaluation.py", "corruptions or library"),
}
EXPORT = "tests/test_models.py tests/test_cli.py", "onnx"
RUN = """if True:
    import sys
    from noisy_student.cli import main
    from noisy_student.learner import noisy_student_learner
    run = "digits --seed 0 --set epochs=1 --set teacher_epochs=1 --rounds 1 --out"
    for line in f"run {run} {sys.argv[1]}", f"report {sys.argv[1]}", f"predict {sys.argv[1]} nbs/images/loop.png":
        if main(line.split()): sys.exit(f"noisy-student {line}")
"""


def floors() -> list[tuple[str, str, list[str]]]:  # Package, its lowest version, what is installed with it
    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    groups = {k: ini["DEFAULT"][k].split() for k in ("requirements", "eval_requirements", "export_requirements")}
    return [(*one.split(">="), list(dict.fromkeys(groups["requirements"] + group)))
            for group in groups.values() for one in group if ">=" in one]


def passes(package: str, version: str, needed: list[str]) -> bool:
    "Say how it went, and what else could not be the newest."
    others = "|".join(one.split(">=")[0] for one in needed if not one.startswith(package + ">="))
    files, words = EXPORT if any(one.startswith("onnx") for one in needed) else TESTS[package]
    how = {"cwd": ROOT, "env": os.environ | {"PYTHONPATH": str(ROOT)}, "capture_output": True, "text": True}
    with tempfile.TemporaryDirectory() as tmp:
        python = f"{tmp}/env/bin/python"
        wanted = [f"{package}=={version}", *needed, "pytest", "pytest-xdist", "hypothesis", "torchmetrics"]
        steps = [["uv", "venv", "--python", "3.11", f"{tmp}/env"],
                 ["uv", "pip", "install", "--quiet", "--python", python, *wanted],
                 [python, "-c", RUN, f"{tmp}/run"],
                 [python, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", *files.split(), "-k", words]]
        for step in steps:
            done = subprocess.run(step, **how)
            good = done.returncode == 0 and not re.search(r"\d skipped", done.stdout)
            if not good: break
        old = subprocess.run(["uv", "pip", "list", "--outdated", "--python", python], **how).stdout
    print(f"{package}=={version}: {'passes' if good else 'FAILS'}; not the newest beside it:",
          ", ".join("==".join(line.split()[:2]) for line in re.findall(rf"^(?:{others}) .*", old, re.M)) or "none")
    if not good: print(*(done.stdout + done.stderr).splitlines()[-30:], sep="\n")
    return good


if __name__ == "__main__":
    asked = dict((one + "==").split("==")[:2] for one in sys.argv[1:])
    if unknown := asked.keys() - {name for name, *_ in floors()}:
        sys.exit(f"settings.ini states no lowest version of {', '.join(unknown)}")
    sys.exit(not all([passes(name, asked.get(name) or floor, needed) for name, floor, needed in floors()
                      if name in (asked or [name])]))
