"""Change the library in small ways, one at a time, and count the changes that no law notices.

    pip install cosmic-ray
    python benchmarks/mutations.py --mutants 12
    python benchmarks/mutations.py --again survived

Of every core module so many mutants are drawn (--seed), and on top of them every function that returns nothing is
emptied once: nothing breaks where its result is missing, so only a law about what it does can notice. Two thirds of
those drawn are cosmic-ray's (another operator, number, condition, decorator), one variant per place; a third lack a
statement, which cosmic-ray has no operator for. Left out is what no law can be about: annotations, and the first
assignment to a local name. Tests run in a copy of the tree, those of the module alone (`LAWS`), in processes forked
after the libraries are imported; the first failure ends them. A mutant that takes 20 s and five times as long is a
timeout, and counts as noticed.

Writes results/mutations.csv, a row per mutant, and goes on where it was stopped. `first` is what came of it when it was
first tried, `outcome` what came of it last (--again runs those with that outcome once more), `why` is written by hand
beside what survives: "equivalent" says that no input shows the difference.
"""
import argparse, ast, difflib, gc, json, os, random, re, resource, shlex, shutil, signal, sys, tempfile
import time, warnings
from pathlib import Path

os.environ.update(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", TRITON_INTERPRET="1", PYTHONWARNINGS="ignore",
                  NOISY_STUDENT_QUICK="1", MPLBACKEND="agg")
warnings.simplefilter("ignore")

# What tests import: here once, so that a fork has it. Nothing of noisy_student.
import fastai.vision.all, matplotlib.pyplot, duckdb, pyarrow.parquet, scipy.stats  # noqa: E401, F401
import sklearn.metrics, timm, torchmetrics  # noqa: E401, F401
import hypothesis
import pandas as pd
import pytest
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.provider import OperatorProvider
from nbdev.test import test_nb as run_notebook

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT/"benchmarks"/"results"/"mutations.csv"
SELECT = "tests/test_pseudo_labels.py -k 'select or binned or keras or copies or stay or threshold or empty"
DEPTH = "tests/test_stochastic_depth.py -k 'not (fastai or efficientnet or regnetz or convnext or maxvit)'"
LAWS = {  # module: where its laws are, a notebook or what pytest takes
    "losses": ["03h_losses", "tests/test_losses.py", "tests/test_target_checks.py -k 'warned_of_once'"],
    "stochastic_depth": ["03f_stochastic_depth", "tests/test_stochastic_depth.py -k block_law", DEPTH],
    "survival_probability": ["03e_survival_probability", "03f_stochastic_depth", DEPTH],
    "dropout": ["03c_dropout", DEPTH],
    "training_noise": ["03b_training_noise", "03c_dropout", "03f_stochastic_depth", DEPTH],
    "image_ops": ["02a_image_ops", "02e_randaugment", "tests/test_randaugment.py -k 'not worker'"],
    "batch_ops": ["02c_batch_ops", "02e_randaugment", "tests/test_randaugment.py -k 'not worker'"],
    "randaugment": ["02e_randaugment", "tests/test_randaugment.py"],
    "label_table": ["05a_label_table", "tests/test_pseudo_labels.py -k 'format or confid or table or shards'",
                    "tests/test_untrusted.py -k 'no_selection or ones_own'"],
    "label_filters": ["05h_label_filters", "05j_selection", f"{SELECT} or mistakes'",
                      "tests/test_selection_scale.py -k 'cannot_be or says_its_share'"],
    "balance": ["05i_balance", f"{SELECT} or mistakes or broken'"],
    "selection": ["05j_selection", f"{SELECT} or relabel or folder_names or read_selection'",
                  "tests/test_untrusted.py -k 'no_selection or ones_own'"],
    "metrics": ["07a_metrics", "tests/test_evaluation.py -k 'wilson or scores or ece or temperature'"],
    "round_scores": ["06a_round_scores", "06b_checks", "07b_rundir"],
    "training": ["04e_training", "tests/test_recipes.py -k 'stairs or killed or fly_targets or averaged or early'"],
    "training_state": ["04g_training_state", "04h_checkpoints"],
    "fitting": ["06g_fitting", "08f_time_limit",
                "tests/test_recipes.py -k 'stairs or accumul or shortcuts or rate or fly_targets or stopped_early'"],
    "auto": ["06e_auto", "06f_configure", "08f_time_limit", "tests/test_time.py -k 'plan or limit'"],
    "columns": ["01f_columns", "01g_dataframes", "tests/test_tables.py"],
}


