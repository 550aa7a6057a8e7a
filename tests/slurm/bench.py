"""A folder to submit tiny runs from, and what becomes of them."""

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.programs import ROOT, run_python
from tests.slurm.cluster import Cluster

GRID = {"head": ["v1", "v2"], "seed": [0, 1]}
SETTINGS = {
    "VENV": sys.prefix,
    "TOOLKIT_ROOT": str(ROOT),
    "ACCELERATE_USE_CPU": "true",
    "WANDB_MODE": "offline",
}


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

    def write(self, output_dir: Path, grid: dict[str, list[Any]] = GRID) -> None:
        """Write the sweep file; its runs go to a folder."""
        fixed = self.fixed | {"output_dir": str(output_dir)}
        parameters: dict[str, Any] = {name: {"value": value} for name, value in fixed.items()}
        parameters |= {name: {"values": values} for name, values in grid.items()}
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

    def by_hand(self, *options: str, **environment: str) -> str:
        """Submit the sweep's tasks with sbatch itself; return the job's id."""
        return self.sbatch("sweep", str(self.file), *options, **environment)

    def agents(self, sweep: str, *options: str, **environment: str) -> str:
        """Submit W&B agents; return the job's id."""
        return self.sbatch("agent", sweep, *options, **environment)

    def sbatch(self, template: str, argument: str, *options: str, **environment: str) -> str:
        """Submit a template that makes an array; return the job's id."""
        command = ["sbatch", "--parsable", f"--output={self.folder}/%x_%A_%a.out", *options]
        script = str(ROOT / "slurm" / f"{template}.sbatch")
        settings = SETTINGS | environment
        return self.cluster.ask(*command, script, argument, **settings).strip()

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
        found = self.cluster.ask("squeue", "-h", "--array", f"--jobs={job}", "-o", "%T")
        return [state for state in found.split() if state != "COMPLETED"]

    def run_folder(self, name: str) -> Path:
        return self.runs / name

    def status(self, name: str) -> dict[str, Any]:
        return json.loads((self.run_folder(name) / "status.json").read_text())

    def processes(self) -> list[psutil.Process]:
        """Return the processes of this bench's jobs."""
        found = []
        for process in psutil.process_iter(["cmdline", "status"]):
            words = " ".join(process.info["cmdline"] or [])
            if str(self.folder) in words or "slurmstepd" in words:
                found.append(process)
        return found

    def let_go_on(self, job: str, asked_within: float) -> bool:
        """Continue the trainers that a fault has stopped, if the job's script has been asked to stop.

        A trainer that notes the request takes its file away, and the fault may stop it before it acts
        on it; so one that is older than SLURM takes to ask (`asked_within`, seconds) goes on, too.

        Returns:
            Whether there was one.
        """
        file = Path(tempfile.gettempdir(), f"toolkit-stop-{job}")
        stopped = [
            process
            for process in self.processes()
            if process.info["status"] == psutil.STATUS_STOPPED
            and (file.exists() or time.time() - process.create_time() > asked_within)
        ]
        for process in stopped:
            process.resume()
        return bool(stopped)

    def has_restarted(self) -> bool:
        """Tell whether a second start has taken the run over."""
        return "Going on after step" in self.logs()

    def journals(self) -> list[Path]:
        return [*self.runs.glob("*/metrics.jsonl")]

    def has_begun(self) -> bool:
        """Tell whether a run is some steps old."""
        return any('"step": 20,' in path.read_text() for path in self.journals())

    def has_logged(self, name: str, step: int) -> bool:
        path = self.run_folder(name) / "metrics.jsonl"
        return path.exists() and f'"step": {step},' in path.read_text()
