"Verdicts about networks: counts at their limits, few images, and what the sentences say."
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy.stats import binom, binomtest

from noisy_student.checks import (CHOOSE_BY, against_before, against_chance, against_linear, class_metrics, majority,
                                  mcnemar, p_above, score)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 300), st.integers(2, 20), st.data())
def test_a_verdict_is_the_test(n, k, data):
    """Beyond chance exactly where the tail of the binomial distribution says so; what passes never stops; few never
    stop."""
    correct = data.draw(st.integers(0, n))
    v = against_chance(correct, n, k)
    p = binom.sf(correct - 1, n, 1 / k)
    assert p_above(correct, n, 1 / k) == pytest.approx(p, abs=1e-12) and v.ok == (p < .05) and not (v.ok and v.stop)
    if v.stop: # even twice the chance level is beyond the interval
        assert binom.cdf(correct, n, min(2 / k, (1 + 1 / k) / 2)) < .05 and 'force=True' in v.text
        assert '--force' in v.text
    elif not v.ok: assert f"{n:,} validation image" in v.text and "cannot tell" in v.text
    assert against_chance(n, n, k).stop is False and f"{correct:,}" in v.text


def test_the_most_frequent_class_is_a_bar_but_never_stops():
    for correct, ok in ((95, True), (90, False), (80, False)):
        v = against_chance(correct, 100, 10, majority([0] * 88 + [1] * 12).share)
        assert v[:2] == (ok, False) and "88.0 %" in v.text
        assert ("balanced accuracy" in v.text) == (not ok)
    assert not against_chance(50, 50, 2, 1.).ok  # all validation images are of one class
    assert against_chance(10, 100, 10, .88).stop


def test_at_chance_says_what_to_do():
    text = against_chance(24, 100, 4).text
    for o in ("24 of 100 validation images are right (24.0 %)", "no better than chance", "more labels",
              "pretrained weights", "steps or time", "suspects"): assert o in text
    assert "3 rows cannot tell whether the teacher" in against_chance(1, 3, 4, who='the teacher', things='rows').text
    assert "1 row cannot tell" in against_chance(1, 1, 4, things='rows').text
    assert "not even if all were right" in against_chance(2, 2, 2).text


@pytest.mark.parametrize('call, message', [
    (lambda: against_chance(-1, 4, 2), "correct must be in 0..n"), (lambda: against_chance(0, 0, 2), "n > 0"),
    (lambda: against_chance(1, 4, 1), "n_classes must be from 2 on, got 1"),
                                           (lambda: p_above(1, 2, 1.5), "share must be in"),
    (lambda: majority(np.array([], int)), "at least one label"),
                                           (lambda: against_before([], [], []), "y must be a label per image"),
    (lambda: against_before([0, 1], [0, 1], [0]), "its teacher must be 2 labels"),
    (lambda: class_metrics([0, 2], [0, 1], 2), "y must be in 0..1, got 0..2"),
                                           (lambda: class_metrics([-1, 1], [0, 1], 2), "leave out"),
    (lambda: class_metrics([0, 1], np.ones((2, 3)), 2), r"of shape \(2, 2\) or \(2,\), got \(2, 3\)"),
    (lambda: score(dict(accuracy=1), 'f2'), "must be one of accuracy, balanced_accuracy, f1, log_loss, got 'f2'"),
    (lambda: score(dict(log_loss=None), 'log_loss'), "needs probabilities")])
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(ValueError, match=message): call()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 20), st.integers(1, 20))
def test_pairs(lost, gained, both, neither):
    "Only images that one of the two gets right count; the other way round it is the opposite."
    y = np.zeros(lost + gained + both + neither, int)
    before, pred = (np.r_[np.full(lost, a), np.full(gained, b), np.zeros(both), np.ones(neither)] for a,
                    b in ((0, 1), (1, 0)))
    p = binomtest(gained, lost + gained).pvalue if lost + gained else 1
    assert mcnemar(lost, gained) == mcnemar(gained, lost) == pytest.approx(p)
    v, back = against_before(y, pred, before), against_before(y, before, pred)
    worse, better = (p < .05 and a > b for a, b in ((lost, gained), (gained, lost)))
    assert v[:2] == (not worse, False) and ("worse beyond chance" in v.text) == worse
    assert ("better beyond chance" in v.text) == better
    assert ("worse beyond chance" in back.text) == better
    assert ("cannot tell" in v.text) == (lost + gained < 6) and f"{lost:,} wrong" in v.text
    assert f"{gained:,} right" in v.text
    linear = against_linear(y, pred, before)
    assert linear[:2] == v[:2] and ("start from that head" in linear.text) == worse


def test_metrics_choose():
    "The best by each name is the best by its definition, also in half precision and with classes that are not there."
    rng = np.random.default_rng(0)
    y, prob = rng.integers(0, 3, 300), rng.dirichlet(np.ones(4), 300)
    m, half = class_metrics(y, prob, 4), class_metrics(y, prob.astype(np.float16), 4)
    assert set(m) == set(CHOOSE_BY) and all(isinstance(o, float) for o in m.values())
    assert all(abs(m[k] - half[k]) < .02 for k in m)
    assert m['balanced_accuracy'] == pytest.approx(np.mean([(prob.argmax(1) == y)[y == k].mean() for k in range(3)]))
    assert score(dict(log_loss=.2), 'log_loss') > score(dict(log_loss=.3), 'log_loss')
    assert score(dict(f1=.3), 'f1') > score(dict(f1=.2), 'f1')
