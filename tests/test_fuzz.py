"""Inputs that nobody would send: no traceback, no hang, whatever comes. benchmarks/fuzz.py does the same 10,000 times
and more."""
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from fuzz import CHECKS, KINDS, WORDS, check_image, check_line, one, sample

SLOW = ("line", "streams", "begun", "crafted begun", "table", "crafted table")  # tens of milliseconds each


@pytest.mark.parametrize("kind", list(CHECKS))
def test_whole_files_are_used(kind): assert CHECKS[kind](sample(kind)) == "used"


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_files_and_lines(kind):
    for i in range(12 if kind in SLOW or "fold" in kind else 40): one(kind, np.random.default_rng(i))


@settings(max_examples=60)
@given(st.binary(max_size=200))
def test_any_bytes_as_an_image(data): check_image(data)


@pytest.mark.parametrize("kind", list(CHECKS))
@settings(max_examples=15)
@given(data=st.binary(max_size=100))
def test_any_bytes_as_a_file(kind, data): CHECKS[kind](data)


@settings(max_examples=25)
@given(st.lists(st.one_of(st.sampled_from(WORDS), st.text(max_size=12)), max_size=6))
def test_any_command_line(words): check_line(words)