class Source:
    "A module's text, and the places in it that can be mutated."
    def __init__(self, text: str):
        self.text, self.tree, self.lines = text, ast.parse(text), text.splitlines(keepends=True)
        self.starts = [0]
        for o in self.lines: self.starts.append(self.starts[-1] + len(o))

    def at(self, line: int, column: int) -> int: return self.starts[line - 1] + column

    def span(self, first: ast.AST, last: ast.AST | None = None) -> tuple[int, int]:
        "Where nodes begin and end in the text; Python counts the bytes of a line."
        def of(line, column): return self.at(line, len(self.lines[line - 1].encode()[:column].decode()))
        last = last or first
        return of(first.lineno, first.col_offset), of(last.end_lineno, last.end_col_offset)

    def without(self, first: ast.AST, last: ast.AST | None = None) -> str:
        a, b = self.span(first, last)
        return self.text[:a] + "pass" + self.text[b:]

    def functions(self):
        return [o for o in ast.walk(self.tree) if isinstance(o, (ast.FunctionDef, ast.AsyncFunctionDef))]

    def emptied(self) -> list[tuple]:
        "Every function that returns nothing."
        found = []
        for f in self.functions():
            body = undocumented(f.body)
            own = list(inside(f))
            gives = any(isinstance(o, (ast.Yield, ast.YieldFrom)) or isinstance(o, ast.Return) and o.value for o in own)
            if body and not gives and not all(isinstance(o, ast.Pass) for o in body):
                found.append((body[0].lineno, "empty function", [lambda b=body: self.without(b[0], b[-1])]))
        return found

    def deleted(self) -> list[tuple]:
        "Every statement of a function or class, but for those that define a name."
        found = []
        for f in self.functions():
            bound, args = {}, f.args
            for o in args.args + args.posonlyargs + args.kwonlyargs + [args.vararg, args.kwarg]:
                if o: bound[o.arg] = 0
            own = [o for o in inside(f) if o is not f]
            for o in own:
                if isinstance(o, ast.Name) and isinstance(o.ctx, ast.Store):
                    bound[o.id] = min(bound.get(o.id, o.lineno), o.lineno)
            for o in own:
                if not isinstance(o, (ast.Expr, ast.Assign, ast.AugAssign, ast.If, ast.With, ast.Raise, ast.Return,
                                      ast.Delete, ast.Continue, ast.Break)): continue
                if isinstance(o, ast.Expr) and isinstance(o.value, ast.Constant): continue
                names = [n.id for n in ast.walk(o) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
                if any(bound.get(n, 0) >= o.lineno for n in names): continue
                found.append((o.lineno, "delete statement", [lambda o=o: self.without(o)]))
        for c in ast.walk(self.tree):
            if isinstance(c, ast.ClassDef):
                found += [(o.lineno, "delete statement", [lambda o=o: self.without(o)]) for o in c.body
                          if isinstance(o, ast.Assign)]
        return sorted(found, key=lambda o: o[0])

    def replaced(self) -> list[tuple]:
        "Places of cosmic-ray's operators, each with its variants."
        aside = [o.annotation for o in ast.walk(self.tree) if isinstance(o, (ast.arg, ast.AnnAssign)) and o.annotation]
        aside += [f.returns for f in self.functions() if f.returns]
        aside += [o for o in self.tree.body if isinstance(o, (ast.Import, ast.ImportFrom)) or isinstance(o, ast.Assign)
                  and getattr(o.targets[0], "id", "") in ("__all__", "_all_")]
        spans = [self.span(o) for o in aside]
        nodes, provider, places = list(ast_nodes(get_ast(self.text))), OperatorProvider(), {}
        for name in provider:
            if provider[name].arguments(): continue  # operators that are told what to look for
            operator, n = provider[name](), 0
            for node in nodes:
                for start, stop in operator.mutation_positions(node):
                    a = self.at(*start)
                    if not any(s <= a < e for s, e in spans):
                        places.setdefault((start, stop, name.partition("_")[0]), []).append((name, n))
                    n += 1
        return [(start[0], kind, [lambda name=name, n=n: mutate_code(self.text, provider[name](), n)
                                  for name, n in variants]) for (start, _, kind), variants in sorted(places.items())]


def inside(f):
    "Nodes of a function, but not of functions within it."
    yield f
    todo = list(f.body)
    while todo:
        o = todo.pop()
        yield o
        if not isinstance(o, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)):
            todo += ast.iter_child_nodes(o)


def undocumented(body):
    doc = body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
    return body[1:] if doc else body


