"""Search without a server: Optuna proposes, real runs answer, a killed worker loses no trial."""

import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml

from tests.programs import ROOT
from toolkit.errors import ConfigError
from toolkit.experiments import local
from toolkit.experiments import sweep as sweeps
from toolkit.experiments.commands import main
from toolkit.experiments.search import Search, suggest
from toolkit.experiments.states import read_state
from toolkit.record.journal import RunFolder


def write(folder: Path, flags: list[str], **parameters: Any) -> Path:
    fixed = dict(flag[2:].split("=") for flag in flags)
    content = {
        "program": str(ROOT / "toolkit" / "train.py"),
        "method": "bayes",
        "metric": {"name": "eval/f1", "goal": "maximize"},
        "command": [sys.executable, "${program}", "${args}"],
        "parameters": {name: {"value": value} for name, value in fixed.items()} | parameters,
    }
    path = folder / "search.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def open_search(path: Path, seed: int = 0) -> Search:
    return Search(sweeps.load(path), [], "random", seed)


LR = {"distribution": "log_uniform_values", "min": 1e-5, "max": 1e-2}


def test_runs_are_proposed_and_judged_by_validation(
    tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    path = write(tmp_path, tiny_flags, lr=LR, head={"values": ["v1", "v2"]}, epochs={"value": 2})
    search = open_search(path)
    assert search.run(2)
    found = search.study.get_trials()
    assert [trial.state.name for trial in found] == ["COMPLETE"] * 2
    for trial in found:
        assert read_state(search.folder / trial.user_attrs["run_id"]).kind == "completed"
        assert len(trial.intermediate_values) == 2, "one for each evaluation"
        assert trial.value == max(trial.intermediate_values.values())
        assert 1e-5 <= trial.params["lr"] <= 1e-2
    again = open_search(path)
    assert again.run(2)
    assert len(again.study.get_trials()) == 2, "nothing is left to do"
    assert "Best of 2 by eval/f1" in again.best()


def test_what_is_not_promising_is_stopped(
    tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    path = write(tmp_path, tiny_flags, lr=LR, epochs={"value": 2000})
    search = open_search(path)
    search.study.pruner = optuna.pruners.ThresholdPruner(lower=2.0)
    assert search.run(1)
    [trial] = search.study.get_trials()
    assert trial.state.name == "PRUNED"
    assert read_state(search.folder / trial.user_attrs["run_id"]).kind == "stopped"


@pytest.mark.parametrize(
    ("status", "kind", "outcome"),
    [("preempted", "stopped", "PRUNED"), ("diverged", "failed", "FAIL")],
)
def test_what_fails_while_it_is_asked_to_stop_has_failed(
    tiny_flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    status: str,
    kind: str,
    outcome: str,
) -> None:
    def ask_and_wait(trial: Any, run: sweeps.Run) -> bool:
        RunFolder(run.folder).set_status(status, message="11 steps")
        return True

    search = open_search(write(tmp_path, tiny_flags, lr=LR))
    monkeypatch.setattr(search, "_watch", ask_and_wait)
    search.run(1)
    [trial] = search.study.trials
    assert trial.state.name == outcome
    assert read_state(search.folder / trial.user_attrs["run_id"]).kind == kind


def test_a_stop_while_a_run_is_started_reaches_it(
    tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    search = open_search(write(tmp_path, tiny_flags, lr=LR, epochs={"value": 60}))

    def start(*arguments: Any, **environment: str) -> "subprocess.Popen[bytes]":
        process = start_run(*arguments, **environment)
        search.stop()
        return process

    start_run = local.start
    monkeypatch.setattr(local, "start", start)
    assert not search.run(1)
    [trial] = search.study.trials
    assert read_state(search.folder / trial.user_attrs["run_id"]).kind == "preempted"


def test_a_killed_worker_loses_no_trial(tiny_flags: list[str], tmp_path: Path) -> None:
    """The next one does the same trial again, whose run goes on where it was."""
    epochs = {"value": 40}
    path = write(tmp_path, [*tiny_flags, "--save_minutes=0"], lr=LR, epochs=epochs)
    command = [sys.executable, "-m", "toolkit", "sweep", "run", str(path)]
    command += ["--search=optuna", "--trials=1"]
    settings = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=settings, start_new_session=True)
    runs = tmp_path / "runs"
    deadline = time.monotonic() + 60
    while not list(runs.glob("*/checkpoints/step-00002*")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.kill()
    process.wait()
    subprocess.run(["pkill", "-KILL", "-f", f"output_dir={runs}"], check=True)
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    folders = [folder for folder in runs.iterdir() if (folder / "status.json").exists()]
    assert len(folders) == 1
    assert read_state(folders[0]).kind == "completed"
    [log] = (runs / "logs").iterdir()
    assert "Going on after step" in log.read_text()


def test_two_workers_share_the_trials(tiny_flags: list[str], tmp_path: Path) -> None:
    """Neither takes the other's trial for lost, and there are as many as were asked for."""
    path = write(tmp_path, tiny_flags, lr=LR)
    command = [sys.executable, "-m", "toolkit", "sweep", "run", str(path)]
    command += ["--search=optuna", "--sampler=random", "--trials=3"]
    settings = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    workers = [subprocess.Popen(command, env=settings, stdout=subprocess.PIPE) for _ in range(2)]
    said = [worker.communicate(timeout=240)[0].decode() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], said
    states = [trial.state.name for trial in open_search(path).study.trials]
    assert states == ["COMPLETE"] * 3
    assert all("completed" in text for text in said), "each had one at least"
    assert sum(text.count("  completed F1") for text in said) == 3


def test_failing_runs_end_the_search(
    tiny_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [flag for flag in tiny_flags if not flag.startswith("--dataset")]
    path = write(tmp_path, [*flags, f"--dataset={tmp_path / 'absent.csv'}"], lr=LR)
    assert main(["run", str(path), "--search=optuna", "--trials=2"]) == 1
    said = capsys.readouterr().out
    assert said.count("failed data_error: ") == 2
    assert "No trial is complete" in said


def test_a_metric_that_no_run_has_ends_the_search_at_once(
    tiny_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, tiny_flags, lr=LR)
    path.write_text(path.read_text().replace("eval/f1", "eval/F1"))
    assert main(["run", str(path), "--search=optuna", "--trials=3"]) == 2
    shown = capsys.readouterr()
    assert "metric.name got 'eval/F1'" in shown.err
    assert "eval/accuracy" in shown.err
    assert "[1]" not in shown.out, "one run is enough to know"


def test_what_a_search_here_does_not_do_is_refused(
    tiny_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The test set must not choose, and W&B's other way to say when to stop means something else."""
    path = write(tmp_path, tiny_flags, lr=LR)
    content = yaml.safe_load(path.read_text())
    content["metric"]["name"] = "test/f1"
    content["early_terminate"] = {"type": "hyperband", "max_iter": 27, "s": 2}
    path.write_text(yaml.safe_dump(content))
    assert main(["run", str(path), "--search=optuna"]) == 2
    shown = capsys.readouterr().err
    assert "metric.name got 'test/f1', allowed is a figure of validation" in shown
    assert "early_terminate.max_iter, s: --search has min_iter, eta alone" in shown


def test_values_that_do_not_go_together_are_no_end(
    tiny_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """head_depth only applies to head v3."""
    path = write(tmp_path, tiny_flags, head={"values": ["v1"]}, head_depth={"value": 4})
    for _ in range(2):  # the second start finds nothing left to do
        assert not open_search(path).run(2)
    assert capsys.readouterr().out.count("is no run: ") == 2


def test_a_flag_may_not_replace_what_is_searched(tiny_flags: list[str], tmp_path: Path) -> None:
    path = write(tmp_path, tiny_flags, lr=LR)
    flags = ["--lr=3e-5"]
    with pytest.raises(ConfigError, match="varies it"):
        Search(sweeps.load(path), [*flags], "random", 0)


def test_distributions() -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    trial = study.ask()
    assert suggest(trial, "a", {"value": 3}) == 3
    assert suggest(trial, "b", {"values": [None, "x"]}) in (None, "x")
    assert suggest(trial, "c", {"min": 1, "max": 3}) in (1, 2, 3)
    assert 0.5 <= suggest(trial, "d", {"min": 0.5, "max": 1}) <= 1
    assert suggest(trial, "e", {"distribution": "q_uniform", "min": 0, "max": 8, "q": 4}) in (
        0,
        4,
        8,
    )
    low, high = math.log(1e-5), math.log(1e-3)
    assert (
        1e-5
        <= suggest(trial, "f", {"distribution": "log_uniform", "min": low, "max": high})
        <= 1e-3
    )
    whole = suggest(trial, "i", {"distribution": "q_uniform", "min": 8, "max": 64, "q": 8})
    assert isinstance(whole, int)
    assert whole % 8 == 0
    with pytest.raises(ConfigError, match="normal"):
        suggest(trial, "g", {"distribution": "normal", "min": 0, "max": 1})
    with pytest.raises(ConfigError, match="needs values or min, max"):
        suggest(trial, "h", {"distribution": "normal", "mu": 0})


def test_another_search_does_not_take_over_results(tiny_flags: list[str], tmp_path: Path) -> None:
    path = write(tmp_path, tiny_flags, lr=LR)
    names = {open_search(path).name}
    names.add(Search(sweeps.load(path), ["--epochs=7"], "random", 0).name)
    path.write_text(path.read_text().replace("maximize", "minimize"))
    names.add(open_search(path).name)
    path.write_text(path.read_text() + "run_cap: 7\n")
    names.add(open_search(path).name)
    assert len(names) == 3, "more trials are the same search"


def test_what_a_search_does_not_know(
    tiny_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, tiny_flags, lr=LR)
    wrong = ["--jobs=2", "--retry_failed", "--trials=0"]
    assert main(["run", str(path), "--search=optuna", *wrong]) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in ("--jobs", "--retry_failed", "--trials got 0"))
