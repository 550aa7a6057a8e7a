"""The real W&B client and the real agent against a small server, which then misbehaves."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.programs import ROOT, TRAIN, run_python
from tests.wandb_server import ENTITY, PROJECT, Server, serving
from toolkit.config import parse

BIN = Path(sys.executable).parent
START_SECONDS = 25
"""What a start takes by itself, beside other tests: importing torch most of all."""


class Bench:
    """A server, a sweep of tiny runs on two processes each, and agents."""

    def __init__(self, folder: Path, server: Server, url: str, encoder: Path, data: Path) -> None:
        self.folder = folder
        self.server = server
        self.runs = folder / "runs"
        self.flags = [
            f"--encoder={encoder}",
            f"--dataset={data}",
            f"--cache_dir={folder / 'cache'}",
            f"--output_dir={self.runs}",
            *("--max_length=32", "--batch_size=16", "--log_every=1", "--cpu_threads=1"),
        ]
        self.environment = {
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "WANDB_MODE": "online",
            "WANDB_BASE_URL": url,
            "WANDB_API_KEY": "x" * 40,
            "WANDB_DIR": str(folder),
            "ACCELERATE_USE_CPU": "true",
        }

    def sweep(self, *cells: dict[str, Any]) -> str:
        """Register a sweep; return what the agent is called with."""
        launch = ["accelerate", "launch", "--config_file", str(ROOT / "launch" / "cpu2.yaml")]
        command = [*launch, "${program}", *self.flags, "${args}"]
        content = {"program": str(TRAIN), "method": "grid", "command": command}
        name = self.server.add_sweep(content | {"parameters": {}}, list(cells))
        return f"{ENTITY}/{PROJECT}/{name}"

    def agent(self, sweep: str, count: int = 1) -> "subprocess.Popen[bytes]":
        """Start the real agent."""
        with (self.folder / "agent.log").open("ab") as log:
            return subprocess.Popen(
                [str(BIN / "wandb"), "agent", "--count", str(count), sweep],
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env=os.environ | self.environment,
            )

    def run_folder(self, **values: Any) -> Path:
        """Return where a run's folder has to be, by the plan."""
        return parse([*self.flags, *(f"--{k}={v}" for k, v in values.items())]).folder

    def said(self) -> str:
        return (self.folder / "agent.log").read_text()


def wait_for(condition: Callable[[], bool], seconds: float, said: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, said()
        time.sleep(0.1)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def logged(folder: Path, step: int) -> bool:
    path = folder / "metrics.jsonl"
    return path.exists() and f'"step": {step},' in path.read_text()


@pytest.fixture
def bench(tmp_path: Path, tiny_encoder: Path, tiny_data: Path) -> Iterator[Bench]:
    with serving() as (server, url):
        yield Bench(tmp_path, server, url, tiny_encoder, tiny_data)


def test_an_agent_runs_a_sweep(bench: Bench) -> None:
    """Two runs of two processes; hyper-parameters on every rank; W&B on the main process only."""
    cells = [{"head": "v1", "lr": 0.003, "seed": 1}, {"head": "v3", "lr": 0.001, "seed": 1}]
    assert bench.agent(bench.sweep(*cells), count=2).wait(180) == 0, bench.said()
    assert [run.state for run in bench.server.runs.values()] == ["finished"] * 2, bench.said()
    for run, cell in zip(bench.server.runs.values(), cells, strict=True):
        folder = bench.run_folder(**cell)
        assert json.loads((folder / "status.json").read_text())["status"] == "completed"
        assert json.loads((folder / "run.json").read_text())["world_size"] == 2
        steps = [row["global_step"] for row in run.rows if "train/loss" in row]
        assert steps == [row["step"] for row in rows(folder) if row["kind"] == "train"]
        assert any("eval/f1" in row for row in run.rows), "what early termination watches"
        assert any("test/f1" in row for row in run.rows)
    assert len(list(bench.runs.glob("*/summary.json"))) == 2
    before = {path: path.stat().st_mtime_ns for path in bench.runs.glob("*/*.json*")}
    assert bench.agent(bench.sweep(cells[0])).wait(120) == 0
    first, _, again = bench.server.runs.values()
    assert again.state == "finished", "the same sweep made anew: not trained again, but mirrored"
    assert _figures(again.rows) == _figures(first.rows)
    assert {path: path.stat().st_mtime_ns for path in bench.runs.glob("*/*.json*")} == before


def test_a_run_that_slurm_stops_before_it_begins_is_given_back(bench: Bench) -> None:
    """While data are prepared, W&B has not heard of it; the next agent gets it."""
    sweep = bench.sweep({"head": "v1"})
    stop = bench.folder / "stop"
    stop.touch()
    bench.environment["TOOLKIT_STOP_FILE"] = str(stop)
    assert bench.agent(sweep).wait(120) == 0, bench.said()
    [run] = bench.server.runs.values()
    assert (run.state, run.starts) == ("preempted", 1), bench.said()
    assert not stop.exists()
    assert bench.agent(sweep).wait(120) == 0, bench.said()
    assert (run.state, run.starts) == ("finished", 2), bench.said()


def _figures(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith("_")} for row in found]


