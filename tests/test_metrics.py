"""Counts against scikit-learn, intervals against scipy and by simulation."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score

from toolkit.record.metrics import Confusion, as_record, estimates, f1, table, wilson

counts = st.integers(0, 50)


@given(counts, counts, counts, counts)
def test_values_are_those_of_scikit_learn(tp: int, fp: int, fn: int, tn: int) -> None:
    truth = [1] * tp + [0] * fp + [1] * fn + [0] * tn
    guess = [1] * tp + [1] * fp + [0] * fn + [0] * tn
    found = estimates(Confusion(tp, fp, fn, tn))
    if not truth:
        assert all(estimate.value is None for estimate in found.values())
        return
    assert found["accuracy"].value == pytest.approx(accuracy_score(truth, guess))
    for name, score in (("precision", precision_score), ("recall", recall_score), ("f1", f1_score)):
        if found[name].value is None:
            assert tp == 0
        else:
            assert found[name].value == pytest.approx(score(truth, guess))
    for estimate in found.values():
        assert (
            0 <= estimate.low <= (estimate.value or 0) <= estimate.high <= 1
            or estimate.value is None
        )


@given(st.integers(0, 200), st.integers(0, 200))
def test_wilson_is_scipys(successes: int, failures: int) -> None:
    trials = successes + failures
    if trials == 0:
        assert wilson(0, 0) == (0.0, 1.0)
        return
    expected = binomtest(successes, trials).proportion_ci(method="wilson")
    assert wilson(successes, trials) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_bounds_of_all_and_nothing_are_exact() -> None:
    assert all(wilson(n, n)[1] == 1.0 and wilson(0, n)[0] == 0.0 for n in range(1, 2000))


def test_five_of_five_is_not_certainty() -> None:
    estimate = estimates(Confusion(tp=3, tn=2))["accuracy"]
    assert estimate.value == 1.0
    assert estimate.low < 0.6


def test_f1_intervals_cover_the_truth_about_95_times_in_100() -> None:
    """Draw test sets of 60 rows from a known population; Wald-type intervals fail this."""
    rng = np.random.default_rng(0)
    shares = np.array([0.45, 0.06, 0.05, 0.44])  # tp fp fn tn
    truth = 2 * shares[0] / (2 * shares[0] + shares[1] + shares[2])
    draws = rng.multinomial(60, shares, size=2000)
    hits = [
        estimate.low <= truth <= estimate.high
        for estimate in (f1(Confusion(*d)) for d in draws.tolist())
    ]
    assert 0.93 <= np.mean(hits) <= 0.98


def test_record_and_table_show_everything() -> None:
    record = as_record(Confusion(8, 2, 1, 9), 0.25)
    assert (record["n"], record["loss"]) == (20, 0.25)
    text = table(record, "test")
    for part in (
        "n = 20",
        "accuracy  0.8500",
        "precision",
        "recall",
        "f1",
        "tp 8  fp 2  fn 1  tn 9",
    ):
        assert part in text
    assert "n/a" in table(as_record(Confusion(), None), "nothing")
