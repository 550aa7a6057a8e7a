"""What can be told apart: error rates by simulation, a permutation test done by hand, and a t-test."""

import itertools

import numpy as np
import pytest
import scipy.stats

from toolkit.experiments.compare import (
    ALPHA,
    Judged,
    against_best,
    chance_gaps,
    f1,
    holm,
    p_value,
)


def judge(dice: np.random.Generator, labels: np.ndarray, accuracy: float) -> Judged:
    return judge_seeds(dice, labels, [accuracy])


def judge_seeds(dice: np.random.Generator, labels: np.ndarray, accuracies: list[float]) -> Judged:
    """Return what seeds make of rows that are all as hard as each other."""
    right = dice.random((len(accuracies), len(labels))) < np.array(accuracies)[:, None]
    return Judged(labels, np.where(right, labels, 1 - labels))


def test_f1_is_that_of_the_counts() -> None:
    judged = Judged(np.array([1, 1, 1, 0, 0]), np.array([[1, 1, 0, 1, 0], [1, 0, 0, 1, 0]]))
    assert f1(judged) == pytest.approx(2 * 1.5 / (2.5 + 3))
    assert f1(Judged(np.zeros(3, int), np.zeros((1, 3)))) == 0


def test_p_value_is_that_of_all_swaps() -> None:
    """Eleven rows, seven of them judged differently: 128 ways to swap, counted one by one."""
    labels = np.array([1, 1, 1, 1, 1, 0, 0, 0, 0, 1, 0])
    ours = np.array([1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 0])
    theirs = np.array([0, 0, 0, 1, 0, 1, 1, 0, 1, 0, 1])
    a, b = Judged(labels, ours[None]), Judged(labels, theirs[None])
    observed = abs(f1(a) - f1(b))
    differ = np.flatnonzero(ours != theirs)
    assert len(differ) == 7
    larger = 0
    for swap in itertools.product([False, True], repeat=len(differ)):
        swapped = np.stack([ours, theirs])
        rows = differ[list(swap)]
        swapped[:, rows] = swapped[::-1, rows]
        gap = f1(Judged(labels, swapped[:1])) - f1(Judged(labels, swapped[1:]))
        larger += abs(gap) >= observed - 1e-12
    found = p_value(a, b)
    assert found == pytest.approx(larger / 128, abs=0.015)
    assert 0.01 < found < 0.9


def test_equal_settings_differ_by_chance_one_time_in_twenty() -> None:
    dice = np.random.default_rng(1)
    labels = dice.integers(0, 2, 300)
    trials = 400
    wrong = sum(
        p_value(judge(dice, labels, 0.88), judge(dice, labels, 0.88), (), seed) < ALPHA
        for seed in range(trials)
    )
    assert 0.02 < wrong / trials < 0.08


@pytest.mark.parametrize("seeds", [(3, 3), (2, 5), (4, 4)])
def test_where_rows_are_many_it_is_welchs_test_of_the_seeds(seeds: tuple[int, int]) -> None:
    dice = np.random.default_rng(6)
    labels = dice.integers(0, 2, 200_000)
    a, b = (
        judge_seeds(dice, labels, list(dice.normal(mean, spread, number)))
        for mean, spread, number in zip((0.90, 0.88), (0.02, 0.01), seeds, strict=True)
    )
    expected = scipy.stats.ttest_ind(f1_of_each(a), f1_of_each(b), equal_var=False).pvalue
    assert 0.01 < expected < 0.9
    assert p_value(a, b) == pytest.approx(expected, abs=0.015)


def test_a_setting_of_one_seed_is_taken_to_spread_as_the_others_do() -> None:
    """Pooled, with the degrees of freedom that their own spreads leave to their sum."""
    dice = np.random.default_rng(13)
    labels = dice.integers(0, 2, 200_000)
    a, b, *others = (
        judge_seeds(dice, labels, list(dice.normal(mean, 0.01, number)))
        for mean, number in ((0.90, 1), (0.87, 1), (0.88, 2), (0.86, 3))
    )
    variances, freedom = np.array([np.var(f1_of_each(other), ddof=1) for other in others]), [1, 2]
    pooled = freedom @ variances / 3
    of_sum = (freedom @ variances) ** 2 / (freedom @ variances**2)
    expected = 2 * scipy.stats.t.sf(abs(f1(a) - f1(b)) / np.sqrt(2 * pooled), df=of_sum)
    assert 0.05 < expected < 0.5
    assert p_value(a, b, others) == pytest.approx(expected, abs=0.015)
    assert p_value(a, b) < 0.001, "the rows alone know nothing of it"


def test_seeds_that_are_all_alike_add_nothing_to_the_rows() -> None:
    dice = np.random.default_rng(4)
    labels = dice.integers(0, 2, 300)
    one, other = judge(dice, labels, 0.88), judge(dice, labels, 0.84)
    thrice = (Judged(labels, np.repeat(judged.positive_SN, 3, axis=0)) for judged in (one, other))
    expected = p_value(one, other)
    assert 0.05 < expected < 0.5
    assert p_value(*thrice) == pytest.approx(expected, abs=0.02)


