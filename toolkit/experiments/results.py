"""The table of a sweep, from the summaries of its runs: never from logs.

bert_experiment_results.csv            one row per run, best first
bert_experiment_results.md             the same to read, and what can be told apart
best_bert_model_<head>.pth             state dict of the best run with that head
best_bert_model_<head>_config.json     its settings and metrics
"""

import csv
import hashlib
import io
import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
from rich.console import Console
from rich.table import Table
from rich.text import Text

from toolkit.console import complain, say
from toolkit.errors import DataError
from toolkit.experiments.compare import ALPHA, Judged, against_best, f1
from toolkit.files import write_json, write_text

METRICS = ("accuracy", "precision", "recall", "f1")
SETTINGS = ("head", "batch_size", "lr", "epochs", "seed")
COLUMNS = [
    *("experiment", *SETTINGS),
    *(name + end for name in METRICS for end in ("", "_low", "_high")),
    *("n", "seconds", "reviews_per_s", "run_id", "setting_f1", "p_against_best", "verdict"),
]
OTHER = "other test rows"
CSV_NAME = "bert_experiment_results.csv"


@dataclass
class Setting:
    """The runs that differ in nothing but the seed."""

    runs: list[dict[str, Any]]
    test_set: str
    """Hash of the test rows and their labels."""
    judged: Judged
    f1: float
    p: float | None = None
    """Adjusted p-value against the best setting; None for the best itself, and where there is
    nothing to compare with."""

    def verdict(self, best: "Setting") -> str:
        """Say how it stands against the best."""
        if self is best:
            return "best"
        if self.p is None:
            return OTHER
        return "below the best" if self.p < ALPHA else "cannot be told from the best"


def summaries(folder: Path) -> list[dict[str, Any]]:
    """Return the summaries of all completed runs in a folder, each with its `folder`."""
    found = []
    for path in sorted(folder.glob("*/summary.json")):
        if ".old-" in path.parent.name:
            continue
        try:
            found.append(json.loads(path.read_text(encoding="utf-8")) | {"folder": path.parent})
        except (OSError, ValueError, TypeError) as error:
            complain(f"warning: {path} cannot be read and its run is left out: {error}")
    return found


def settings(runs: list[dict[str, Any]]) -> list[Setting]:
    """Pool the seeds of each setting, best first, and compare with the best.

    Figures of different test rows cannot be compared: the best is one of the runs on the rows that
    most runs share, which come first.

    Raises:
        DataError: when predictions are missing.
    """
    groups: dict[tuple[str, str], list[Predicted]] = defaultdict(list)
    for run in runs:
        key = {name: value for name, value in run["config"].items() if name != "seed"}
        predicted = _predictions(run)
        groups[json.dumps(key, sort_keys=True), predicted.test_set].append(predicted)
    found = [_pool(group) for group in groups.values()]
    sharing = Counter(setting.test_set for setting in found for _ in setting.runs)
    main = max(found, key=lambda setting: (sharing[setting.test_set], len(setting.judged.labels_N)))
    found.sort(key=lambda setting: (setting.test_set == main.test_set, setting.f1), reverse=True)
    comparable = [setting for setting in found if setting.test_set == main.test_set]
    p_values = against_best([setting.judged for setting in comparable])
    for setting, p in zip(comparable[1:], p_values, strict=True):
        setting.p = p
    return found


@dataclass(frozen=True)
class Predicted:
    """A run, and what it made of each test row."""

    run: dict[str, Any]
    test_set: str
    """Hash of the test rows and their labels."""
    labels: np.ndarray
    positive: np.ndarray


def _pool(group: list[Predicted]) -> Setting:
    judged = Judged(group[0].labels, np.mean([each.positive for each in group], axis=0))
    return Setting([each.run for each in group], group[0].test_set, judged, f1(judged))


def _predictions(run: dict[str, Any]) -> Predicted:
    """Read what a run predicted, and hold it against its summary."""
    path = run["folder"] / "predictions.parquet"
    if not path.exists():
        raise DataError([f"{path} is missing: its run cannot be compared; move the folder away"])
    table = pyarrow.parquet.read_table(path)
    labels, positive = table["label"].to_numpy(), table["score"].to_numpy() > 0.5
    matrix = run["test"]["confusion"]
    found = int((positive & (labels == 1)).sum()), int(positive.sum())
    if found != (matrix["tp"], matrix["tp"] + matrix["fp"]):
        raise DataError([f"{path} is not what {run['folder'] / 'summary.json'} was made of"])
    # not the data's fingerprint: other training rows or another length leave the test rows the same
    key = table["row_id"].to_numpy().tobytes() + labels.tobytes()
    test_set = hashlib.sha256(key + run["config"]["dataset"].encode()).hexdigest()
    return Predicted(run, test_set, labels, positive)


def rows(found: list[Setting]) -> list[dict[str, Any]]:
    """Return one row for each run, best first."""
    listed = [_row(run, setting, found[0]) for setting in found for run in setting.runs]
    return sorted(listed, key=lambda row: (row["verdict"] != OTHER, row["f1"] or 0.0), reverse=True)


