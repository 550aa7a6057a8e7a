"""What a sweep will cost, before it is started: steps, and hours at a rate that was seen or stated."""

import json
from dataclasses import dataclass
from typing import Any

from toolkit.config import RunConfig, cache_dir, part
from toolkit.data.prepare import DataSpec, described
from toolkit.data.selection import default_validation_rows
from toolkit.data.steps import Stream
from toolkit.experiments.results import summaries
from toolkit.experiments.sweep import Run

AMAZON_ROWS, AMAZON_TEST_ROWS = 3_600_000, 400_000
DECIDE_RATE = ("encoder", "max_length", "precision")
"""Settings that a rate belongs to; batch size and head change it less."""
SCORING = 1 / 3
"""Of what a row takes in training, which has a backward pass of twice the operations, too."""


@dataclass(frozen=True)
class Cost:
    """What a run will take, as far as it is known before."""

    steps: int | None
    """None: the data are not prepared yet, so nobody knows their number of rows."""
    seconds: float | None
    """Of steps, and of scoring where `source` does not say otherwise."""
    source: str
    """Where the rate comes from."""


def costs(runs: list[Run], stated_rate: float | None) -> list[Cost]:
    """Return the cost of each run.

    Args:
        runs: the runs of a sweep.
        stated_rate: reviews/s; None takes what completed runs in the same folders reached.
    """
    folders = {run.folder.parent for run in runs}
    seen = [summary for folder in folders for summary in summaries(folder)]
    return [_cost(run.config, stated_rate, seen) for run in runs]


def _cost(config: RunConfig, stated_rate: float | None, seen: list[dict[str, Any]]) -> Cost:
    rows = split_rows(config)
    rate, source = (stated_rate, "stated") if stated_rate else _seen_rate(config, seen)
    if "train" not in rows:
        return Cost(None, None, source)
    stream = part(Stream, config, num_rows=rows["train"])
    if not rate:
        return Cost(stream.num_steps, None, source)
    if "test" not in rows:
        return Cost(stream.num_steps, stream.num_slots / rate, f"{source}, scoring not counted")
    scored = evaluations(stream, config.eval_every) * rows["validation"] + rows["test"]
    return Cost(stream.num_steps, (stream.num_slots + SCORING * scored) / rate, source)


def evaluations(stream: Stream, every: int | None) -> int:
    """Return how often a run is validated: where an epoch ends, at the end, and each so many steps."""
    whole = stream.num_slots // stream.num_rows
    ends = {-(-epoch * stream.num_rows // stream.batch_size) for epoch in range(1, whole + 1)}
    between = range(every, stream.num_steps + 1, every) if every else ()
    return len({*ends, *between, stream.num_steps})


def _seen_rate(config: RunConfig, seen: list[dict[str, Any]]) -> tuple[float | None, str]:
    """Return the rate of the most similar completed run: at least its encoder and length agree."""
    alike = (*DECIDE_RATE, "dataset", "batch_size", "head")
    ours = config.identity()
    found = [s for s in seen if all(s["config"][name] == ours[name] for name in DECIDE_RATE)]
    if not found:
        return None, "unknown"
    best = max(found, key=lambda s: sum(s["config"][name] == ours[name] for name in alike))
    return float(best["reviews_per_s"]), f"as {best['run_id']}"


def split_rows(config: RunConfig) -> dict[str, int]:
    """Return the rows of those splits whose number is known without reading the data."""
    wanted = _rows_spec(described(part(DataSpec, config)))
    metas = (cache_dir(config) / "tokens").glob("*/meta.json")
    for path in sorted(metas, key=lambda path: -path.stat().st_mtime):  # an edited file has several
        meta = json.loads(path.read_text(encoding="utf-8"))
        if _rows_spec(meta["dataset"]) == wanted:
            return {name: int(split["rows"]) for name, split in meta["splits"].items()}
    if config.dataset != "amazon_polarity":
        return {"train": config.train_rows} if config.train_rows else {}
    train = config.train_rows or AMAZON_ROWS
    validation = config.validation_rows or default_validation_rows(train)
    return {
        "train": config.train_rows or AMAZON_ROWS - validation,
        "validation": validation,
        "test": config.test_rows or AMAZON_TEST_ROWS,
    }


def _rows_spec(spec: dict[str, Any]) -> dict[str, Any]:
    """Leave out what does not change the number of rows."""
    return {name: value for name, value in spec.items() if name not in ("max_length", "split_seed")}