def test_variances_of_seeds_by_hand() -> None:
    """An analysis of variance, seeds x rows, of what each row adds to a seed's F1."""
    labels = np.array([1, 1, 1, 0, 0, 1])
    called = np.array([[1, 1, 0, 0, 1, 1], [0, 0, 0, 1, 1, 0], [1, 1, 1, 0, 1, 1]])
    judged = Judged(labels, called)
    seeds, rows = called.shape
    total = called.sum() / seeds + labels.sum()
    cells = (2 * labels * called - f1(judged) * (called + labels)) / total
    assert cells.sum() == pytest.approx(0, abs=1e-12), "of all seeds together"
    left = 0.0
    for seed, row in itertools.product(range(seeds), range(rows)):
        rest = cells[seed, row] - cells[seed].mean() - cells[:, row].mean() + cells.mean()
        left += rest**2
    of_rows_too = rows * left / ((seeds - 1) * (rows - 1))
    of_seeds = np.var(cells.sum(axis=1), ddof=1)
    assert of_seeds > of_rows_too > 0
    assert judged.seed_variances == pytest.approx((of_seeds, of_rows_too))


def test_what_seeds_disagree_about_row_by_row_counts_once() -> None:
    """Settings whose rows, seeds and cells all vary: the gaps by chance vary as all of them together."""
    dice = np.random.default_rng(11)
    labels = dice.integers(0, 2, 600)
    hardness_N = dice.normal(1.6, 1.0, len(labels))
    a, b = (of_hard_rows(dice, labels, hardness_N, of_setting=0.2, seeds=8) for _ in range(2))
    pooled_a, pooled_b = (Judged(labels, judged.positive_N[None]) for judged in (a, b))
    rows, all_of_it = (
        chance_gaps(*pair, pair, 40_000, dice).var() for pair in ((pooled_a, pooled_b), (a, b))
    )
    (of_a, cells_a), (of_b, cells_b) = a.seed_variances, b.seed_variances
    seeds, cells = (of_a + of_b) / 8, (cells_a + cells_b) / 8
    assert 0.2 * rows < cells < 0.8 * rows
    assert seeds > cells
    freedom = 7 * (of_a + of_b) ** 2 / (of_a**2 + of_b**2)
    by_student = seeds * freedom / (freedom - 2)
    assert all_of_it == pytest.approx(rows - cells + by_student, rel=0.03)


def test_seeds_that_agree_in_f1_by_chance_are_not_taken_for_certain() -> None:
    """What they disagree about row by row lets them differ."""
    labels = np.tile([0, 1], 60)
    ours, theirs = (
        np.stack([labels ^ (np.arange(120) // wrong == number) for number in range(3)])
        for wrong in (10, 16)
    )
    assert f1_of_each(Judged(labels, ours)) == pytest.approx([f1(Judged(labels, ours))] * 3)
    assert p_value(Judged(labels, ours), Judged(labels, theirs)) > ALPHA


def f1_of_each(judged: Judged) -> list[float]:
    return [f1(Judged(judged.labels_N, positive_N[None])) for positive_N in judged.positive_SN]


def test_equal_settings_whose_seeds_differ_are_told_apart_no_more_often() -> None:
    """By the rows alone, the seeds' mean taken for one model's, it is a third of them."""
    dice = np.random.default_rng(7)
    labels = dice.integers(0, 2, 600)
    trials, wrong, by_rows_alone = 400, 0, 0
    for trial in range(trials):
        hardness_N = dice.normal(1.6, 1.0, len(labels))
        a, b = (of_hard_rows(dice, labels, hardness_N) for _ in range(2))
        wrong += p_value(a, b, (), trial, draws=1999) < ALPHA
        pooled_a, pooled_b = (Judged(labels, judged.positive_N[None]) for judged in (a, b))
        by_rows_alone += p_value(pooled_a, pooled_b, (), trial, draws=1999) < ALPHA
    assert 0.005 < wrong / trials < 0.08
    assert by_rows_alone / trials > 0.2


def of_hard_rows(
    dice: np.random.Generator,
    labels: np.ndarray,
    hardness_N: np.ndarray,
    of_setting: float = 0.3,
    seeds: int = 3,
) -> Judged:
    """Return what seeds make of rows: a setting, a seed and chance make them easier or harder."""
    of_setting_N = dice.normal(0, of_setting, len(labels))
    of_seed_S1 = dice.normal(0, 0.15, (seeds, 1))
    of_both_SN = dice.normal(0, 0.5, (seeds, len(labels)))
    right = hardness_N + of_setting_N + of_seed_S1 + of_both_SN > 0
    return Judged(labels, np.where(right, labels, 1 - labels))


def test_a_difference_larger_than_that_of_seeds_is_found() -> None:
    dice = np.random.default_rng(8)
    labels = dice.integers(0, 2, 600)
    good, bad = (
        judge_seeds(dice, labels, [mean - 0.01, mean, mean + 0.01]) for mean in (0.92, 0.82)
    )
    assert p_value(good, bad) < ALPHA
    assert p_value(good, good) == 1


@pytest.mark.parametrize("size", [0, 1, 5])
def test_few_test_rows_tell_nothing_apart(size: int) -> None:
    labels = np.array([1, 0, 1, 0, 1])[:size]
    right = np.stack([labels] * 6)
    wrong = np.stack([1 - labels, labels] * 3)
    assert p_value(Judged(labels, right), Judged(labels, wrong)) > ALPHA


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


def test_a_clear_difference_is_found_among_hundreds() -> None:
    """The smallest p-value that swaps can give must survive the correction: DRAWS alone serve 500."""
    dice = np.random.default_rng(3)
    labels = dice.integers(0, 2, 600)
    good, bad = judge(dice, labels, 0.95), judge(dice, labels, 0.7)
    assert against_best([good, *[bad] * 600])[0] < ALPHA
