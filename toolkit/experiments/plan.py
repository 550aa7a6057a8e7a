"""What a sweep will cost, before it is started: steps, and hours at a rate that was seen or stated."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from toolkit.config import RunConfig, cache_dir, part
from toolkit.data.prepare import DataSpec
from toolkit.data.selection import MAX_VALIDATION_ROWS
from toolkit.data.steps import Stream
from toolkit.experiments.results import summaries
from toolkit.experiments.sweep import Run

AMAZON_ROWS = 3_600_000


@dataclass(frozen=True)
class Cost:
    """What a run will take, as far as it is known before."""

    steps: int | None
    """None: the data are not prepared yet, so nobody knows their number of rows."""
    seconds: float | None
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
    rows = training_rows(config)
    rate, source = (stated_rate, "stated") if stated_rate else _seen_rate(config, seen)
    if rows is None:
        return Cost(None, None, source)
    stream = part(Stream, config, num_rows=rows)
    return Cost(stream.num_steps, stream.num_slots / rate if rate else None, source)


def _seen_rate(config: RunConfig, seen: list[dict[str, Any]]) -> tuple[float | None, str]:
    """Return the rate of the most similar completed run: at least its encoder and length agree."""
    alike = ("encoder", "max_length", "precision", "dataset", "batch_size", "head")
    needed = alike[:3]
    ours = config.identity()
    found = [s for s in seen if all(s["config"][name] == ours[name] for name in needed)]
    if not found:
        return None, "unknown"
    best = max(found, key=lambda s: sum(s["config"][name] == ours[name] for name in alike))
    return float(best["reviews_per_s"]), f"as {best['run_id']}"


def training_rows(config: RunConfig) -> int | None:
    """Return the number of training rows, if it is known without reading the data."""
    if config.train_rows:
        return config.train_rows
    wanted = _rows_spec(asdict(part(DataSpec, config)))
    for path in (cache_dir(config) / "tokens").glob("*/meta.json"):
        meta = json.loads(path.read_text(encoding="utf-8"))
        if _rows_spec(meta["dataset"]) == wanted:
            return int(meta["splits"]["train"]["rows"])
    if config.dataset == "amazon_polarity":
        return AMAZON_ROWS - (config.validation_rows or MAX_VALIDATION_ROWS)
    return None


def _rows_spec(spec: dict[str, Any]) -> dict[str, Any]:
    """Leave out what does not change the number of rows."""
    return {name: value for name, value in spec.items() if name not in ("max_length", "split_seed")}
