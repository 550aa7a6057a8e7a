"""One sweep file: the same runs and ids whoever starts them; wrong ones are explained whole."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from tests.programs import ROOT, run_python
from toolkit.config import parse
from toolkit.data.steps import Stream
from toolkit.engine.trainer import Trainer
from toolkit.errors import ConfigError
from toolkit.experiments import sweep as sweeps
from toolkit.experiments.arguments import split_flags
from toolkit.experiments.commands import main
from toolkit.experiments.plan import costs, evaluations

SWEEPS = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))


def write(folder: Path, **content: Any) -> Path:
    path = folder / "sweep.yaml"
    whole = {"program": "toolkit/train.py", "method": "grid"} | content
    path.write_text(yaml.safe_dump(whole, sort_keys=False))
    return path


def runs(path: Path, *extra: str) -> list[sweeps.Run]:
    return sweeps.runs(sweeps.load(path), list(extra))


def test_the_last_parameter_varies_fastest_and_ids_are_those_of_the_flags(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        command=["accelerate", "launch", "${program}", "--track=none", "${args}"],
        parameters={
            "head": {"values": ["v1", "v2"]},
            "epochs": {"value": 2},
            "lr": {"values": [1e-5, 0.1, "2e-5"]},
        },
    )
    found = runs(path, "--dataset=mine.csv", "--epochs=3")
    assert [run.label for run in found][:4] == [
        "head=v1 lr=1e-05",
        "head=v1 lr=0.1",
        "head=v1 lr=2e-5",
        "head=v2 lr=1e-05",
    ]
    assert [run.index for run in found] == [*range(6)]
    flags = [
        "--track=none",
        "--head=v2",
        "--epochs=2",
        "--lr=0.1",
        "--dataset=mine.csv",
        "--epochs=3",
    ]
    assert found[4].flags == flags
    assert found[4].command[:2] == ["accelerate", "launch"]
    assert found[4].command[-6:] == flags
    assert found[4].config.epochs == 3, "a flag replaces what is the same in all runs"
    assert found[4].run_id == parse(flags).run_id
    assert len({run.run_id for run in found}) == 6


def test_nested_parameters_and_other_macros(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WHERE", "here")
    path = write(
        tmp_path,
        command=[
            "${env}",
            "${interpreter}",
            "${program}",
            "--output_dir=${envvar:WHERE}",
            "${args}",
        ],
        parameters={
            "wandb": {"parameters": {"project": {"value": "p"}, "group": {"value": "a"}}},
            "seed": {"distribution": "int_uniform", "min": 1, "max": 2},
        },
    )
    found = runs(path)
    assert found[0].command[:2] == ["/usr/bin/env", "python"]
    assert found[0].flags == [
        "--output_dir=here",
        "--wandb={'project': 'p', 'group': 'a'}",
        "--seed=1",
    ]
    assert found[1].config.wandb.group == "a"
    assert found[1].config.seed == 2


def test_the_agent_gives_the_same_flags(tmp_path: Path) -> None:
    """W&B's own function, on what its server would send for the same run."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    values = {"head": "v1", "lr": 2e-05, "max_steps": None, "overwrite": False, "seed": 3}
    parameters = {name: {"values": [value]} for name, value in values.items()}
    path = write(tmp_path, command=["${program}", "${args}"], parameters=parameters)
    sent = {"args": {name: {"value": value} for name, value in values.items()}}
    [run] = runs(path)
    assert run.flags == create_sweep_command_args(sent)["args"]


def test_all_problems_at_once(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        method="gird",
        command="python train.py",
        colour="red",
        parameters={"lr": {"values": []}, "head": 3},
    )
    with pytest.raises(ConfigError) as caught:
        sweeps.load(path)
    text = str(caught.value)
    for part in ("gird", "command must be a list", "colour", "parameters.lr", "parameters.head"):
        assert part in text
    assert len(caught.value.problems) == 5


