"""Start programs as a user does: this interpreter, and the real launcher."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TRAIN = ROOT / "toolkit" / "train.py"


def run_python(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run this interpreter and capture what it prints."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | environment,
        cwd="/",
        timeout=240,
    )


def launcher(processes: int, config: str | None = None) -> list[str]:
    """Return the command line of the real `accelerate launch`, up to the script."""
    name = config or ("cpu" if processes == 1 else "cpu2")
    file = ROOT / "launch" / f"{name}.yaml"
    command = ["-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(file)]
    return [*command, "--num_processes", str(processes), "--num_cpu_threads_per_process", "1"]


def launch(
    processes: int, script: Path, *arguments: str | Path, config: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a script under the real `accelerate launch`, from another working directory."""
    command = [*launcher(processes, config), str(script)]
    return run_python(*command, *arguments, ACCELERATE_USE_CPU="true")
