"""The table of a sweep: complete, honest about ties, made of summaries only."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from toolkit.config import RunConfig
from toolkit.experiments import results, tables
from toolkit.experiments.commands import main
from toolkit.record.export import save_predictions
from toolkit.record.metrics import Confusion, as_record

LABELS = np.tile([0, 1], 150)
COLUMNS = [
    *("experiment", "head", "batch_size", "lr", "epochs", "seed"),
    *("accuracy", "accuracy_low", "accuracy_high", "precision", "precision_low", "precision_high"),
    *("recall", "recall_low", "recall_high", "f1", "f1_low", "f1_high"),
    *("n", "seconds", "reviews_per_s", "run_id", "setting_f1", "p_against_best", "verdict"),
]
"""What others' programs read."""


def make_run(
    folder: Path,
    accuracy: float,
    labels: np.ndarray = LABELS,
    revision: str = "a",
    weights: str = "w",
    **settings: Any,
) -> RunConfig:
    """Leave what a completed run leaves; its judgements are those of a run of that accuracy."""
    config = RunConfig(**settings)
    run_id = config.run_id or f"{config.head}-{config.hash()[:6]}"
    path = folder / run_id
    (path / "best").mkdir(parents=True)
    dice = np.random.default_rng(int(config.hash()[:6], 16))
    right = dice.random(len(labels)) < accuracy
    scores = np.where(right, labels, 1 - labels) * 0.8 + 0.1
    save_predictions(path / "predictions.parquet", np.arange(len(labels)), labels, scores)
    positive = scores > 0.5
    counts = Confusion(
        tp=int((positive & (labels == 1)).sum()),
        fp=int((positive & (labels == 0)).sum()),
        fn=int((~positive & (labels == 1)).sum()),
        tn=int((~positive & (labels == 0)).sum()),
    )
    test = as_record(counts, 0.3)
    summary: dict[str, Any] = {
        "run_id": run_id,
        "experiment": config.experiment,
        "config": config.identity(),
        "data_revision": revision,
        "encoder_fingerprint": weights,
    }
    summary |= {"config_hash": config.hash(), "test": test, "train_seconds": 12.5}
    (path / "summary.json").write_text(json.dumps(summary | {"reviews_per_s": 100.0}))
    (path / "status.json").write_text('{"status": "completed"}')
    save_file({"head.weight": torch.full((2,), accuracy)}, path / "best" / "model.safetensors")
    return config


def test_one_row_per_run_best_first(tmp_path: Path) -> None:
    for seed in range(3):
        make_run(tmp_path, 0.93, head="v2", seed=seed, experiment=f"good {seed}")
        make_run(tmp_path, 0.80, head="v1", seed=seed)
    found = results.settings(results.summaries(tmp_path))
    assert [len(setting.runs) for setting in found] == [3, 3], "seeds of one setting are pooled"
    listed = list(csv.DictReader(io.StringIO(tables.to_csv(results.rows(found)))))
    assert len(listed) == 6
    assert list(listed[0]) == COLUMNS
    scores = [float(row["f1"]) for row in listed]
    assert scores == sorted(scores, reverse=True)
    assert {row["experiment"] for row in listed[:3]} == {"good 0", "good 1", "good 2"}
    assert {row["verdict"] for row in listed[:3]} == {"best setting"}
    assert {row["verdict"] for row in listed[3:]} == {"not the best"}
    assert all(float(row["f1_low"]) < float(row["f1"]) < float(row["f1_high"]) for row in listed)
    assert listed[0]["n"] == "300"


def test_runs_from_other_weights_are_no_seeds_of_a_setting(tmp_path: Path) -> None:
    """An encoder's folder keeps its name when somebody goes on with its pretraining."""
    for seed, weights in enumerate(["before", "before", "after"]):
        make_run(tmp_path, 0.9, seed=seed, weights=weights)
    found = results.settings(results.summaries(tmp_path))
    assert sorted(len(setting.runs) for setting in found) == [1, 2]


def test_ties_are_said(tmp_path: Path) -> None:
    make_run(tmp_path, 0.88, head="v1", experiment="one")
    make_run(tmp_path, 0.88, head="v2", experiment="two")
    make_run(tmp_path, 0.60, head="v3", experiment="three")
    found = results.settings(results.summaries(tmp_path))
    text = tables.report(found)
    assert "cannot be told from 1 of the 2 other settings" in text
    assert text.count("not the best") == 1
    assert text.count("\n| ") == 4, "a rule, and three runs"
    assert "lucky side" in text


