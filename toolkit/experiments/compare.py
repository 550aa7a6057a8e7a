"""Which settings can be told apart? Paired tests on the same test rows.

Two settings are compared on the reviews that they judge differently; those that both judge alike
say nothing about which is better. If there were no difference, swapping the two judgements of any
review would be as likely as not: so the swaps that make the gap in F1 at least as large as it was
are counted (an approximate randomisation test: Yeh, More accurate tests for the statistical
significance of result differences, COLING 2000). Seeds of one setting are swapped together, as
they judge the same review. P-values are adjusted for the number of comparisons by Holm's method.

The best is chosen on the same rows. So a small p-value says that a setting is not the best of all; it
does not say that this one, which looks best, is better than it (Hsu, Constrained simultaneous confidence
intervals for multiple comparisons with the best, Annals of Statistics 1984). Whichever truly is the best
is called "not the best" one time in twenty at most. All this is the chance of the test rows: what another
seed would make of a setting is known from its seeds alone.
"""

from dataclasses import dataclass

import numpy as np

SWAPS = 9999
ALPHA = 0.05


@dataclass(frozen=True)
class Judged:
    """What one setting made of the test rows, summed over its seeds."""

    labels_N: np.ndarray
    """0 or 1."""
    positive_N: np.ndarray
    """Share of the seeds that called the row positive."""


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


def p_value(a: Judged, b: Judged, seed: int = 0, swaps: int = SWAPS) -> float:
    """Return how likely a gap in F1 as large as this is, if there were no difference.

    Rows that change F1 in the same way are swapped by one binomial draw: the cost does not depend
    on their number.
    """
    differ = a.positive_N != b.positive_N
    if not differ.any():
        return 1.0
    gaps = np.stack([a.labels_N[differ], (b.positive_N - a.positive_N)[differ]], axis=1)
    kinds_K2, counts_K = np.unique(gaps, axis=0, return_counts=True)
    swapped_SK = np.random.default_rng(seed).binomial(counts_K, 0.5, size=(swaps, len(counts_K)))
    called_S = swapped_SK @ kinds_K2[:, 1]
    true_S = swapped_SK @ (kinds_K2[:, 0] * kinds_K2[:, 1])
    (true_a, called_a, labelled), (true_b, called_b, _) = _sums(a), _sums(b)
    gap_S = np.abs(
        _f1(true_a + true_S, called_a + called_S, labelled)
        - _f1(true_b - true_S, called_b - called_S, labelled)
    )
    observed = abs(f1(a) - f1(b))
    return float((1 + (gap_S >= observed - 1e-12).sum()) / (1 + swaps))


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
    # the smallest p-value is 1 / (1 + swaps): times the number of comparisons, it stays below ALPHA
    swaps = max(SWAPS, round(2 / ALPHA * len(judged)))
    return holm([p_value(judged[0], other, swaps=swaps) for other in judged[1:]])
