"Settings that hold for every test."
import os

# before torch is imported: the tests run side by side, a process per core
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NOISY_STUDENT_QUICK", "1")  # tutorials in their short form, also where there is a GPU

import pytest
import torch
from hypothesis import settings

# Triton decides at its first import whether to compile or to interpret
if not torch.cuda.is_available(): os.environ.setdefault("TRITON_INTERPRET", "1")

# The first call of a fastai or torch function loads what it needs and is slow: a deadline would blame the test for it.
# The same examples on every run: a failure can be repeated, and a change is judged by its own effect.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture(scope="module")
def one_thread():
    "Of torch, for the tests of a module, whatever OMP_NUM_THREADS says: runs that must be equal round alike."
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


@pytest.fixture
def no_page(monkeypatch):
    "For tests of runs, not of their pages: drawing report.html takes longer than a small run."
    from noisy_student import report
    monkeypatch.setattr(report, "report_html", lambda *_: "<html></html>\n")