def difference(old: str, new: str) -> tuple[str, str]:
    "The lines that differ, as the table shows them: long ones around where they differ."
    lines = [o for o in difflib.ndiff(old.splitlines(), new.splitlines()) if o[:2] in ("- ", "+ ")]
    old, new = (" ".join(" ".join(o[2:].split()) for o in lines if o[0] == sign) for sign in "-+")
    same = max(0, len(os.path.commonprefix([old, new])) - 70)
    return tuple("…"[:same] + o[same:same + 160] + "…"[:len(o[same + 160:])] for o in (old, new))


def valid(text, old):
    "Whether a mutant is a program, and another one."
    try: return text is not None and ast.dump(ast.parse(text)) != ast.dump(ast.parse(old))
    except SyntaxError: return False


def drawn(module: str, n: int, seed: int) -> list[dict]:
    "The mutants of a module: line, operator, before, after, text."
    source = Source((ROOT/"noisy_student"/f"{module}.py").read_text())
    rng, mutants, seen = random.Random(f"{seed} {module}"), [], set()
    def take(places, wanted):
        for line, operator, variants in places:
            if not wanted: return
            rng.shuffle(variants)
            text = next((t for v in variants if valid(t := v(), source.text) and t not in seen), None)
            if text is None: continue
            seen.add(text)
            before, after = difference(source.text, text)
            mutants.append(dict(module=module, line=line, operator=operator, before=before, after=after, text=text))
            wanted -= 1
    take(source.emptied(), 1000)
    deleted, replaced = source.deleted(), source.replaced()
    rng.shuffle(deleted)
    rng.shuffle(replaced)
    take(deleted, n // 3)
    take(replaced, n - n // 3)
    return mutants


def laws_hold(tree: Path, law: str, cpu: float | None) -> str:
    "Run the tests `law` in a process of their own: survived, killed or timeout."
    log = tree/"log.txt"
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.setsid()
            fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for o in (1, 2): os.dup2(fd, o)
            if cpu:
                sys.dont_write_bytecode = True  # of equal times and sizes a stale one would be read
                os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
                resource.setrlimit(resource.RLIMIT_CPU, (int(cpu), int(cpu) + 5))
                now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (now + 2**33,) * 2)
            os.chdir(tree)
            os.environ["PYTHONPATH"] = str(tree)
            sys.path.insert(0, str(tree))
            if law.startswith("tests/"):
                hypothesis.settings.register_profile("mutants", deadline=None, derandomize=True, database=None, phases=(
                    hypothesis.Phase.explicit, hypothesis.Phase.generate))  # a failure is enough, it need not be small
                code = pytest.main(["-q", "-x", "-n", "0", "-p", "no:cacheprovider", "--hypothesis-profile", "mutants",
                                    *shlex.split(law)])
            else:
                flags = "gpu slow download".split()
                code = not run_notebook(tree/"nbs"/f"{law}.ipynb", skip_flags=flags, force_flags=[])[0]
        finally: os._exit(int(code))
    until = time.monotonic() + (60 + 10 * cpu if cpu else 3600)  # other processes may want the core
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        late = time.monotonic() > until
        if done or late:
            try: os.killpg(pid, signal.SIGKILL)  # what the tests have left behind
            except ProcessLookupError: pass
            if not done: os.waitpid(pid, 0)
            break
        time.sleep(.02)
    if late or os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL): return "timeout"
    return "survived" if status == 0 else "killed"


def cpu_seconds():
    o = resource.getrusage(resource.RUSAGE_CHILDREN)
    return o.ru_utime + o.ru_stime


def in_notebook(told: str, old: str, new: str) -> str:
    "The notebook of a module with the mutant in it: it runs its own cells, not what was exported of them."
    def cells(text): return {o[:o.index("\n")].split("#")[-1]: o for o in text.split("\n# %% ")[1:]}
    before, nb = cells(old), json.loads(told)
    changed = {k: v for k, v in cells(new).items() if v != before[k]}
    for cell in nb["cells"]:
        if text := changed.pop(cell["id"], None):
            directives = [o for o in cell["source"] if o.startswith("#|")]
            cell["source"] = [*directives, *text.splitlines(keepends=True)[1:]]
    assert not changed
    return json.dumps(nb)


