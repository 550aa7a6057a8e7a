"""Confusion counts -> accuracy, precision, recall, F1, each with its 95 % interval.

Counts add up over batches and ranks; the division happens once, here.

The intervals are Wilson's (1927), for the reason that they stay honest on tiny test sets: with 5 of 5
right they say 0.57 to 1, where a bootstrap or a normal interval would say "exactly 1". Accuracy,
precision and recall are proportions. F1 is not, but it is 2 J / (1 + J) of the proportion
J = TP / (TP + FP + FN), and rises with it, so Wilson's bounds for J turn into bounds for F1.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

Z95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""


@dataclass(frozen=True)
class Confusion:
    """Predictions by truth; class 1 is positive."""

    tp: int = 0
    fp: int = 0
    fn: int = 0
    tn: int = 0

    @property
    def n(self) -> int:
        """Number of rows."""
        return self.tp + self.fp + self.fn + self.tn


class Estimate(NamedTuple):
    """A metric and its 95 % interval; the value is None where the metric is 0 / 0."""

    value: float | None
    low: float
    high: float


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Return Wilson's 95 % score interval of a proportion; (0, 1) without trials."""
    if trials == 0:
        return 0.0, 1.0
    share, z2 = successes / trials, Z95**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    spread = share * (1 - share) / trials + z2 / (4 * trials**2)
    half = Z95 / (1 + z2 / trials) * math.sqrt(spread)
    # the exact bounds are 0 and 1 there; rounding would miss them by 1e-17
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == trials else centre + half
    return low, high


def proportion(successes: int, trials: int) -> Estimate:
    """Return a share of trials with its interval."""
    return Estimate(successes / trials if trials else None, *wilson(successes, trials))


def f1(counts: Confusion) -> Estimate:
    """Return F1 of the positive class with its interval."""
    jaccard = proportion(counts.tp, counts.tp + counts.fp + counts.fn)
    value = None if jaccard.value is None else 2 * jaccard.value / (1 + jaccard.value)
    return Estimate(
        value, 2 * jaccard.low / (1 + jaccard.low), 2 * jaccard.high / (1 + jaccard.high)
    )


def estimates(counts: Confusion) -> dict[str, Estimate]:
    """Return all metrics of a confusion matrix."""
    return {
        "accuracy": proportion(counts.tp + counts.tn, counts.n),
        "precision": proportion(counts.tp, counts.tp + counts.fp),
        "recall": proportion(counts.tp, counts.tp + counts.fn),
        "f1": f1(counts),
    }


def as_record(counts: Confusion, loss: float | None) -> dict[str, Any]:
    """Return metrics as JSON holds them."""
    record: dict[str, Any] = {
        name: estimate._asdict() for name, estimate in estimates(counts).items()
    }
    matrix = {"tp": counts.tp, "fp": counts.fp, "fn": counts.fn, "tn": counts.tn}
    return record | {"loss": loss, "n": counts.n, "confusion": matrix}


def table(record: dict[str, Any], title: str) -> str:
    """Render a record for people."""
    lines = [f"{title} (n = {record['n']})", "  metric     value   95 % interval"]
    for name in ("accuracy", "precision", "recall", "f1"):
        value = record[name]["value"]
        shown = "  n/a " if value is None else f"{value:.4f}"
        lines.append(
            f"  {name:<9} {shown}   {record[name]['low']:.4f} to {record[name]['high']:.4f}"
        )
    matrix = record["confusion"]
    lines.append("  confusion  " + "  ".join(f"{name} {count}" for name, count in matrix.items()))
    return "\n".join(lines)
