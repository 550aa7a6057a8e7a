"""The templates on a real SLURM: arrays, two nodes, preemption, walltime, lost nodes."""

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.faults.harness import result_of
from tests.programs import ROOT, run_python
from tests.slurm.cluster import Cluster, why_not

pytestmark = pytest.mark.skipif(
    why_not() is not None and not os.environ.get("TOOLKIT_NEEDS_SLURM"), reason=str(why_not())
)
GRID = {"head": ["v1", "v2"], "seed": [0, 1]}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    assert why_not() is None, why_not()
    with Cluster(tmp_path_factory.mktemp("slurm")) as started:
        yield started


class Bench:
    """A folder to submit from, with a sweep of tiny runs."""

    def __init__(self, folder: Path, cluster: Cluster, encoder: Path, data: Path) -> None:
        self.folder = folder
        self.cluster = cluster
        self.runs = folder / "runs"
        self.file = folder / "tiny.yaml"
        self.fixed: dict[str, Any] = {
            "encoder": str(encoder),
            "dataset": str(data),
            "cache_dir": str(folder / "cache"),
            "track": "none",
            "max_length": 32,
            "batch_size": 16,
            "lr": 0.003,
            "log_every": 1,
            "cpu_threads": 1,
            "epochs": 3,
        }
        self.flags = [f"--{name}={value}" for name, value in self.fixed.items()]
        self.write(self.runs)

    def write(self, output_dir: Path) -> None:
        """Write the sweep file; its runs go to a folder."""
        fixed = self.fixed | {"output_dir": str(output_dir)}
        parameters: dict[str, Any] = {name: {"value": value} for name, value in fixed.items()}
        parameters |= {name: {"values": values} for name, values in GRID.items()}
        command = ["accelerate", "launch", "--config_file", str(ROOT / "launch" / "cpu.yaml")]
        sweep = {
            "program": str(ROOT / "toolkit" / "train.py"),
            "method": "grid",
            "command": [*command, "${program}", "${args}"],
            "parameters": parameters,
        }
        self.file.write_text(yaml.safe_dump(sweep, sort_keys=False))

    def sweep(self, *arguments: str, **environment: str) -> str:
        """Run `python -m toolkit sweep ...`; return what it prints."""
        path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        settings = self.cluster.environment | SETTINGS | path | environment
        done = run_python(
            "-m", "toolkit", "sweep", arguments[0], self.file, *arguments[1:], **settings
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def train(self, *options: str, flags: list[str], **environment: str) -> str:
        """Submit one run; return the job's id."""
        command = ["sbatch", "--parsable", f"--output={self.folder}/%x_%j.out", *options]
        script = str(ROOT / "slurm" / "train.sbatch")
        return self.cluster.ask(
            *command,
            script,
            *self.flags,
            f"--output_dir={self.runs}",
            *flags,
            **(SETTINGS | environment),
        ).strip()

    def logs(self) -> str:
        """Return all that jobs have printed."""
        files = [*self.folder.glob("*.out"), *self.runs.glob("logs/*.out")]
        return "\n".join(f"--- {file.name}\n{file.read_text()}" for file in files)

    def wait(self, job: str, seconds: float = 120) -> None:
        """Wait until a job has left the queue."""
        ended = lambda: not self.states(job)  # noqa: E731
        try:
            self.cluster.wait_for(ended, seconds)
        except AssertionError:
            pytest.fail(f"{self.cluster.ask('squeue')}\n{self.logs()}")

    def states(self, job: str) -> list[str]:
        """Return the states of a job's tasks that are still in the queue."""
        found = self.cluster.ask(
            "squeue", "-h", "--array", f"--jobs={job}", "-o", "%T", check=False
        )
        return [state for state in found.split() if state != "COMPLETED"]

    def run_folder(self, name: str) -> Path:
        return self.runs / name

    def status(self, name: str) -> dict[str, Any]:
        return json.loads((self.run_folder(name) / "status.json").read_text())

    def processes(self) -> list[int]:
        """Return the processes of this bench's jobs."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            words = " ".join(process.info["cmdline"] or [])
            if str(self.folder) in words or "slurmstepd" in words:
                found.append(process.pid)
        return found

    def has_restarted(self) -> bool:
        """Tell whether a second start has taken the run over."""
        return "Going on after step" in self.logs()

    def has_logged(self, name: str, step: int) -> bool:
        path = self.run_folder(name) / "metrics.jsonl"
        return path.exists() and f'"step": {step},' in path.read_text()


SETTINGS = {
    "VENV": sys.prefix,
    "TOOLKIT_ROOT": str(ROOT),
    "ACCELERATE_USE_CPU": "true",
    "WANDB_MODE": "offline",
}
LONG = ["--epochs=80", "--save_minutes=0.02", "--head=v3", "--dropout=0.2"]


@pytest.fixture
def bench(tmp_path: Path, cluster: Cluster, tiny_encoder: Path, tiny_data: Path) -> Bench:
    return Bench(tmp_path, cluster, tiny_encoder, tiny_data)


def test_an_array_gives_what_the_local_runner_gives(bench: Bench) -> None:
    """Submitted, looked at in the middle, and held against `sweep run` in another folder.

    Three tasks at a time on two nodes: two of them share one.
    """
    said = bench.sweep("submit", "--throttle", "3", "--cpus-per-task=1", "--time=5")
    assert "Submitted 4 of 4 runs as array" in said
    job = said.split("array ")[1].split()[0]
    assert "Nothing is missing" in bench.sweep("submit")
    bench.cluster.wait_for(lambda: "RUNNING" in bench.states(job))
    assert "queued" in bench.sweep("status") or "running" in bench.sweep("status")
    bench.wait(job)
    assert "4 completed" in bench.sweep("status"), bench.logs()
    assert "Best run by F1" in bench.sweep("results")
    bench.write(bench.folder / "local")
    assert bench.sweep("run", "--jobs", "2").count("completed after") == 4
    results = [_test_metrics(folder) for folder in (bench.runs, bench.folder / "local")]
    assert results[0] == results[1]
    assert len(results[0]) == 4


def _test_metrics(folder: Path) -> dict[str, Any]:
    """Return {run id: test metrics} of the runs in a folder."""
    summaries = [json.loads(path.read_text()) for path in folder.glob("*/summary.json")]
    return {summary["run_id"]: summary["test"] for summary in summaries}


def test_two_nodes(bench: Bench) -> None:
    job = bench.train("--nodes=2", "--cpus-per-task=1", "--time=5", flags=["--run_id=two"])
    bench.wait(job)
    assert bench.status("two")["status"] == "completed", bench.logs()
    facts = json.loads((bench.run_folder("two") / "run.json").read_text())
    assert facts["world_size"] == 2


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, cluster: Cluster, tiny_encoder: Path, tiny_data: Path
) -> dict[str, Any]:
    """What a long run ends with when nothing happens to it."""
    bench = Bench(tmp_path_factory.mktemp("whole"), cluster, tiny_encoder, tiny_data)
    bench.wait(bench.train("--cpus-per-task=1", flags=[*LONG, "--run_id=long"]))
    assert bench.status("long")["status"] == "completed", bench.logs()
    return result_of(bench.run_folder("long"))


def hurt_warning(bench: Bench, job: str) -> None:
    bench.cluster.ask("scancel", "--batch", "--signal=USR2", job)


def hurt_preemption(bench: Bench, job: str) -> None:
    """A job of the higher partition takes both nodes for a moment."""
    options = ("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null")
    bench.cluster.ask("sbatch", *options, "--wrap=sleep 3")


def hurt_requeue(bench: Bench, job: str) -> None:
    bench.cluster.ask("scontrol", "requeue", job)


def hurt_node(bench: Bench, job: str) -> None:
    """The node dies with all that runs on it; SLURM notices after SlurmdTimeout."""
    node = bench.cluster.ask("squeue", "-h", f"--jobs={job}", "-o", "%N").strip()
    bench.cluster.kill_node(node, bench.processes())
    bench.cluster.wait_for(lambda: bench.has_restarted(), 120)
    bench.cluster.start_node(node)


@pytest.mark.parametrize("hurt", [hurt_warning, hurt_preemption, hurt_requeue, hurt_node])
def test_interrupted_and_goes_on(bench: Bench, uninterrupted: dict[str, Any], hurt: Any) -> None:
    job = bench.train("--cpus-per-task=1", "--time=10", flags=[*LONG, "--run_id=long"])
    bench.cluster.wait_for(lambda: bench.has_logged("long", 20))
    hurt(bench, job)
    bench.wait(job, 240)
    assert bench.status("long")["status"] == "completed", bench.logs()
    assert "Going on after step" in bench.logs()
    assert result_of(bench.run_folder("long")) == uninterrupted


def test_walltime(bench: Bench, uninterrupted: dict[str, Any]) -> None:
    """SLURM looks every 30 s whose time is up; saving after every step makes the run last longer."""
    options = ("--cpus-per-task=1", "--time=1", "--signal=B:USR2@50")
    job = bench.train(*options, flags=[*LONG, "--save_minutes=0", "--run_id=long"])
    bench.wait(job, 300)
    assert bench.status("long")["status"] == "completed", bench.logs()
    assert "queued again (1 of at most 20 times)" in bench.logs()
    assert result_of(bench.run_folder("long")) == uninterrupted


def test_requeues_are_capped_and_cancelled_runs_stay_so(bench: Bench) -> None:
    job = bench.train("--cpus-per-task=1", flags=[*LONG, "--run_id=long"], MAX_REQUEUES="0")
    bench.cluster.wait_for(lambda: bench.has_logged("long", 10))
    hurt_warning(bench, job)
    bench.wait(job)
    assert bench.status("long")["status"] == "preempted"
    job = bench.train("--cpus-per-task=1", flags=[*LONG, "--run_id=long"])
    bench.cluster.wait_for(lambda: bench.status("long")["status"] == "running")
    time.sleep(3)
    bench.cluster.ask("scancel", job)
    bench.wait(job)
    assert bench.status("long")["status"] == "preempted", bench.logs()


def test_failed_tasks_are_retried_when_told(bench: Bench) -> None:
    """All four crash once; `submit --retry_failed` starts them again, and each goes on."""
    bench.sweep("submit", "--cpus-per-task=1", TOOLKIT_FAULT="raise@optimizer:0:7")
    bench.cluster.wait_for(lambda: bench.sweep("status").count("crashed") == 4, 120)
    said = bench.sweep("submit", "--retry_failed", "--cpus-per-task=1")
    assert "Submitted 4 of 4" in said
    bench.wait(said.split("array ")[1].split()[0])
    assert "4 completed" in bench.sweep("status"), bench.logs()