class Bench:
    "A copy of the tree in which one module at a time is another."
    def __init__(self):
        self.tree = Path(tempfile.mkdtemp())/"tree"
        shutil.copytree(ROOT, self.tree, ignore=shutil.ignore_patterns(".git", "_docs", "_proc", "runs"))
        self.seconds = {}

    def machine(self) -> dict:
        "That of runs.py, asked in a fork, since it imports noisy_student."
        file = self.tree/"machine.json"
        if not (pid := os.fork()):
            try:
                sys.path[:0] = [str(ROOT), str(ROOT/"benchmarks")]
                from runs import machine
                file.write_text(json.dumps(machine()))
            finally: os._exit(0)
        os.waitpid(pid, 0)
        return json.loads(file.read_text())

    def judge(self, module: str, text: str) -> dict:
        file = self.tree/"noisy_student"/f"{module}.py"
        whole, seconds = file.read_text(), 0.
        notebook = self.tree/"nbs"/re.search(r"nbs/(\S+\.ipynb)", whole)[1]
        told = notebook.read_text()
        mutant = in_notebook(told, whole, text)
        for law in LAWS[module]:
            limit = 20 + 5 * self.cost(law)
            for o in file.parent.glob(f"__pycache__/{module}.*"): o.unlink()
            file.write_text(text)
            notebook.write_text(mutant)
            start = time.monotonic()
            try: outcome = laws_hold(self.tree, law, limit)
            finally: file.write_text(whole); notebook.write_text(told)
            seconds += time.monotonic() - start
            if outcome != "survived": break
        return dict(outcome=outcome, seconds=round(seconds, 1))

    def cost(self, law: str) -> float:
        "CPU seconds of tests without a mutant, under which they must pass."
        if law not in self.seconds:
            start = cpu_seconds()
            if laws_hold(self.tree, law, None) != "survived":
                sys.exit(f"{law} fails without a mutant:\n{(self.tree/'log.txt').read_text()[-3000:]}")
            self.seconds[law] = cpu_seconds() - start
            print(f"{law}: {self.seconds[law]:.1f} s", flush=True)
        return self.seconds[law]


KEYS = ["module", "line", "operator", "before", "after"]


def again(row: dict) -> str:
    "The text of a mutant of the table, whose line may have moved."
    source = Source((ROOT/"noisy_student"/f"{row['module']}.py").read_text())
    places = [o for o in source.emptied() + source.deleted() + source.replaced() if o[1] == row["operator"]]
    for _, _, variants in sorted(places, key=lambda o: abs(o[0] - row["line"])):
        for v in variants:
            if valid(t := v(), source.text) and difference(source.text, t) == (row["before"], row["after"]): return t
    sys.exit(f"{row['module']}, line {row['line']}: {row['before']!r} is not there any more")


def summary(table: pd.DataFrame) -> pd.DataFrame:
    "Per module, what was drawn and what died; the share is of the mutants that change behavior."
    same = table.why.fillna("").str.startswith("equivalent")
    t = pd.DataFrame(dict(module=table.module, mutants=1, died_first=table["first"].ne("survived"),
                          died=table.outcome.ne("survived"), equivalent=same)).groupby("module", sort=False).sum()
    t.loc["all"] = t.sum()
    return t.assign(percent=(100 * t.died / (t.mutants - t.equivalent)).round(1))


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--mutants", type=int, default=12, help="drawn from every module; 0: print the table")
    p.add_argument("--modules", nargs="+", default=list(LAWS), choices=list(LAWS))
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--again", choices=("survived", "killed", "timeout"), help="try rows with this outcome once more")
    a = p.parse_args()
    rows = pd.read_csv(OUT, keep_default_na=False).to_dict("records") if OUT.exists() else []
    seen, bench = {tuple(o[k] for k in KEYS) for o in rows}, Bench()
    machine = bench.machine()
    def judged(row, text):
        row |= bench.judge(row["module"], text) | machine
        row.setdefault("first", row["outcome"])
        print(row["outcome"], *(row[k] for k in KEYS), row["seconds"], sep=" | ", flush=True)
        pd.DataFrame(rows).reindex(columns=[*KEYS, "first", "outcome", "seconds", "why", "seed", *machine]).to_csv(
            OUT, index=False)
    gc.collect()
    gc.freeze()  # a fork need not look through what it was born with
    for module in a.modules:
        if a.again:
            for row in rows:
                if row["module"] == module and row["outcome"] == a.again and not row["why"].startswith("equivalent"):
                    judged(row, again(row))
            continue
        for o in drawn(module, a.mutants, a.seed) if a.mutants else ():
            text = o.pop("text")
            if tuple(o[k] for k in KEYS) in seen: continue
            rows.append(o | dict(seed=a.seed, why=""))
            judged(rows[-1], text)
    shutil.rmtree(bench.tree.parent)
    print(summary(pd.DataFrame(rows)).to_string())
