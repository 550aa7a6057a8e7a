"""The results of a sweep as people and programs read them.

bert_experiment_results.csv            one row per run, best first
bert_experiment_results.md             the same to read, and what can be told apart
best_bert_model_<head>.pth             state dict of the best run with that head
best_bert_model_<head>_config.json     its settings and metrics
"""

import csv
import io
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from toolkit.console import complain, say
from toolkit.experiments.results import (
    COLUMNS,
    METRICS,
    SETTINGS,
    Setting,
    best_by_head,
    name_of,
    rows,
    setting_names,
)
from toolkit.files import write_json, write_text

CSV_NAME = "bert_experiment_results.csv"


def to_csv(listed: list[dict[str, Any]]) -> str:
    """Render rows as CSV; an empty field means that there is no value."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(listed)
    return out.getvalue()


def to_table(titles: tuple[str, ...], left: tuple[str, ...], cells: list[list[str]]) -> Table:
    """Render rows for a terminal."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in titles:
        table.add_column(title, justify="left" if title in left else "right", no_wrap=True)
    for row in cells:
        table.add_row(*map(Text, row))  # as they are: names may hold markup
    return table


def to_markdown(found: list[Setting]) -> str:
    """Render the runs, their settings if there are several seeds, and what follows, as Markdown."""
    parts = [_markdown(_TITLES, _LEFT, [_cells(row) for row in rows(found)])]
    if has_seeds(found):
        parts.append(_markdown(_SETTING_TITLES, _SETTING_LEFT, setting_cells(found)))
    return "\n\n".join([*parts, "\n".join(conclusions(found))]) + "\n"


def _markdown(titles: tuple[str, ...], left: tuple[str, ...], cells: list[list[str]]) -> str:
    lines = ["| " + " | ".join(titles) + " |"]
    lines += ["|" + "|".join("---" if title in left else "---:" for title in titles) + "|"]
    escaped = [[cell.replace("|", r"\|") for cell in row] for row in cells]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in escaped)])


def has_seeds(found: list[Setting]) -> bool:
    """Tell whether a setting was run with several seeds."""
    return any(len(setting.runs) > 1 for setting in found)


_SETTING_TITLES = ("setting", "seeds", "F1 of all seeds", "lowest to highest", "against the best")
_SETTING_LEFT = ("setting", "lowest to highest", "against the best")


def setting_cells(found: list[Setting]) -> list[list[str]]:
    """Return one row for each setting, best first."""
    names = setting_names(found)
    cells = []
    for setting, name in zip(found, names, strict=True):
        each = [run["test"]["f1"]["value"] or 0.0 for run in setting.runs]
        p = "" if setting.p is None else f" (p = {setting.p:.2g})"
        spread = f"{min(each):.4f} to {max(each):.4f}" if len(each) > 1 else ""
        verdict = f"{setting.verdict(found[0])}{p}"
        cells.append([name, str(len(each)), f"{setting.f1:.4f}", spread, verdict])
    return cells


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
            "Holm's correction for the number of comparisons; seeds of one setting are pooled). The "
            "best of many is chosen on these rows, so its own figure is on the lucky side."
        )
        lines.append(f"That is the chance of the test rows. {_of_seeds([best, *rivals])}")
    return lines


def _of_seeds(settings: list[Setting]) -> str:
    """Say what is known of the chance that the test leaves out: which seed a model was trained with."""
    fewest = min(len(setting.runs) for setting in settings)
    if fewest > 1:
        return f"With {fewest} seeds or more each, the spread of runs above tells what a seed does."
    return (
        "Some settings have one seed: it is these trained models that differ, another seed may turn out "
        "otherwise."
    )


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
    write_text(folder / "bert_experiment_results.md", to_markdown(found))
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
    console.print(to_table(_TITLES, _LEFT, [_cells(row) for row in rows(found)]))
    if has_seeds(found):
        say()
        console.print(to_table(_SETTING_TITLES, _SETTING_LEFT, setting_cells(found)))
    say()
    for line in conclusions(found):
        say(line)