def _row(run: dict[str, Any], setting: Setting, best: Setting) -> dict[str, Any]:
    row: dict[str, Any] = {"experiment": run.get("experiment") or run["run_id"]}
    row |= {name: run["config"][name] for name in SETTINGS}
    for name in METRICS:
        estimate = run["test"][name]
        row |= {name: estimate["value"]}
        row |= {f"{name}_low": estimate["low"], f"{name}_high": estimate["high"]}
    return row | {
        "n": run["test"]["n"],
        "seconds": run["train_seconds"],
        "reviews_per_s": round(run["reviews_per_s"], 1),
        "run_id": run["run_id"],
        "setting_f1": setting.f1,
        "p_against_best": setting.p,
        "verdict": setting.verdict(best),
    }


def to_csv(listed: list[dict[str, Any]]) -> str:
    """Render rows as CSV; an empty field means that there is no value."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(listed)
    return out.getvalue()


def to_table(listed: list[dict[str, Any]]) -> Table:
    """Render rows for a terminal."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in _TITLES:
        table.add_column(title, justify="left" if title in _LEFT else "right", no_wrap=True)
    for row in listed:
        table.add_row(*map(Text, _cells(row)))  # as they are: names may hold markup
    return table


def to_markdown(listed: list[dict[str, Any]], found: list[Setting]) -> str:
    """Render rows and what they mean as Markdown."""
    lines = ["| " + " | ".join(_TITLES) + " |"]
    lines += ["|" + "|".join("---" if title in _LEFT else "---:" for title in _TITLES) + "|"]
    cells = [[cell.replace("|", r"\|") for cell in _cells(row)] for row in listed]
    lines += ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([*lines, "", *conclusions(listed, found), ""])


_TITLES = (
    *("experiment", "head", "batch", "lr", "epochs", "seed"),
    *("accuracy", "precision", "recall", "F1 (95 %)", "n", "s", "reviews/s", "against the best"),
)
_LEFT = ("experiment", "head", "F1 (95 %)", "against the best")


def _cells(row: dict[str, Any]) -> list[str]:
    numbers = ["n/a" if row[name] is None else f"{row[name]:.4f}" for name in METRICS]
    f1_cell = f"{numbers[3]} ({row['f1_low']:.3f} to {row['f1_high']:.3f})"
    verdict = row["verdict"]
    if row["p_against_best"] is not None:
        verdict += f" (p = {row['p_against_best']:.2g})"
    return [
        *(str(row[name]) for name in ("experiment", *SETTINGS)),
        *numbers[:3],
        f1_cell,
        str(row["n"]),
        f"{row['seconds']:.0f}",
        f"{row['reviews_per_s']:.0f}",
        verdict,
    ]


def conclusions(listed: list[dict[str, Any]], found: list[Setting]) -> list[str]:
    """Say what follows from a table, and what does not."""
    top, best = listed[0], found[0]
    rivals = [setting for setting in found[1:] if setting.test_set == best.test_set]
    ties = [setting for setting in rivals if setting.verdict(best).startswith("cannot")]
    lines = [f"Best run by F1 on the test set: {top['experiment']} ({top['run_id']})."]
    if top["run_id"] not in {run["run_id"] for run in best.runs}:
        names = ", ".join(name_of(run) for run in best.runs)
        lines.append(f"Best setting over all of its seeds: {names}, F1 {best.f1:.4f}.")
    if ties:
        names = ", ".join(sorted({name_of(run) for setting in ties for run in setting.runs}))
        lines.append(
            f"At 95 % the best setting cannot be told from {len(ties)} of the {len(rivals)} other "
            f"settings: {names}."
        )
    elif rivals:
        lines.append("At 95 % every other setting on the same test rows is below it.")
    if len(found) > len(rivals) + 1:
        lines.append(
            f"{len(found) - 1 - len(rivals)} settings were judged on other test rows than the best: "
            "their figures cannot be compared with it."
        )
    lines.append(
        "Settings are compared on F1, row by row of the test set (paired randomisation test, Holm's "
        "correction for the number of comparisons; seeds of one setting are pooled). The best of many "
        "is chosen on these rows, so its own figure is on the lucky side."
    )
    return lines


def name_of(run: dict[str, Any]) -> str:
    """Return what the table calls a run."""
    return run.get("experiment") or run["run_id"]


def write_all(folder: Path, found: list[Setting]) -> list[Path]:
    """Write the table and the best models into a folder; return what was written."""
    from toolkit.record.export import save_state_dict  # imports torch

    listed = rows(found)
    write_text(folder / CSV_NAME, to_csv(listed))
    write_text(folder / "bert_experiment_results.md", to_markdown(listed, found))
    written = [folder / CSV_NAME, folder / "bert_experiment_results.md"]
    for head, run in best_by_head(found).items():
        model = folder / f"best_bert_model_{head}.pth"
        save_state_dict(run["folder"] / "best" / "model.safetensors", model)
        config = folder / f"best_bert_model_{head}_config.json"
        about = {name: run[name] for name in ("run_id", "config_hash", "config", "test")}
        write_json(config, {"experiment": name_of(run)} | about)
        written += [model, config]
    return written


def best_by_head(found: list[Setting]) -> dict[str, dict[str, Any]]:
    """Return the best run by F1 of each head, of those on the most shared test rows if it has any."""
    best: dict[str, dict[str, Any]] = {}
    by_id = {run["run_id"]: run for setting in found for run in setting.runs}
    for row in rows(found):
        best.setdefault(row["head"], by_id[row["run_id"]])
    return best


def show(listed: list[dict[str, Any]], found: list[Setting]) -> None:
    """Print the table, never cut: a narrow terminal wraps its lines."""
    Console(width=max(Console().width, 250)).print(to_table(listed))
    for line in conclusions(listed, found):
        say(line)
