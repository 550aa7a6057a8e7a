"""Which settings can be told apart? Tests on the same test rows, by the chance of rows and of seeds.

If two settings did not differ, swapping their judgements of any row would be as likely as not: the
gaps in F1 that such swaps make are the chance of the test rows (an approximate randomisation test: Yeh,
More accurate tests for the statistical significance of result differences, COLING 2000). Seeds of one
setting are swapped together, as they judge the same row.

Another seed makes another model. How far the seeds of a setting lie apart is the chance of the seeds:
of Student's distribution, since a few seeds tell little about it, and added to each of those gaps. So
rows and seeds are both a sample, as cases and readers are in medicine (Obuchowski and Rockette,
Hypothesis testing of diagnostic accuracy for multiple readers and multiple tests: an ANOVA approach
with dependent observations, Communications in Statistics 1995). Settings need not have as many seeds,
nor spread alike (Welch, The generalization of Student's problem, Biometrika 1947; the degrees of freedom
are Satterthwaite's, 1946); one of a single seed is taken to spread as the others do together. Where all
have one seed, only the rows' chance is known. That equal seeds of two settings may share their luck
is left out: where they do, differences are harder to find.

P-values are adjusted for the number of comparisons by Holm's method. The best is chosen on the same
rows. So a small p-value says that a setting is not the best of all; it does not say that this one, which
looks best, is better than it (Hsu, Constrained simultaneous confidence intervals for multiple
comparisons with the best, Annals of Statistics 1984). Whichever truly is the best is called "not the
best" about one time in twenty at most, and less often where seeds hardly differ; more often if it has a
single seed and spreads more than the others (tests/bench/NOTES.md has both).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

DRAWS = 9999
ALPHA = 0.05


@dataclass(frozen=True, eq=False)
class Judged:
    """What the seeds of one setting made of the test rows."""

    labels_N: np.ndarray
    """0 or 1."""
    positive_SN: np.ndarray
    """Whether a seed called the row positive."""

    @cached_property
    def positive_N(self) -> np.ndarray:
        """Share of the seeds that called the row positive."""
        return self.positive_SN.mean(axis=0)

    @property
    def seeds(self) -> int:
        """How many there are."""
        return len(self.positive_SN)

    @cached_property
    def seed_variances(self) -> tuple[float, float]:
        """Of a seed's F1, of two seeds or more: all, and what they disagree about row by row alone."""
        labels_N, called_SN = self.labels_N.astype(float), self.positive_SN.astype(float)
        size, freedom = called_SN.shape[1], self.seeds - 1
        # to the first order, F1 of a seed is F1 of all and the sum of these, its rows' terms
        total = max(called_SN.sum(axis=1).mean() + labels_N.sum(), 1e-12)
        terms_SN = (2 * labels_N * called_SN - f1(self) * (called_SN + labels_N)) / total
        apart_S = terms_SN.sum(axis=1) - terms_SN.sum(axis=1).mean()
        left_SN = terms_SN - terms_SN.mean(axis=0) - apart_S[:, None] / size
        of_rows_too = (left_SN**2).sum() / freedom * size / max(size - 1, 1)
        # a few seeds may lie closer, by chance, than what they disagree about would let them
        return max((apart_S**2).sum() / freedom, of_rows_too), of_rows_too


def f1(judged: Judged) -> float:
    """Return F1 of all seeds together."""
    return float(_f1(*_sums(judged)))


def _sums(judged: Judged) -> tuple[float, float, float]:
    """Return true positives, called positive, and labelled positive."""
    labels, positive = judged.labels_N, judged.positive_N
    return float((labels * positive).sum()), float(positive.sum()), float(labels.sum())


def _f1(
    true_positive: float | np.ndarray, called: float | np.ndarray, labelled: float
) -> float | np.ndarray:
    """Return F1 = 2 TP / (called positive + labelled positive); 0 if there is neither."""
    total = np.maximum(called + labelled, 1e-12)
    return 2 * true_positive / total


