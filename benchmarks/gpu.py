"""Everything that wants a GPU, in one command: right, fast, good. For a machine that is lent for a quarter of an hour.

    python benchmarks/gpu.py speed          # kernels, tests marked gpu, benchmarks of speed: 340 s
    python benchmarks/gpu.py cifar10        # two whole runs on CIFAR-10, CUDA graphs, torch.compile: 560 s
    python benchmarks/gpu.py step label     # some parts
    python benchmarks/gpu.py speed --kit .gpu    # on a machine without network, which lacks packages and data
    python benchmarks/gpu.py speed cifar10 --device cpu --quick    # a rehearsal without a GPU: a moment each

Parts run in order of importance, each as a process of its own. Each has its share of the visit and what the parts
before it left of theirs; what a part leaves running is ended with it, and one that fails does not stop the others. Each
part writes its CSV after every case, so that what was measured stays when time runs out. The files go to --out
(default: benchmarks/results, with --quick a temporary folder), with what each part printed in PART.txt. Where $OUT
names a folder, it gets them as one file, results.tar.gz, and table.txt, how the parts ended, both anew after each part.
`full` and `few` want CIFAR-10 and Tiny ImageNet where fastai keeps its data, or a network to fetch them, `loader`
Imagenette, or it makes images; decoded images and compiled kernels are kept in --cache. The exit code is 1 if a part
failed.

A --kit is a folder made elsewhere: base/site.tar.xz, the packages that are missing, as they lie in site-packages;
base/unpack.py, whose `unpack(folder, data)` makes a data set out of a packed folder; and packed folders, with a *.head
each. What is there is unpacked into --cache, once, and later calls find it there, with or without the folder.
"""
import argparse, os, runpy, shutil, signal, subprocess, sys, tarfile, tempfile, time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
QUICK_LIMIT = 900  # seconds of a part in a rehearsal, also on slow cores
MARKED = "tests marked gpu"  # stands for their files, since importing all others takes long
COMMAND_LINE = "import sys; from noisy_student.cli import main; sys.exit(main())"
SMALL = ["--seconds", ".1", "--models", "resnet9_24", "resnet9_64"]
VERSIONS = """
import sys, torch
from importlib.metadata import distributions
print(sys.version.split()[0], torch.cuda.is_available() and torch.cuda.get_device_name())
wanted = "torch", "triton", "torchvision", "timm", "fastai", "numpy", "pandas", "duckdb"
print(*sorted({f"{o.name} {o.version}" for o in distributions() if o.name in wanted}), sep=", ")
sys.exit("cuda" in sys.argv and not torch.cuda.is_available())
"""
PARTS = {  # name: (its share of the visit in seconds, script or options of Python, what --quick adds)
    "speed": {
        "machine": (20, ["-c", VERSIONS], []),
        "kernels": (75, ["kernels.py", "--seconds", "1"], ["--quick"]),
        "tests": (75, ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--tb=short", MARKED], []),
        "randaugment": (25, ["randaugment.py", "--seconds", "6"], ["--seconds", ".1"]),
        "step": (45, ["step.py", "--seconds", "2"], ["--seconds", ".1", "--models", "resnet9_8", "resnet9_64"]),
        "label": (25, ["label.py", "--seconds", "6"], SMALL),
        "stochastic_depth": (30, ["stochastic_depth.py", "--seconds", "2"], SMALL),
        "bench": (20, ["-c", COMMAND_LINE, "bench", "--json"], ["--arch", "resnet9_4", "--size", "16", "--bs", "8"]),
        "loader": (25, ["loader.py", "--seconds", "5"], ["--seconds", ".5"])},
    "cifar10": {
        "full": (110, ["cifar_gpu.py", "full", "--cache", "{cache}/decoded"], ["--quick"]),
        "few": (360, ["cifar_gpu.py", "few", "--cache", "{cache}/decoded"], ["--quick"]),
        "graphs": (45, ["graphs.py", "--seconds", "2"], ["--seconds", ".1"]),
        "compile": (45, ["compile.py", "--seconds", "4"], ["--seconds", ".1", "--models", "linear", "resnet9_64"])}}
TOTAL = {group: sum(share for share, *_ in members.values()) for group, members in PARTS.items()}


def parts(names: list[str]) -> dict[str, tuple]:
    "Those that are named, also by their group, in the order of importance."
    return {k: v for group, members in PARTS.items() for k, v in members.items() if group in names or k in names}


def command(name: str, a: argparse.Namespace) -> list[str]:
    "What is run, without Python."
    _, first, quick = parts([name])[name]
    words = [o.replace("{cache}", str(a.cache)) for o in first]
    if words[0].endswith(".py"): words[0] = str(HERE / words[0])
    if words[-1] == MARKED:
        return words[:-1] + [str(o) for o in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in o.read_text()]
    out = [] if words[0] == "-c" else ["--out", str(a.out)]
    return [*words, "--device", a.device, *out, *(quick if a.quick else [])]


def unpack(kit: Path, cache: Path) -> None:
    "Packages and data sets out of a kit, unless they are in the cache."
    site, data, base = cache / "site", cache / "fastai" / "data", kit / "base"
    if not (site / ".whole").exists():
        with tarfile.open(base / "site.tar.xz") as t: t.extractall(site, filter="data")
        (site / ".whole").touch()
    data.mkdir(parents=True, exist_ok=True)
    for o in sorted({f.parent for f in kit.glob("*/*.head")}):
        print(o.name, runpy.run_path(str(base / "unpack.py"))["unpack"](o, data), "files", flush=True)


def environment(a: argparse.Namespace) -> dict[str, str]:
    "Of every part."
    path, new = [ROOT, HERE, os.environ.get("PYTHONPATH")], {}
    if a.kit:
        path.insert(2, a.cache / "site")
        new = dict(FASTAI_HOME=str(a.cache / "fastai"), HF_HUB_OFFLINE="1")
    return dict(os.environ, PYTHONPATH=os.pathsep.join(map(str, filter(None, path))), PYTHONUNBUFFERED="1",
                MPLBACKEND="Agg", TRITON_CACHE_DIR=str(a.cache / "triton"), TORCH_COMPILE_DISABLE_PROGRESS="1", **new)


def run(name: str, limit: float, a: argparse.Namespace) -> str:
    "Run a part, its output into a file, and say how it ended. It and all that it started are gone afterwards."
    with open(a.out / f"{name}.txt", "w") as log:
        p = subprocess.Popen([sys.executable, "-W", "ignore", *command(name, a)], cwd=ROOT, env=environment(a),
                             stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try: code = p.wait(limit)
        except subprocess.TimeoutExpired: code = f"out of time ({limit:.0f} s)"
        finally:
            try: os.killpg(p.pid, signal.SIGKILL)
            except ProcessLookupError: pass
            p.wait()
    no_gpu = name == "tests" and a.device == "cpu" and code in (0, 5)  # 5: nothing was selected
    return "ok" if code == 0 or no_gpu else f"failed: {code}"


def last_lines(file: Path, n: int) -> str:
    "The end of what a part printed."
    return "\n".join(o[:230] for o in file.read_text(errors="replace").strip().splitlines()[-n:])


def hand_over(rows: list[str], a: argparse.Namespace) -> None:
    "What there is so far, whatever becomes of the rest."
    (a.out / "table.txt").write_text("\n".join(rows) + "\n")
    if not a.pack: return
    a.pack.mkdir(parents=True, exist_ok=True)
    shutil.copy(a.out / "table.txt", a.pack)
    with tarfile.open(a.pack / "results.tar.gz.part", "w:gz") as t: t.add(a.out, "results")
    os.replace(a.pack / "results.tar.gz.part", a.pack / "results.tar.gz")


def main(a: argparse.Namespace) -> int:
    "Run the parts within the time. Returns the exit code."
    begun, rows = time.monotonic(), []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the part in progress is ended, too
    for o in (a.out, a.cache): o.mkdir(parents=True, exist_ok=True)
    if a.kit: unpack(a.kit, a.cache)
    end = time.monotonic()
    second = (a.total - (end - begun)) / sum(share for share, *_ in parts(a.what).values())  # of a share
    for name, (share, *_) in parts(a.what).items():
        start = time.monotonic()
        end += share * second
        if end - start < 2:
            rows.append(f"{name:18} not begun: no time left")
            continue
        try: result = run(name, end - start - 1, a)
        except SystemExit: # the visit is called off: what this part has written counts, too
            hand_over([*rows, f"{name:18} called off"], a)
            raise
        rows.append(f"{name:18} {result:28} {time.monotonic() - start:5.0f} s")
        print(f"\n== {rows[-1]}\n" + last_lines(a.out / f"{name}.txt", 12 if result == "ok" else 25), flush=True)
        hand_over(rows, a)
    rows.append(f"all: {time.monotonic() - begun:.0f} s")
    hand_over(rows, a)
    print("\n" + "\n".join(rows))
    return int(any(" ok " not in o for o in rows[:-1]))


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", nargs="+", choices=[*PARTS, *(o for g in PARTS.values() for o in g)], help="groups or parts")
    p.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    p.add_argument("--total", type=float, help="seconds; default: 340 for speed, 560 for cifar10, 900 for both")
    p.add_argument("--quick", action="store_true", help="a moment each, to see that they work")
    p.add_argument("--out", type=Path, help="folder of the results")
    p.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "noisy_student_gpu", help="folder")
    p.add_argument("--kit", type=Path, help="packages and data for a machine without network")
    a = p.parse_args()
    a.cache = a.cache.resolve()
    a.pack = Path(os.environ["OUT"]).resolve() if os.environ.get("OUT") else None
    a.out = (a.out or (Path(tempfile.mkdtemp()) if a.quick or a.pack else HERE / "results")).resolve()
    if a.quick: PARTS = {g: {k: (QUICK_LIMIT, *v[1:]) for k, v in m.items()} for g, m in PARTS.items()}
    groups = [g for g, m in PARTS.items() if {g, *m} & set(a.what)]
    a.total = a.total or (QUICK_LIMIT * len(parts(a.what)) if a.quick else sum(TOTAL[g] for g in groups))
    sys.exit(main(a))