def test_offline_runs_are_sent_later(bench: Bench) -> None:
    """`sweep sync`, twice: the second finds nothing new; without a server it says so and keeps all."""
    offline = bench.environment | {"WANDB_MODE": "offline"}
    done = run_python(TRAIN, *bench.flags, "--epochs=2", "--run_id=x", **offline)
    assert done.returncode == 0, done.stderr
    sync = ("-m", "toolkit", "sweep", "sync", bench.runs)
    online = {name: text for name, text in bench.environment.items() if name != "WANDB_MODE"}
    online |= {"PYTHONPATH": str(ROOT)}
    assert not bench.server.runs
    done = run_python(*sync, **(online | {"WANDB_BASE_URL": "http://127.0.0.1:9"}))
    assert done.returncode == 2
    assert "W&B: 127.0.0.1 does not answer (Connection refused)" in done.stderr
    for _ in range(2):
        done = run_python(*sync, **online)
        assert done.returncode == 0, done.stdout + done.stderr
    [run] = bench.server.runs.values()
    assert run.name == "x"
    assert run.starts == 1
    kept = rows(bench.runs / "x")
    sent = [row["global_step"] for row in run.rows if "train/loss" in row]
    assert sent == [row["step"] for row in kept if row["kind"] == "train"]
    assert any("test/f1" in row for row in run.rows)
    (bench.folder / "empty").mkdir()
    done = run_python("-m", "toolkit", "sweep", "sync", bench.folder / "empty", **online)
    assert "No offline runs there" in done.stdout


def test_a_run_that_is_stopped_early_is_not_started_again(bench: Bench) -> None:
    cell = {"head": "v2", "lr": 0.003, "epochs": 2000}
    process = bench.agent(bench.sweep(cell), count=2)
    folder = bench.run_folder(**cell)
    wait_for(lambda: logged(folder, 20), 60, bench.said)
    [run] = bench.server.runs.values()
    run.is_to_stop = True
    wait_for(lambda: run.exit_code is not None, 60, bench.said)
    assert process.wait(60) == 0, bench.said()
    assert run.state == "failed"
    assert run.starts > 0
    assert json.loads((folder / "status.json").read_text())["status"] == "stopped"


def test_a_preempted_run_goes_on_with_another_agent(bench: Bench) -> None:
    """The same W&B run, the same folder, and the flags that a resumed run gets besides."""
    cell = {"head": "v2", "lr": 0.003, "epochs": 40}
    sweep = bench.sweep(cell)
    process = bench.agent(sweep)
    folder = bench.run_folder(**cell)
    wait_for(lambda: logged(folder, 20), 60, bench.said)
    (folder / "STOP").touch()
    assert process.wait(60) is not None
    [run] = bench.server.runs.values()
    assert run.state == "preempted", bench.said()
    assert json.loads((folder / "status.json").read_text())["status"] == "preempted"
    assert bench.agent(sweep).wait(120) == 0, bench.said()
    assert run.state == "finished", bench.said()
    assert "Going on after step" in bench.said()
    steps = [row["step"] for row in rows(folder) if row["kind"] == "train"]
    assert steps == [*range(1, len(steps) + 1)]


@pytest.mark.parametrize("misbehaviour", ["refuse", "fail", "hang", "slow", "vanish"])
def test_a_server_that_misbehaves_costs_no_run(bench: Bench, misbehaviour: str) -> None:
    """Start-up waits for at most 15 s, the end for at most 30 s, and no row is lost."""
    began = time.time()
    if misbehaviour == "refuse":
        bench.environment["WANDB_BASE_URL"] = "http://127.0.0.1:9"
    elif misbehaviour != "vanish":
        bench.server.misbehaviour = misbehaviour
    flags = [*bench.flags, "--epochs=12", "--run_id=x"]
    script = "import sys; from toolkit.train import main; sys.exit(main(sys.argv[1:]))"
    if misbehaviour == "vanish":
        watch = lambda: logged(bench.runs / "x", 30)  # noqa: E731
        with subprocess.Popen(
            [sys.executable, "-c", script, *flags],
            cwd=ROOT,
            env=os.environ | bench.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) as process:
            wait_for(watch, 60, lambda: "")
            bench.server.misbehaviour = "hang"
            out, _ = process.communicate(timeout=120)
            code, said = process.returncode, out.decode()
    else:
        done = run_python("-c", script, *flags, PYTHONPATH=str(ROOT), **bench.environment)
        code, said = done.returncode, done.stdout + done.stderr
    ended = time.time()
    assert code == 0, said
    kept = rows(bench.runs / "x")
    assert kept[0]["time"] - began < 15 + START_SECONDS, said
    assert ended - kept[-1]["time"] < 30, (ended - kept[-1]["time"], said)
    found = [row["step"] for row in kept if row["kind"] == "train"]
    assert found == [*range(1, len(found) + 1)]
    assert len(found) == 81
