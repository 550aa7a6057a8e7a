"""What the runs of a sweep came to: seeds pooled, settings compared. From summaries: never from logs."""

import hashlib
import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet

from toolkit.console import complain
from toolkit.errors import DataError
from toolkit.experiments.compare import ALPHA, Judged, against_best, f1
from toolkit.files import facts_in

METRICS = ("accuracy", "precision", "recall", "f1")
SETTINGS = ("head", "batch_size", "lr", "epochs", "seed")
OTHER = "other test data"


@dataclass
class Setting:
    """The runs that differ in nothing but the seed."""

    runs: list[dict[str, Any]]
    test_set: str
    """Hash of the test rows, their labels, and the files that they are from."""
    judged: Judged
    f1: float
    p: float | None = None
    """Adjusted p-value against the best setting; None for the best itself, and where there is
    nothing to compare with."""

    def is_tie(self, best: "Setting") -> bool:
        """Tell whether it was compared with the best, and cannot be told from it."""
        return self is not best and self.p is not None and self.p >= ALPHA

    def verdict(self, best: "Setting") -> str:
        """Say how it stands against the best."""
        if self is best:
            return "best" if len(self.runs) == 1 else "best setting"
        if self.p is None:
            return OTHER
        return "cannot be told from the best" if self.is_tie(best) else "not the best"


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

    Figures of different test data cannot be compared: the best is one of the runs on the data that
    most runs share, which come first. A run without its predictions is left out, with a warning; so
    is one that was trained again under another id, which is no further seed.
    """
    groups: dict[tuple[str, str], list[Predicted]] = defaultdict(list)
    for run in runs:
        key = {name: value for name, value in run["config"].items() if name != "seed"}
        key["encoder weights"] = run.get("encoder_fingerprint")  # a folder's may have changed since
        try:
            predicted = _predictions(run)
        except (DataError, OSError, pyarrow.ArrowException) as error:
            complain(f"warning: {run['run_id']} is left out of the table: {error}")
            continue
        groups[json.dumps(key, sort_keys=True), predicted.test_set].append(predicted)
    if not groups:
        return []
    found = [_pool(_newest_of_each_seed(group)) for group in groups.values()]
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
    """Hash of the test rows, their labels, and the files that they are from."""
    labels: np.ndarray
    positive: np.ndarray


def _newest_of_each_seed(group: list[Predicted]) -> list[Predicted]:
    kept = {each.run["config"]["seed"]: each for each in sorted(group, key=_ended)}
    for each in group:
        newest = kept[each.run["config"]["seed"]]
        if newest is not each:
            complain(
                f"warning: {each.run['run_id']} is left out of the table: {newest.run['run_id']}, which "
                "is newer, has the same settings and seed"
            )
    return list(kept.values())


def _ended(predicted: Predicted) -> str:
    return str(facts_in(predicted.run["folder"] / "status.json").get("time", ""))


def _pool(group: list[Predicted]) -> Setting:
    judged = Judged(group[0].labels, np.stack([each.positive for each in group]))
    return Setting([each.run for each in group], group[0].test_set, judged, f1(judged))


def _predictions(run: dict[str, Any]) -> Predicted:
    """Read what a run predicted, and hold it against its summary."""
    path = run["folder"] / "predictions.parquet"
    if not path.exists():
        raise DataError([f"{path} is missing, without which it cannot be compared"])
    table = pyarrow.parquet.read_table(path)
    labels, positive = table["label"].to_numpy(), table["score"].to_numpy() > 0.5
    matrix = run["test"]["confusion"]
    found = int((positive & (labels == 1)).sum()), int(positive.sum())
    if found != (matrix["tp"], matrix["tp"] + matrix["fp"]):
        raise DataError([f"{path} is not what {run['folder'] / 'summary.json'} was made of"])
    # not the data's fingerprint: other training rows or another length leave the test rows the same.
    # But somebody may have mended a text in a file since
    source = run["config"]["dataset"] + run.get("data_revision", "")
    key = table["row_id"].to_numpy().tobytes() + labels.tobytes()
    test_set = hashlib.sha256(key + source.encode()).hexdigest()
    return Predicted(run, test_set, labels, positive)


def rows(found: list[Setting]) -> list[dict[str, Any]]:
    """Return one row for each run, best first."""
    names = run_names(found)
    listed = [
        {"experiment": names[run["run_id"]]} | _row(run, setting, found[0])
        for setting in found
        for run in setting.runs
    ]
    return sorted(listed, key=lambda row: (row["verdict"] != OTHER, row["f1"] or 0.0), reverse=True)


def name_of(run: dict[str, Any]) -> str:
    """Return what the user calls a run."""
    return run.get("experiment") or run["run_id"]


def run_names(found: list[Setting]) -> dict[str, str]:
    """Name runs, by their ids; a name that several settings have says what differs between them, too."""
    settings_of = Counter(name for setting in found for name in set(map(name_of, setting.runs)))
    names = {}
    for setting, differs in zip(found, _differences(found), strict=True):
        for run in setting.runs:
            name = name_of(run)
            names[run["run_id"]] = name if settings_of[name] == 1 else f"{name} {differs}"
    return names


def setting_names(found: list[Setting]) -> list[str]:
    """Name settings: as the user named their runs, or by what differs between them."""
    of_run = run_names(found)
    names = []
    for setting, differs in zip(found, _differences(found), strict=True):
        given = {of_run[run["run_id"]] for run in setting.runs if run.get("experiment")}
        names.append(", ".join(sorted(given)) or differs)
    return names


def _differences(found: list[Setting]) -> list[str]:
    """Describe settings by what differs between them (and seeds do not), or by a run's id."""
    configs = [setting.runs[0]["config"] for setting in found]
    differ = [
        key
        for key in dict.fromkeys([*SETTINGS, *configs[0]])
        if key != "seed" and len({str(config.get(key)) for config in configs}) > 1
    ]
    return [
        " ".join(f"{key}={config.get(key)}" for key in differ) or setting.runs[0]["run_id"]
        for setting, config in zip(found, configs, strict=True)
    ]


def _row(run: dict[str, Any], setting: Setting, best: Setting) -> dict[str, Any]:
    row: dict[str, Any] = {name: run["config"][name] for name in SETTINGS}
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


def best_by_head(found: list[Setting]) -> dict[str, dict[str, Any]]:
    """Return the best run by F1 of each head, of those on the most shared test rows if it has any."""
    best: dict[str, dict[str, Any]] = {}
    by_id = {run["run_id"]: run for setting in found for run in setting.runs}
    for row in rows(found):
        best.setdefault(row["head"], by_id[row["run_id"]])
    return best