@pytest.mark.parametrize(
    ("parameter", "said"),
    [
        ({"min": "1e-5", "max": 1e-3}, "write 1.0e-5"),
        ({"min": 3}, "needs min and max"),
        ({"distribution": "int_uniform", "min": 3, "max": 1}, "min not above max"),
        ({"min": 0, "max": True}, "max got True"),
        ({"parameters": {"group": "abc"}}, "parameters.x.group got 'abc'"),
        ({"value": 1, "values": 3}, "values got 3"),
    ],
)
def test_parameters_that_are_none(parameter: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = write(tmp_path, command=["${program}", "${args}"], parameters={"x": parameter})
    with pytest.raises(ConfigError, match=said):
        sweeps.load(path)


def test_a_goal_that_is_not_said_is_wandbs(tmp_path: Path) -> None:
    command = ["${program}", "${args}"]
    parameters = {"seed": {"value": 1}}
    path = write(tmp_path, command=command, parameters=parameters, metric={"name": "eval/loss"})
    assert not sweeps.load(path).maximize
    path.write_text(
        yaml.safe_dump({"method": "grid", "command": command, "parameters": parameters})
    )
    assert sweeps.load(path).maximize, "of eval/f1, where nothing is said at all"


def test_every_run_is_checked_before_one_is_started(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        command=["${program}", "${args}"],
        parameters={"head": {"values": ["v1", "v9"]}, "lr": {"values": [1e-5, -1, 1e-5]}},
    )
    with pytest.raises(ConfigError) as caught:
        runs(path, "--head=v3")
    text = str(caught.value)
    assert "--head=v3: " in text
    assert "run 1: " in text
    assert "lr got -1" in text
    assert "v9" in text
    assert "runs 0 and 2 are the same run" in text


def test_a_task_asks_for_one_run_of_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run that the list has there, without making the others; none behind the last."""
    made = []
    make_run = sweeps.make_run

    def count(*args: Any) -> sweeps.Run:
        made.append(args)
        return make_run(*args)

    path = write(tmp_path, parameters={"seed": {"values": [*range(500)]}})
    listed = runs(path, "--head=v1")
    monkeypatch.setattr(sweeps, "make_run", count)
    assert main(["task", str(path), "321", "--head=v1"]) == 0
    assert capsys.readouterr().out.split("\0")[:-1] == [str(listed[321].folder), *listed[321].flags]
    assert len(made) == 1
    for index in (500, -1):
        with pytest.raises(ConfigError, match=f"there is no run {index}"):
            sweeps.run_at(sweeps.load(path), index, [])
    with pytest.raises(ConfigError, match="varies it from run to run"):
        sweeps.run_at(sweeps.load(path), 0, ["--seed=3"])


@pytest.mark.parametrize("rate", ["-5", "0"])
def test_a_rate_that_is_none(capsys: pytest.CaptureFixture[str], rate: str) -> None:
    assert main(["plan", str(SWEEPS[0]), f"--rate={rate}"]) == 2
    assert "allowed is more than 0" in capsys.readouterr().err


def test_no_more_runs_than_the_cap(tmp_path: Path) -> None:
    """As W&B's server does."""
    path = write(tmp_path, run_cap=2, parameters={"seed": {"values": [*range(5)]}})
    assert [run.values["seed"] for run in runs(path)] == [0, 1]
    assert sweeps.run_at(sweeps.load(path), 1, []).values == {"seed": 1}
    with pytest.raises(ConfigError, match="there is no run 2"):
        sweeps.run_at(sweeps.load(path), 2, [])


@pytest.mark.parametrize(
    "content",
    [
        {"program": 3},
        {"program": None},
        {"run_cap": "ten"},
        {"run_cap": 0},
        {"early_terminate": "hyperband"},
        {"metric": {"name": 3}},
        {"parameters": {"lr": {"value": 1e-5, "values": [1e-5]}}},
        {"parameters": {"wandb": {"parameters": "abc"}}},
        {"parameters": {"wandb": {"parameters": 3}}},
        {"parameters": {"seed": {"distribution": "int_uniform", "min": 1, "max": 2.5}}},
    ],
)
def test_what_wandb_refuses_we_refuse(tmp_path: Path, content: dict[str, Any]) -> None:
    path = write(tmp_path, **({"parameters": {"seed": {"value": 1}}} | content))
    with pytest.raises(ConfigError) as caught:
        sweeps.load(path)
    assert len(caught.value.problems) == 1


def test_a_configuration_for_all_runs(tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text("epochs: 7\n")
    path = write(tmp_path, parameters={"seed": {"values": [0, 1]}})
    extra, others = split_flags(["--config", str(config), "--head=v1"])
    assert not others
    assert {run.config.epochs for run in runs(path, *extra)} == {7}


def test_runs_of_one_sweep_are_in_one_folder(tmp_path: Path) -> None:
    """Logs, the table and what SLURM's tasks read lie beside the run folders."""
    files = [tmp_path / f"{name}.yaml" for name in "ab"]
    for seed, file in enumerate(files):
        file.write_text(f"output_dir: {tmp_path / file.stem}\nseed: {seed}\n")
    path = write(tmp_path, parameters={"config": {"values": [str(file) for file in files]}})
    with pytest.raises(ConfigError) as caught:
        runs(path)
    [problem] = caught.value.problems
    assert f"{tmp_path / 'a'}, {tmp_path / 'b'}" in problem
    assert "--output_dir" in problem
    found = runs(path, f"--output_dir={tmp_path / 'c'}")
    assert {run.folder.parent for run in found} == {tmp_path / "c"}


def test_what_a_grid_cannot_list(tmp_path: Path) -> None:
    uniform = {"lr": {"min": 0.1, "max": 0.2}}
    with pytest.raises(ConfigError, match="a grid needs value or values"):
        runs(write(tmp_path, command=["${program}", "${args}"], parameters=uniform))
    with pytest.raises(ConfigError, match="has no list of runs"):
        runs(
            write(tmp_path, method="random", command=["${program}", "${args}"], parameters=uniform)
        )
    many = {name: {"values": [*range(100)]} for name in ("seed", "split_seed", "max_skipped")}
    with pytest.raises(ConfigError, match="1000000 runs are more than"):
        runs(write(tmp_path, command=["${program}", "${args}"], parameters=many))


@pytest.mark.parametrize("text", ["", "- a\n", "a: [", "\x00", "method: grid\nmethod: grid\n"])
def test_files_that_are_no_sweeps(tmp_path: Path, text: str) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="sweep file"):
        sweeps.load(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        sweeps.load(tmp_path / "absent.yaml")


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_shipped_sweeps(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From another working directory too, with the same ids."""
    monkeypatch.chdir(ROOT)
    here = [run.run_id for run in runs(path)]
    monkeypatch.chdir(tmp_path)
    assert [run.run_id for run in runs(path)] == here
    assert len(here) == {"heads": 36, "smoke": 4, "study": 4}[path.stem]


def test_the_study_is_the_study(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = [run.config for run in runs(ROOT / "configs" / "sweeps" / "study.yaml")]
    assert [(c.experiment, c.head, c.batch_size, c.lr, c.epochs) for c in found] == [
        ("Combo1", "v2", 32, 2e-5, 5),
        ("Combo2", "v2", 16, 2e-5, 5),
        ("LR Test", "v2", 16, 1e-5, 5),
        ("V3 Test", "v3", 16, 2e-5, 5),
    ]


def test_plan_starts_nothing_and_needs_no_torch(tmp_path: Path) -> None:
    code = "import sys; sys.modules['torch'] = None; from toolkit.__main__ import main; sys.exit(main())"
    done = run_python(
        *("-c", code, "sweep", "plan", ROOT / "configs" / "sweeps" / "smoke.yaml"),
        *("--rate", "100", f"--cache_dir={tmp_path}"),
    )
    assert done.returncode == 0, done.stderr
    assert "25 steps  4 s (stated, scoring not counted)" in done.stdout
    assert "4 runs, 16 s in all" in done.stdout
    assert not list(tmp_path.iterdir())


def test_scoring_is_part_of_what_a_sweep_costs(tmp_path: Path) -> None:
    """Amazon Polarity's 400,000 test rows are more than many a run trains on."""
    flags = ["--dataset=amazon_polarity", "--head=v1", f"--cache_dir={tmp_path}", "--epochs=2"]
    few = ["--train_rows=1000", "--validation_rows=300", "--batch_size=10"]
    cases = {
        (*few,): (200, 2_000 + 2 * 100 + 400_000 / 3),
        (*few, "--test_rows=600"): (200, 2_000 + 2 * 100 + 200),
        (*few, "--test_rows=600", "--eval_every=30"): (200, 2_000 + 8 * 100 + 200),
        (): (448_750, 2 * 3_590_000 + 2 * 10_000 / 3 + 400_000 / 3),
    }
    for more, (steps, rows) in cases.items():
        config = parse([*flags, *(more or ["--batch_size=16"])])
        [cost] = costs([sweeps.Run(0, {}, [], [], config)], stated_rate=10.0)
        assert cost.steps == steps
        assert cost.seconds == pytest.approx(rows / 10)


@pytest.mark.parametrize("every", [None, 3, 5, 7, 100])
@pytest.mark.parametrize(
    ("rows", "batch", "epochs"), [(20, 4, 3), (21, 4, 2.5), (7, 16, 5), (9, 2, 0.5)]
)
def test_evaluations_are_those_of_the_loop(
    rows: int, batch: int, epochs: float, every: int | None
) -> None:
    stream = Stream(num_rows=rows, batch_size=batch, epochs=epochs, seed=0)
    trainer: Any = SimpleNamespace(stream=stream, spec=SimpleNamespace(eval_every=every))
    due = [Trainer.evaluation_is_due(trainer, done + 1) for done in range(stream.num_steps)]
    assert evaluations(stream, every) == sum(due)


def test_flags_of_a_run_and_others() -> None:
    unknown = [
        "--lr",
        "1e-5",
        "--time=5",
        "--overwrite",
        "--account",
        "x",
        "--wandb.group=g",
        "-p",
        "a",
    ]
    ours, rest = split_flags(unknown)
    assert ours == ["--lr=1e-5", "--overwrite", "--wandb.group=g"]
    assert rest == ["--time=5", "--account", "x", "-p", "a"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 0, "sweep plan"),
        (["paln"], 2, "no sweep command 'paln'"),
        (["plan", "absent.yaml"], 2, "cannot be read"),
        (["plan", str(SWEEPS[0]), "--lrr=3"], 2, "--lrr=3 is unknown"),
        (["run", str(SWEEPS[0]), "--jobs=0"], 2, "--jobs got 0"),
        (["run", str(SWEEPS[0]), "--jobs=0", "--overwrite"], 2, "to train one run again: "),
        (["submit", str(SWEEPS[0]), "--overwrite", "true"], 2, "to train one run again: "),
        (["results", "/proc/self/fd"], 1, "no completed run"),
    ],
)
def test_slips(
    arguments: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == code
    shown = capsys.readouterr()
    assert said in shown.out + shown.err
