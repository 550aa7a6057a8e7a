"""Which settings can be told apart? Tests on the same test rows, by the chance of rows and of seeds.

If two settings did not differ, swapping their judgements of any row would be as likely as not: the
gaps in F1 that such swaps make are the chance of the test rows (an approximate randomisation test: Yeh,
More accurate tests for the statistical significance of result differences, COLING 2000). Seeds of one
setting are swapped together, as they judge the same row.

Another seed makes another model. Where a setting has several, what they differ by is the chance of
the seeds: of Student's distribution, since a few seeds tell little about it, and added to each of those
gaps. So rows and seeds are both a sample, as cases and readers are in medicine (Obuchowski and Rockette,
Hypothesis testing of diagnostic accuracy for multiple readers and multiple tests, Communications in
Statistics 1995). Where both settings have one seed, only the rows' chance is known.

P-values are adjusted for the number of comparisons by Holm's method. The best is chosen on the same
rows. So a small p-value says that a setting is not the best of all; it does not say that this one, which
looks best, is better than it (Hsu, Constrained simultaneous confidence intervals for multiple
comparisons with the best, Annals of Statistics 1984). Whichever truly is the best is called "not the
best" one time in twenty at most.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

DRAWS = 9999
ALPHA = 0.05


@dataclass(frozen=True)
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


def p_value(a: Judged, b: Judged, seed: int = 0, draws: int = DRAWS) -> float:
    """Return how likely a gap in F1 as large as this is, if there were no difference."""
    if (a.positive_N == b.positive_N).all():
        return 1.0
    dice = np.random.default_rng(seed)
    gap_D = _swap_rows(a, b, draws, dice)
    if freedom := a.seeds + b.seeds - 2:
        of_seeds, of_both = _seed_variances(a, b, freedom)
        of_rows = gap_D.var()
        gap_D *= np.sqrt(max(0, 1 - of_both / of_rows)) if of_rows else 0
        gap_D += np.sqrt(of_seeds) * dice.standard_t(freedom, draws)
    observed = abs(f1(a) - f1(b))
    return float((1 + (np.abs(gap_D) >= observed - 1e-12).sum()) / (1 + draws))


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


def _seed_variances(a: Judged, b: Judged, freedom: int) -> tuple[float, float]:
    """Return the variances of the gap in F1 that come from seeds, and from seeds and rows at once.

    The second is what seeds disagree about row by row. It is in the first, and in the gaps that
    swaps make, and is to count once. Both take the spread of the two settings' seeds for the same.
    """
    scale = (1 / a.seeds + 1 / b.seeds) / freedom
    of_a, of_b = _squares(a), _squares(b)
    of_seeds, of_both = scale * (of_a[0] + of_b[0]), scale * (of_a[1] + of_b[1])
    # a few seeds may lie closer, by chance, than what they disagree about row by row would let them
    return max(of_seeds, of_both), of_both


def _squares(judged: Judged) -> tuple[float, float]:
    """Return the sums of squares of seeds' F1, and of what is left in F1's terms without seed and row."""
    labels_N, called_SN = judged.labels_N, judged.positive_SN
    size = called_SN.shape[1]
    total = max(called_SN.sum(axis=1).mean() + labels_N.sum(), 1e-12)
    # to the first order, F1 of a seed is F1 of all and the sum of these, its rows' terms
    terms_SN = (2 * labels_N * called_SN - f1(judged) * (called_SN + labels_N)) / total
    of_seeds_S = terms_SN.sum(axis=1) - terms_SN.sum(axis=1).mean()
    left_SN = terms_SN - terms_SN.mean(axis=0) - of_seeds_S[:, None] / size
    return float((of_seeds_S**2).sum()), float((left_SN**2).sum() * size / max(size - 1, 1))


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
    return holm([p_value(judged[0], other, draws=draws) for other in judged[1:]])