def test_names_are_shown_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path, 0.88, head="v1", experiment="[bold]a|b[/nothing]")
    found = results.settings(results.summaries(tmp_path))
    tables.show(found)
    assert "[bold]a|b[/nothing]" in capsys.readouterr().out
    assert r"| [bold]a\|b[/nothing] |" in tables.report(found)


def test_runs_on_other_rows_are_not_compared(tmp_path: Path) -> None:
    """The rows that most runs share count, not those on which some run looks best."""
    make_run(tmp_path, 1.0, head="v2", seed=5, labels=1 - LABELS, experiment="elsewhere")
    make_run(tmp_path, 0.9, head="v1")
    make_run(tmp_path, 0.6, head="v2")
    found = results.settings(results.summaries(tmp_path))
    verdicts = [row["verdict"] for row in results.rows(found)]
    assert verdicts == ["best", "not the best", "other test data"]
    text = tables.report(found)
    assert "1 settings were judged on other test data" in text
    best = results.best_by_head(found)
    assert best["v2"]["experiment"] != "elsewhere"


def test_a_file_that_was_mended_between_two_runs(tmp_path: Path) -> None:
    """The same rows and labels by number, but nobody knows which texts: neither seeds nor rivals."""
    for seed in range(3):
        make_run(tmp_path, 0.9, head="v1", seed=seed, revision="before" if seed < 2 else "after")
    found = results.settings(results.summaries(tmp_path))
    assert [len(setting.runs) for setting in found] == [2, 1]
    assert [row["verdict"] for row in results.rows(found)][-1] == "other test data"
    assert "or files that have changed" in tables.report(found)


def test_a_run_that_was_trained_again_is_no_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The newest counts, whatever it is called."""
    make_run(tmp_path, 0.9, seed=1)
    for day, name in ((1, "first"), (3, "again"), (2, "between")):
        make_run(tmp_path, 0.9, seed=0, run_id=name)
        status = {"status": "completed", "time": f"2026-11-0{day}T12:00:00+0000"}
        (tmp_path / name / "status.json").write_text(json.dumps(status))
    [setting] = results.settings(results.summaries(tmp_path))
    assert sorted(run["config"]["seed"] for run in setting.runs) == [0, 1]
    assert "again" in [run["run_id"] for run in setting.runs]
    said = capsys.readouterr().err
    assert "between is left out of the table: again, which is newer" in said
    assert "first is left out of the table: again" in said


@pytest.mark.parametrize(
    ("seeds", "said"),
    [
        ((1, 1, 1), ["it is these trained models that are compared"]),
        ((1, 3, 3), ["part of the p-value", "A setting of one seed is", "fewer than three"]),
        ((2, 3, 3), ["part of the p-value", "fewer than three"]),
        ((3, 3, 3), ["part of the p-value"]),
    ],
)
def test_what_is_said_of_seeds(
    seeds: tuple[int, int, int], said: list[str], tmp_path: Path
) -> None:
    for head, accuracy, number in zip(("v1", "v2", "v3"), (0.9, 0.7, 0.7), seeds, strict=True):
        for seed in range(number):
            make_run(tmp_path, accuracy, head=head, seed=seed)
    last_line = tables.report(results.settings(results.summaries(tmp_path))).splitlines()[-1]
    assert all(part in last_line for part in said)
    assert last_line.count(".") == len(said), "one sentence each"


def test_one_run_is_better_than_none(tmp_path: Path) -> None:
    make_run(tmp_path, 0.9, head="v1")
    make_run(tmp_path, 0.6, head="v2", labels=1 - LABELS)
    found = results.settings(results.summaries(tmp_path))
    assert "below it" not in tables.report(found), "nothing was compared"


def test_seeds_on_other_rows_are_not_pooled(tmp_path: Path) -> None:
    make_run(tmp_path, 0.9, head="v1", seed=0)
    make_run(tmp_path, 0.9, head="v1", seed=1, labels=1 - LABELS)
    assert [len(s.runs) for s in results.settings(results.summaries(tmp_path))] == [1, 1]


def test_a_damaged_summary_is_named_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path, 0.9, head="v1")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "summary.json").write_text('{"test": ')
    assert len(results.summaries(tmp_path)) == 1
    assert "x/summary.json cannot be read" in capsys.readouterr().err


def test_predictions_have_to_be_those_of_the_summary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path, 0.9, head="v1")
    [path] = tmp_path.glob("*/predictions.parquet")
    save_predictions(path, np.arange(300), LABELS, np.full(300, 0.9))
    make_run(tmp_path, 0.8, head="v2")
    for said in ("is not what", "is missing"):
        found = results.settings(results.summaries(tmp_path))
        assert [setting.runs[0]["config"]["head"] for setting in found] == ["v2"], "the rest counts"
        assert said in capsys.readouterr().err
        path.unlink(missing_ok=True)


def test_the_command_writes_table_and_models(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path, 0.85, head="v2", seed=1)
    make_run(tmp_path, 0.95, head="v2", seed=2)
    make_run(tmp_path, 0.70, head="v1")
    (tmp_path / "v1-x.old-1").mkdir()
    (tmp_path / "v1-x.old-1" / "summary.json").write_text("moved aside")
    assert main(["results", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "Best run by F1" in said
    weights = torch.load(tmp_path / "best_bert_model_v2.pth", weights_only=True)
    assert weights["head.weight"][0] == pytest.approx(0.95)
    about = json.loads((tmp_path / "best_bert_model_v2_config.json").read_text())
    assert about["config"]["seed"] == 2
    assert (tmp_path / "best_bert_model_v1.pth").exists()
    assert len((tmp_path / "bert_experiment_results.csv").read_text().splitlines()) == 4
    assert "| experiment |" in (tmp_path / "bert_experiment_results.md").read_text()


def test_a_model_that_is_missing_stops_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And what is written is never beside the configuration of another one."""
    first, second = make_run(tmp_path, 0.9, head="v1"), make_run(tmp_path, 0.8, head="v2")
    gone = tmp_path / f"v1-{first.hash()[:6]}" / "best" / "model.safetensors"
    gone.unlink()
    found = results.settings(results.summaries(tmp_path))
    written = {path.name for path in tables.write_all(tmp_path, found)}
    assert {"best_bert_model_v2.pth", "best_bert_model_v2_config.json"} <= written
    assert not (tmp_path / "best_bert_model_v1.pth").exists()
    assert f"warning: {gone} is missing" in capsys.readouterr().err

    kept = tmp_path / f"v2-{second.hash()[:6]}" / "best" / "model.safetensors"
    kept.write_bytes(b"damaged")
    with pytest.raises(SafetensorError):
        tables.write_all(tmp_path, found)
    assert not (tmp_path / "best_bert_model_v2_config.json").exists()


