"""The results of a sweep as people and programs read them.

bert_experiment_results.csv            one row per run, best first
bert_experiment_results.md             the same to read, and what can be told apart
best_bert_model_<head>.pth             state dict of the best run with that head
best_bert_model_<head>_config.json     its settings and metrics
"""

import csv
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from toolkit.console import complain, say
from toolkit.experiments.results import (
    Setting,
    best_by_head,
    name_of,
    rows,
    setting_names,
)
from toolkit.files import write_json, write_text

CSV_NAME = "bert_experiment_results.csv"


@dataclass(frozen=True)
class Column:
    """One column of a table that people read."""

    title: str
    cell: Callable[[Any], str]
    """Row -> what stands in it."""
    left: bool = False
    """Names begin at the left; numbers end at the right."""


def to_csv(listed: list[dict[str, Any]]) -> str:
    """Render rows, at least one, as CSV; an empty field means that there is no value."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(listed[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(listed)
    return out.getvalue()


def to_table(columns: list[Column], listed: Iterable[Any]) -> Table:
    """Render rows for a terminal."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        justify: JustifyMethod = "left" if column.left else "right"
        table.add_column(column.title, justify=justify, no_wrap=True)
    for row in listed:
        table.add_row(*(Text(column.cell(row)) for column in columns))  # names may hold markup
    return table


def to_markdown(columns: list[Column], listed: Iterable[Any]) -> str:
    """Render rows as a table in Markdown."""
    lines = [[column.title for column in columns]]
    lines += [["---" if column.left else "---:" for column in columns]]
    lines += [[column.cell(row).replace("|", r"\|") for column in columns] for row in listed]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _metric(name: str) -> Callable[[dict[str, Any]], str]:
    return lambda row: "n/a" if row[name] is None else f"{row[name]:.4f}"


def _with_p(verdict: str, p: float | None) -> str:
    return verdict if p is None else f"{verdict} (p = {p:.2g})"


RUN_COLUMNS = [
    Column("experiment", lambda row: row["experiment"], left=True),
    Column("head", lambda row: row["head"], left=True),
    Column("batch", lambda row: str(row["batch_size"])),
    Column("lr", lambda row: str(row["lr"])),
    Column("epochs", lambda row: str(row["epochs"])),
    Column("seed", lambda row: str(row["seed"])),
    Column("accuracy", _metric("accuracy")),
    Column("precision", _metric("precision")),
    Column("recall", _metric("recall")),
    Column(
        "F1 (95 %)",
        lambda row: f"{_metric('f1')(row)} ({row['f1_low']:.3f} to {row['f1_high']:.3f})",
        left=True,
    ),
    Column("n", lambda row: str(row["n"])),
    Column("s", lambda row: f"{row['seconds']:.0f}"),
    Column("reviews/s", lambda row: f"{row['reviews_per_s']:.0f}"),
    Column(
        "against the best", lambda row: _with_p(row["verdict"], row["p_against_best"]), left=True
    ),
]
"""Of rows as `results.rows` makes them."""

SETTING_COLUMNS = [
    Column("setting", lambda row: row["name"], left=True),
    Column("seeds", lambda row: str(len(row["each"]))),
    Column("F1 of all seeds", lambda row: f"{row['setting'].f1:.4f}"),
    Column("lowest to highest", lambda row: _range(row["each"]), left=True),
    Column("against the best", lambda row: _with_p(row["verdict"], row["setting"].p), left=True),
]
"""Of rows as `setting_rows` makes them."""


def _range(values: list[float]) -> str:
    return f"{min(values):.4f} to {max(values):.4f}" if len(values) > 1 else ""


def setting_rows(found: list[Setting]) -> list[dict[str, Any]]:
    """Return one row for each setting, best first; none where each setting has one seed."""
    if all(len(setting.runs) == 1 for setting in found):
        return []
    return [
        {
            "name": name,
            "setting": setting,
            "each": [run["test"]["f1"]["value"] or 0.0 for run in setting.runs],
            "verdict": setting.verdict(found[0]),
        }
        for setting, name in zip(found, setting_names(found), strict=True)
    ]