def p_value(
    a: Judged, b: Judged, others: Sequence[Judged] = (), seed: int = 0, draws: int = DRAWS
) -> float:
    """Return how likely a gap in F1 as large as this is, if there were no difference.

    Args:
        a: one setting.
        b: the other.
        others: tell how far seeds lie apart where one of the two has a single one.
        seed: of the draws.
        draws: how many gaps are made.
    """
    if (a.positive_N == b.positive_N).all():
        return 1.0
    gap_D = chance_gaps(a, b, [a, b, *others], draws, np.random.default_rng(seed))
    observed = abs(f1(a) - f1(b))
    return float((1 + (np.abs(gap_D) >= observed - 1e-12).sum()) / (1 + draws))


def chance_gaps(
    a: Judged, b: Judged, known: Sequence[Judged], draws: int, dice: np.random.Generator
) -> np.ndarray:
    """Return gaps in F1 as rows and seeds make them where there is no difference."""
    gap_D = _swap_rows(a, b, draws, dice)
    if seeds := _chance_of_seeds(a, b, known):
        # what seeds disagree about row by row is in both, and counts once
        gap_D *= np.sqrt(max(0, 1 - seeds.of_rows_too / max(gap_D.var(), 1e-12)))
        gap_D += np.sqrt(seeds.variance) * dice.standard_t(seeds.freedom, draws)
    return gap_D


def _swap_rows(a: Judged, b: Judged, draws: int, dice: np.random.Generator) -> np.ndarray:
    """Return the gaps in F1 that swaps make.

    Rows that change F1 in the same way are swapped by one binomial draw: the cost does not depend
    on their number.
    """
    differ = a.positive_N != b.positive_N
    gaps = np.stack([a.labels_N[differ], (b.positive_N - a.positive_N)[differ]], axis=1)
    kinds_K2, counts_K = np.unique(gaps, axis=0, return_counts=True)
    swapped_DK = dice.binomial(counts_K, 0.5, size=(draws, len(counts_K)))
    called_D = swapped_DK @ kinds_K2[:, 1]
    true_D = swapped_DK @ (kinds_K2[:, 0] * kinds_K2[:, 1])
    (true_a, called_a, labelled), (true_b, called_b, _) = _sums(a), _sums(b)
    return np.asarray(
        _f1(true_a + true_D, called_a + called_D, labelled)
        - _f1(true_b - true_D, called_b - called_D, labelled)
    )


class Seeds(NamedTuple):
    """What seeds make a gap in F1 vary by."""

    variance: float
    of_rows_too: float
    """The part of it that comes from what they disagree about row by row."""
    freedom: float
    """Degrees of freedom of the variance's estimate."""


def _chance_of_seeds(a: Judged, b: Judged, known: Sequence[Judged]) -> Seeds | None:
    """Return what seeds make of the gap between two settings; None where no setting has several."""
    several = [judged for judged in dict.fromkeys(known) if judged.seeds > 1]
    if not several:
        return None
    freedom_K = np.array([judged.seeds - 1 for judged in several])
    share_K = np.zeros(len(several))  # how much of each one's variance is in the gap's
    for side in (a, b):
        if side.seeds > 1:
            share_K[several.index(side)] += 1 / side.seeds
        else:
            share_K += freedom_K / freedom_K.sum()
    own_K2 = share_K[:, None] * np.array([judged.seed_variances for judged in several])
    variance, of_rows_too = own_K2.sum(axis=0)
    if not variance:
        return None
    return Seeds(variance, of_rows_too, variance**2 / (own_K2[:, 0] ** 2 / freedom_K).sum())


def holm(p_values: list[float]) -> list[float]:
    """Adjust p-values for their number (Holm 1979); the order stays."""
    order = sorted(range(len(p_values)), key=lambda number: p_values[number])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, number in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[number]))
        adjusted[number] = largest
    return adjusted


def against_best(judged: list[Judged]) -> list[float]:
    """Return adjusted p-values of all settings but the first against the first, the best."""
    # the smallest p-value is 1 / (1 + draws): times the number of comparisons, it stays below ALPHA
    draws = max(DRAWS, round(2 / ALPHA * len(judged)))
    return holm([p_value(judged[0], other, judged, draws=draws) for other in judged[1:]])
