"""Our reading of sweep files against W&B's own schema and engine, which its server runs.

The engine is the package `sweeps`, pinned in `launch/test.sh`: it asks for an old numpy that it can do
without, so it cannot be among the development extra's packages.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.programs import ROOT
from toolkit.config import parse
from toolkit.errors import ConfigError
from toolkit.experiments import sweep as ours

engine = pytest.importorskip("sweeps", reason="pip install --no-deps sweeps, see launch/test.sh")
SHIPPED = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))
NESTED: dict[str, Any] = {
    "method": "grid",
    "program": "toolkit/train.py",
    "name": "n",
    "description": "d",
    "project": "p",
    "entity": "e",
    "run_cap": 30,
    "metric": {"name": "eval/loss", "goal": "minimize"},
    "early_terminate": {"type": "hyperband", "min_iter": 3},
    "command": ["${env}", "${interpreter}", "${program}", "--overwrite", "${args}"],
    "parameters": {
        "wandb": {"parameters": {"project": {"value": "p"}, "group": {"value": "a"}}},
        "seed": {"distribution": "int_uniform", "min": 1, "max": 3},
        "dropout": {"values": [0, 0.1]},
        "head_width": {"values": [None, 64]},
        "lr": {"value": 1e-05},
    },
}
SEARCH: dict[str, Any] = NESTED | {
    "method": "bayes",
    "parameters": {
        "lr": {"distribution": "log_uniform_values", "min": 1e-5, "max": 1e-3},
        "warmup_ratio": {"min": 0.0, "max": 0.5},
        "dropout": {"distribution": "q_uniform", "min": 0.0, "max": 0.5, "q": 0.1},
        "head": {"values": ["v1", "v2"], "probabilities": [0.2, 0.8]},
    },
}
CASES = [pytest.param(yaml.safe_load(path.read_text()), id=path.stem) for path in SHIPPED]
CASES.append(pytest.param(NESTED, id="nested"))


def theirs(content: dict[str, Any]) -> list[list[str]]:
    """Let the engine propose runs until there are none; return the flags its agent would give."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    done: list[Any] = []
    while (proposed := engine.next_run(content, done, validate=True)) is not None:
        proposed.state = engine.RunState.finished
        done.append(proposed)
    return [create_sweep_command_args({"args": run.config})["args"] for run in done]


@pytest.mark.parametrize("content", CASES)
def test_the_engine_proposes_the_same_runs(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert not list(engine.config.schema.validator.iter_errors(content))
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(content))
    planned = {run.run_id for run in ours.runs(ours.load(path), [])}
    proposed = theirs(content)
    assert {parse(flags).run_id for flags in proposed} == planned
    assert len(proposed) == len(planned) > 1


def test_there_are_as_many_sweeps_as_we_ship() -> None:
    assert [path.stem for path in SHIPPED] == ["heads", "smoke", "study"]


def test_what_the_engine_searches_can_be_run(tmp_path: Path) -> None:
    """Values as the engine draws them parse; and Optuna draws from the same file."""
    optuna = pytest.importorskip("optuna")
    from toolkit.experiments.search import suggest

    assert not list(engine.config.schema.validator.iter_errors(SEARCH))
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(SEARCH))
    sweep = ours.load(path)
    for number in range(5):
        drawn = engine.next_run(SEARCH | {"method": "random"}, [], validate=True).config
        run = ours.make_run(sweep, number, {key: item["value"] for key, item in drawn.items()}, [])
        assert 1e-5 <= run.config.lr <= 1e-3
        trial = optuna.create_study().ask()
        cell = {key: suggest(trial, key, item) for key, item in SEARCH["parameters"].items()}
        assert cell.keys() == drawn.keys()
        ours.make_run(sweep, number, cell, [])


@pytest.mark.parametrize(
    "wrong",
    [
        {"method": "gird"},
        {"parameters": {}},
        {"parameters": {"lr": {"values": 3}}},
        {"parameters": {"lr": {}}},
        {"metric": {"goal": "best"}},
        {"command": "python x"},
        {"colour": "red"},
    ],
)
def test_what_the_schema_refuses_we_refuse(wrong: dict[str, Any], tmp_path: Path) -> None:
    content = NESTED | wrong
    refused = bool(list(engine.config.schema.validator.iter_errors(content)))
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError):
        ours.load(path)
    assert refused, json.dumps(wrong)