def report(found: list[Setting]) -> str:
    """Render the runs, their settings if there are several seeds, and what follows, as Markdown."""
    parts = [to_markdown(RUN_COLUMNS, rows(found))]
    if pooled := setting_rows(found):
        parts.append(to_markdown(SETTING_COLUMNS, pooled))
    return "\n\n".join([*parts, "\n".join(conclusions(found))]) + "\n"


def conclusions(found: list[Setting]) -> list[str]:
    """Say what follows from a table, and what does not."""
    top, best, names = rows(found)[0], found[0], setting_names(found)
    rivals = [setting for setting in found[1:] if setting.test_set == best.test_set]
    ties = [name for s, name in zip(found, names, strict=True) if s in rivals and s.is_tie(best)]
    lines = [f"Best run by F1 on the test set: {_describe(top)}."]
    if len(best.runs) > 1:
        lines.append(
            f"Best setting over all of its {len(best.runs)} seeds: {names[0]}, F1 {best.f1:.4f}."
        )
    if ties:
        lines.append(
            f"At 95 % the best setting cannot be told from {len(ties)} of the {len(rivals)} other "
            f"settings: {'; '.join(ties)}."
        )
    elif rivals:
        lines.append("At 95 % no other setting on the same test data is the best.")
    if len(found) > len(rivals) + 1:
        lines.append(
            f"{len(found) - 1 - len(rivals)} settings were judged on other test data than the best "
            "(other rows, or files that have changed): their figures cannot be compared with it."
        )
    if rivals:
        lines.append(
            "Settings are compared on F1, row by row of the test set (paired randomisation test, "
            "Holm's correction for the number of comparisons). The best of many is chosen on these "
            "rows, so its own figure is on the lucky side."
        )
        lines.append(_of_seeds([best, *rivals]))
    return lines


def _of_seeds(settings: list[Setting]) -> str:
    """Say what the comparisons know of the other chance, which seed a model was trained with."""
    numbers = {len(setting.runs) for setting in settings}
    if numbers == {1}:
        return (
            "Each setting has one seed: it is these trained models that are compared, another seed may "
            "turn out otherwise."
        )
    known = "How far the seeds of a setting lie apart is part of the p-value."
    if 1 in numbers:
        known += " A setting of one seed is taken to spread as the others do."
    if numbers & {1, 2}:
        known += " From fewer than three seeds little can be told, unless the difference is large."
    return known


def _describe(row: dict[str, Any]) -> str:
    about = f"head {row['head']}, batch {row['batch_size']}, lr {row['lr']}, seed {row['seed']}"
    if row["experiment"] != row["run_id"]:
        about = f"{row['run_id']}: {about}"
    value = "n/a" if row["f1"] is None else f"{row['f1']:.4f}"
    return f"{row['experiment']} ({about}), F1 {value}"


def write_all(folder: Path, found: list[Setting]) -> list[Path]:
    """Write the table and the best models into a folder; return what was written."""
    from toolkit.record.export import save_state_dict  # imports torch

    write_text(folder / CSV_NAME, to_csv(rows(found)))
    write_text(folder / "bert_experiment_results.md", report(found))
    written = [folder / CSV_NAME, folder / "bert_experiment_results.md"]
    for head, run in best_by_head(found).items():
        model = folder / f"best_bert_model_{head}.pth"
        config = folder / f"best_bert_model_{head}_config.json"
        weights = run["folder"] / "best" / "model.safetensors"
        if not weights.exists():
            complain(f"warning: {weights} is missing, so {model} is not written")
            continue
        # a reader finds it beside the weights that it is of, or not at all
        config.unlink(missing_ok=True)
        save_state_dict(weights, model)
        about = {name: run[name] for name in ("run_id", "config_hash", "config", "test")}
        write_json(config, {"experiment": name_of(run)} | about)
        written += [model, config]
    return written


def show(found: list[Setting]) -> None:
    """Print the table, never cut: a narrow terminal wraps its lines."""
    console = Console(width=max(Console().width, 250))
    console.print(to_table(RUN_COLUMNS, rows(found)))
    if pooled := setting_rows(found):
        say()
        console.print(to_table(SETTING_COLUMNS, pooled))
    say()
    for line in conclusions(found):
        say(line)
