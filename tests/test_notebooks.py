"""Run every notebook as nbdev does: top to bottom, against the modules of this source tree.

A cell marked `#| gpu`, `#| slow` or `#| download` is left out, as is one with `#| eval: false`. A notebook with such
marked cells is a further test that runs them too, selected by pytest's marker of the same name: `pytest -m slow`.
"""
import sys
from pathlib import Path

import pytest

pytest.importorskip("nbdev", reason="nbdev, which runs the notebooks, is not installed: pip install -e '.[dev]'")

from fastcore.xtras import globtastic
from nbdev.config import get_config
from nbdev.process import NBProcessor
from nbdev.test import test_nb as run_notebook

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import noisy_student

NBS = ROOT / "nbs"
FLAGS = get_config(path=ROOT).tst_flags.split()


def notebooks() -> list:  # Parameters (notebook, flag whose cells run as well, or None)
    "List the notebooks: each once without its flagged cells, and once more for each flag it has."
    params = []
    for path in sorted(map(Path, globtastic(NBS, file_glob="*.ipynb", skip_folder_re="^[_.]", skip_file_re="^[_.]"))):
        name = path.relative_to(NBS).with_suffix("").as_posix()
        used = {flag for cell in NBProcessor(path).nb.cells for flag in cell.directives_}
        params.append(pytest.param(path, None, id=name))
        params += [pytest.param(path, f, id=f"{name}-{f}", marks=getattr(pytest.mark, f)) for f in FLAGS if f in used]
    return params


def test_source_tree():
    assert Path(noisy_student.__file__).is_relative_to(ROOT), "this tests an installed copy: pip install -e '.[dev]'"


@pytest.mark.parametrize("path, flag", notebooks())
def test_notebook(path: Path, flag: str | None, monkeypatch):
    monkeypatch.chdir(ROOT)
    ok, _ = run_notebook(path, skip_flags=FLAGS, force_flags=[flag] if flag else [])
    assert ok, f"{path.relative_to(ROOT)} failed: see the traceback under 'Captured stderr call'"
