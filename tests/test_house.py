"""How the modules hang together, read from their imports and from the sidebar of the site, which lists them from the
ground up: a module needs only modules that stand before it there, hence no two need each other, and no private name of
another.

A module at the top of a file is loaded with it; one inside a function is needed all the same, only later, so it counts
too."""
import ast, html, json, re
from collections import Counter
from pathlib import Path

import pytest
import yaml

import noisy_student

FOLDER = Path(noisy_student.__file__).parent
ROOT = FOLDER.parent
LINES, CELL = 200, 80  # that a notebook and a cell of it export at most, imports and blank lines left out
if not (ROOT/"_quarto.yml").exists(): pytest.skip("needs the source tree", allow_module_level=True)


def imported(source):
    "(module of the package, name or None) for each import of a module, anywhere in it."
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found = [(o.name.partition("noisy_student.")[2], None) for o in node.names if "noisy_student." in o.name]
        elif isinstance(node, ast.ImportFrom):
            here = node.module if node.level == 1 else (node.module or "").partition("noisy_student.")[2]
            whole = node.level == 1 and not node.module or node.level == 0 and node.module == "noisy_student"
            found = [(o.name, None) if whole else (here, o.name) for o in node.names] if here or whole else []
        else: continue
        yield from found


def sources(): return {f.stem: f.read_text() for f in FOLDER.glob("*.py") if f.stem not in ("__init__", "_modidx")}


def order():
    "Modules as the sidebar lists their notebooks."
    def hrefs(entries):
        for o in entries:
            if isinstance(o, str): yield o
            else: yield from hrefs(o.get("contents", [])) if "section" in o else [o.get("href", "")]
    listed = hrefs(yaml.safe_load((ROOT/"_quarto.yml").read_text())["website"]["sidebar"]["contents"])
    cells = [json.loads((ROOT/"nbs"/o).read_text())["cells"] for o in listed if o.endswith(".ipynb")]
    said = ["".join(c["source"]).partition("#| default_exp ")[2].split("\n")[0].strip() for nb in cells for c in nb]
    return [o for o in said if o]


def upward(files, place):
    "Imports of what does not stand before, as (module, what it needs)."
    return sorted({(k, o) for k, v in files.items() for o, _ in imported(v) if o in files and place[o] >= place[k]})


def private(files):
    "Private names that a module takes from another, also as attributes of it."
    found = {(k, f"{o}.{n}") for k, v in files.items() for o, n in imported(v)
             if o in files and n and n.startswith("_") and not n.startswith("__")}
    for k, v in files.items():
        modules = {o for o, n in imported(v) if n is None} | {n for _, n in imported(v) if n in files}
        found |= {(k, f"{n.value.id}.{n.attr}") for n in ast.walk(ast.parse(v)) if isinstance(n, ast.Attribute)
                  and n.attr.startswith("_") and isinstance(n.value, ast.Name) and n.value.id in modules}
    return sorted(found)


def exported(cells):
    "The exported lines of a notebook's cells, a list per cell, imports and blank lines left out."
    sources = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    return [[o for o in c.split("\n") if o.strip() and not o.startswith(("#|", "import ", "from "))]
            for c in sources if c.startswith("#| export")]


def words(text): return Counter(re.findall(r"[^\W\d]{2,}", text))


def disagreeing(cells):
    "Where a table that a notebook shows has other words in a terminal than on a page: something replaced them in one."
    for data in (o.get("data", {}) for c in cells for o in c.get("outputs", [])):
        page, text = ("".join(data.get(o, "")) for o in ("text/html", "text/plain"))
        is_whole = 'class="dataframe"' in page and "..." not in page + text and not text.startswith("ReportTable(")
        if not is_whole: continue
        shown, heads = (words(html.unescape(" ".join(re.findall(f"<(?:{o})[^>]*>(.*?)</", page, re.S))))
                        for o in ("td|p", "th"))
        if missing := shown - words(text): yield missing
        if more := set(words(text) - shown) - set(heads): yield more


def test_committed_tables_say_the_same_in_a_terminal_and_on_a_page():
    found = {f.name: list(disagreeing(json.loads(f.read_text())["cells"])) for f in (ROOT/"nbs").rglob("*.ipynb")}
    assert len(found) > 100 and not {k: v for k, v in found.items() if v}
    table = {"text/html": '<table class="dataframe"><td>of the pool</td></table>', "text/plain": "of the pool"}
    for other, n in ((table, 0), ({**table, "text/plain": "of the pool, of the pool"}, 1)):
        assert len(list(disagreeing([dict(outputs=[dict(data=other)])]))) == n


def test_a_module_needs_only_what_stands_before_it():
    files, listed = sources(), order()
    assert sorted(listed) == sorted(files) and len(listed) > 40
    assert upward(files, {o: i for i, o in enumerate(listed)}) == []


def test_no_private_name_of_another_module(): assert private(sources()) == []


def test_a_notebook_is_one_room():
    cells = {f.stem: exported(json.loads(f.read_text())["cells"]) for f in (ROOT/"nbs").glob("*.ipynb")}
    assert {k: n for k, v in cells.items() if (n := sum(map(len, v))) > LINES} == {}
    assert [(k, n) for k, v in cells.items() for c in v if (n := len(c)) > CELL] == []
    assert [o for v in cells.values() for c in v for o in c if len(o) > 120] == []


def test_what_is_planted_is_found():
    files, place = {"files": "x = 1", "report": "from .files import x"}, {"files": 0, "report": 1}
    assert upward(files, place) == [] and private(files) == []
    for line in ("from .report import y", "def f():\n    from noisy_student.report import y", "from . import report",
                 "import noisy_student.report", "from noisy_student import report"):
        assert upward({**files, "files": line}, place) == [("files", "report")], line
    cell = dict(cell_type="code", source=["#| export\n", "import x\n", "\n", "a\n", "b"])
    assert exported([cell, dict(cell, source=["a"]), cell]) == [["a", "b"]] * 2
    for line in ("from .files import _x", "from . import files\nfiles._x", "from noisy_student import files\nfiles._x"):
        assert private({**files, "report": line}) == [("report", "files._x")], line
