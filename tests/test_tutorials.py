"""Run every tutorial's quick form as Jupyter does, against the package that is installed: without nbdev, as on Colab
and Kaggle.

Its install cell is left out: what that installs must be there already.
"""
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("nbdev"): pytest.skip("tests/test_notebooks.py runs them where there is nbdev", allow_module_level=True)
nbclient = pytest.importorskip("nbclient", reason="runs notebooks: pip install nbclient ipykernel")
pytest.importorskip("ipykernel", reason="runs notebooks: pip install nbclient ipykernel")

import nbformat

NBS = Path(__file__).resolve().parent.parent / "nbs"
if not NBS.is_dir(): pytest.skip("the notebooks are not here", allow_module_level=True)
TUTORIALS = sorted(NBS.glob("tutorials/*.ipynb"))


def test_there_are_tutorials(): assert len(TUTORIALS) >= 8


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda o: o.stem)
def test_tutorial(path: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("NOISY_STUDENT_QUICK", "1")
    nb = nbformat.read(path, as_version=4)
    nb.cells = [o for o in nb.cells if not o.source.startswith("#| eval: false")]
    nbclient.NotebookClient(nb, timeout=600, kernel_name="python3",
                            resources={"metadata": {"path": str(tmp_path)}}).execute()
