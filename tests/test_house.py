"""How the modules hang together, read from their imports: no two need each other.

A module at the top of a file is loaded with it; one inside a function is needed all the same, only later, so it counts too. Two
pairs still do: the command `folds=` makes another class of the same run, and RandAugment hands a batch on a GPU to its kernels."""
import ast
from pathlib import Path

import noisy_student

FOLDER = Path(noisy_student.__file__).parent
PAIRS = {("folds", "rounds"), ("fused", "randaugment")}


def imports(source, names):
    "Modules of the package that a module imports, anywhere in it."
    found = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ImportFrom): continue
        module = node.module or ""
        if node.level == 1: found |= {module.split(".")[0]} if module else {o.name for o in node.names}
        elif module.startswith("noisy_student."): found.add(module.split(".")[1])
    return found & names


def circles(graph):
    "Sets of modules that need each other."
    def reach(start):
        seen, todo = set(), [start]
        while todo:
            for o in graph[todo.pop()] - seen: seen.add(o); todo.append(o)
        return seen
    far = {o: reach(o) for o in graph}
    return {tuple(sorted(p for p in far[o] if o in far[p])) for o in graph if o in far[o]}


def package():
    files = {f.stem: f.read_text() for f in FOLDER.glob("*.py") if f.stem not in ("__init__", "_modidx")}
    return {k: imports(v, set(files)) - {k} for k, v in files.items()}


def test_no_two_modules_need_each_other():
    graph = package()
    assert len(graph) > 40 and circles(graph) == PAIRS


def test_a_planted_circle_is_found():
    graph = package()
    graph["files"].add("report")
    assert any({"files", "report"} <= set(o) for o in circles(graph))
    assert imports("def f():\n    from noisy_student.report import x\n    from . import files", {"report", "files"}) == {"report", "files"}
