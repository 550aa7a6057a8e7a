"""What came out of turns of several contenders: medians, ranges, our ratios to the others."""

import statistics
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

from rich.console import Console

from toolkit.console import say
from toolkit.experiments.tables import Column, to_table

RATIOS = {
    "tokens_per_s": "training",
    "eval_reviews_per_s": "evaluation",
    "peak_MiB": "peak memory",
}
FIGURES = {
    "reviews_per_s": "reviews/s",
    "tokens_per_s": "tokens/s",
    "padding": "padding",
    "share": "share of the matrix rate",
    "eval_reviews_per_s": "evaluated/s",
    "peak_MiB": "peak MiB",
    "loss": "loss",
    "accuracy": "accuracy",
}
Turn = dict[str, dict[str, float]]
"""Contender -> figure -> value."""


def order(names: Sequence[str], turn: int) -> list[str]:
    """Return all names in an order that is this turn's: nobody always comes after the same other."""
    first = turn // 2 % len(names)
    turned = [*names[first:], *names[:first]]
    return turned[::-1] if turn % 2 else turned


def summary(
    turns: list[Turn], rates: dict[str, float], flops: dict[str, float], in_fp32: tuple[str, ...]
) -> dict[str, Any]:
    """Return median and range of every figure, and of our ratios within each turn.

    Args:
        turns: what was measured.
        rates: operations/s of matrix products of this session, by precision.
        flops: operations for a token, of "ours" and of "theirs".
        in_fp32: contenders that compute in fp32; the others do in bf16.
    """
    names = list(turns[0])
    contenders: dict[str, Any] = {}
    for name in names:
        shown = {key: spread([turn[name][key] for turn in turns]) for key in turns[0][name]}
        operations = flops["ours" if is_ours(name) else "theirs"]
        rate = rates["fp32" if name in in_fp32 else "bf16"]
        shown["share"] = spread([turn[name]["tokens_per_s"] * operations / rate for turn in turns])
        for mine in filter(is_ours, names):
            for key in RATIOS:
                ratios = [turn[mine][key] / turn[name][key] for turn in turns]
                shown[_ratio(mine, key)] = spread(ratios)
        contenders[name] = shown
    return {"limits": rates, "flops_per_token": flops, "contenders": contenders}


def log_every(rows: int, batch_size: int) -> int:
    """Return after how many steps, five at most, to log: a line has to end where an epoch does."""
    steps = rows // batch_size
    return max((every for every in range(1, 6) if steps % every == 0 and every < steps), default=1)


def spread(values: list[float]) -> dict[str, float]:
    """Return median, lowest and highest."""
    middle = statistics.median(values)
    return {
        name: round(x, 4)
        for name, x in zip(
            ("median", "min", "max"), (middle, min(values), max(values)), strict=True
        )
    }


def is_ours(name: str) -> bool:
    """Tell whether it is the toolkit, not one of its peers."""
    return name.startswith("ours")


def show(figures: dict[str, Any]) -> None:
    """Print two tables, never cut: figures of all, then our ratios to the others."""
    contenders = figures["contenders"]
    _print(FIGURES, {name: [shown[key] for key in FIGURES] for name, shown in contenders.items()})
    for mine in filter(is_ours, contenders):
        others = {name: shown for name, shown in contenders.items() if name != mine}
        if not others:
            continue
        say(f"\n{mine} over ...")
        _print(
            RATIOS,
            {name: [shown[_ratio(mine, key)] for key in RATIOS] for name, shown in others.items()},
        )


def _ratio(mine: str, key: str) -> str:
    return f"{mine} / it, {key}"


def _print(titles: dict[str, str], rows: dict[str, list[dict[str, float]]]) -> None:
    columns = [Column("", itemgetter(0), left=True)]
    columns += [Column(title, itemgetter(place)) for place, title in enumerate(titles.values(), 1)]
    cells = [[name, *map(_text, spreads)] for name, spreads in rows.items()]
    Console(width=max(Console().width, 250)).print(to_table(columns, cells))


def _text(found: dict[str, float]) -> str:
    """Write a median and its range with three digits, or as whole numbers."""
    digits = (
        f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
        for value in (found["median"], found["min"], found["max"])
    )
    return "{} ({} to {})".format(*digits)