def test_seeds_are_pooled_in_a_table_of_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in range(3):
        make_run(tmp_path, 0.93, head="v2", seed=seed)
        make_run(tmp_path, 0.60, head="v1", seed=seed)
    found = results.settings(results.summaries(tmp_path))
    assert results_by_name(found) == {"head=v2": "best setting", "head=v1": "not the best"}
    tables.show(found)
    said = capsys.readouterr().out
    assert "Best setting over all of its 3 seeds: head=v2" in said
    [line] = [line for line in said.splitlines() if line.startswith("head=v1")]
    assert line.split()[1] == "3"
    assert " to " in line
    text = tables.report(found)
    assert "| setting | seeds |" in text
    assert text.count("best setting |") == 4, "each of its runs, and the setting itself"


def test_a_name_that_several_settings_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says what differs, in both tables; seeds of one setting may share it."""
    for seed in range(2):
        make_run(tmp_path, 0.93, dropout=0.1, seed=seed, experiment="mine")
        make_run(tmp_path, 0.60, dropout=0.2, seed=seed, experiment="mine")
        make_run(tmp_path, 0.80, dropout=0.3, seed=seed, experiment="other")
    found = results.settings(results.summaries(tmp_path))
    names = ["mine dropout=0.1", "other", "mine dropout=0.2"]
    assert results.setting_names(found) == names
    assert [row["experiment"] for row in results.rows(found)] == [
        name for name in names for _ in range(2)
    ]
    tables.show(found)
    said = capsys.readouterr().out
    assert said.count("\nmine dropout=0.2 ") == 3, "two runs and their setting"
    assert "seeds: mine dropout=0.1, F1" in said


def results_by_name(found: list[results.Setting]) -> dict[str, str]:
    names = results.setting_names(found)
    return {name: setting.verdict(found[0]) for name, setting in zip(names, found, strict=True)}
