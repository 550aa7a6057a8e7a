"""What can be told apart: error rates by simulation, and a permutation test done by hand."""

import itertools

import numpy as np
import pytest

from toolkit.experiments.compare import ALPHA, Judged, against_best, f1, holm, p_value


def judge(dice: np.random.Generator, labels: np.ndarray, accuracy: float) -> Judged:
    right = dice.random(len(labels)) < accuracy
    return Judged(labels, np.where(right, labels, 1 - labels).astype(float))


def test_f1_is_that_of_the_counts() -> None:
    judged = Judged(np.array([1, 1, 1, 0, 0]), np.array([1, 0.5, 0, 1, 0]))
    assert f1(judged) == pytest.approx(2 * 1.5 / (2.5 + 3))
    assert f1(Judged(np.zeros(3, int), np.zeros(3))) == 0


def test_p_value_is_that_of_all_swaps() -> None:
    """Eleven rows, seven of them judged differently: 128 ways to swap, counted one by one."""
    labels = np.array([1, 1, 1, 1, 1, 0, 0, 0, 0, 1, 0])
    ours = np.array([1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 0.0])
    theirs = np.array([0, 0, 0, 1, 0, 1, 1, 0, 1, 0, 1.0])
    observed = abs(f1(Judged(labels, ours)) - f1(Judged(labels, theirs)))
    differ = np.flatnonzero(ours != theirs)
    assert len(differ) == 7
    larger = 0
    for swap in itertools.product([False, True], repeat=len(differ)):
        a, b = ours.copy(), theirs.copy()
        rows = differ[list(swap)]
        a[rows], b[rows] = theirs[rows], ours[rows]
        larger += abs(f1(Judged(labels, a)) - f1(Judged(labels, b))) >= observed - 1e-12
    found = p_value(Judged(labels, ours), Judged(labels, theirs))
    assert found == pytest.approx(larger / 128, abs=0.015)
    assert 0.01 < found < 0.9


def test_equal_settings_differ_by_chance_one_time_in_twenty() -> None:
    dice = np.random.default_rng(1)
    labels = dice.integers(0, 2, 300)
    trials = 400
    wrong = sum(
        p_value(judge(dice, labels, 0.88), judge(dice, labels, 0.88), seed) < ALPHA
        for seed in range(trials)
    )
    assert 0.02 < wrong / trials < 0.08


def test_the_best_is_not_called_otherwise_too_often() -> None:
    """Eight settings that do not differ, the best chosen on the same rows: any of them may be it."""
    dice = np.random.default_rng(5)
    labels = dice.integers(0, 2, 300)
    trials, wrong = 150, 0
    for _ in range(trials):
        settings = [judge(dice, labels, 0.88) for _ in range(8)]
        truly_best = settings[0]
        settings.sort(key=f1, reverse=True)
        verdicts = zip(settings[1:], against_best(settings), strict=True)
        wrong += sum(p < ALPHA for setting, p in verdicts if setting is truly_best)
    assert wrong / trials <= ALPHA


def test_a_difference_is_found() -> None:
    dice = np.random.default_rng(2)
    labels = dice.integers(0, 2, 600)
    good, bad = judge(dice, labels, 0.92), judge(dice, labels, 0.82)
    assert p_value(good, bad) < 0.001
    assert p_value(bad, good) == p_value(good, bad)
    assert p_value(good, good) == 1
    assert against_best([good, bad, good])[0] < 0.002


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_the_cost_does_not_depend_on_the_rows() -> None:
    """400,000 test rows: with a table of rows x swaps this would need 30 GB."""
    dice = np.random.default_rng(3)
    labels = dice.integers(0, 2, 400_000)
    assert p_value(judge(dice, labels, 0.95), judge(dice, labels, 0.949)) < 1


def test_a_clear_difference_is_found_among_a_thousand() -> None:
    """The smallest p-value that swaps can give must survive the correction."""
    dice = np.random.default_rng(3)
    labels = dice.integers(0, 2, 600)
    good, bad = judge(dice, labels, 0.95), judge(dice, labels, 0.7)
    assert against_best([good, *[bad] * 1000])[0] < ALPHA
