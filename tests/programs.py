"""Start programs as a user does: this interpreter, and the real launcher."""

import os
import subprocess
import sys
import tempfile
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


def run_for_peak(*arguments: str | Path) -> tuple[int, str]:
    """Run this interpreter; return the peak memory in bytes, and what it printed.

    The peak is that of the largest of the process and those below it.

    Raises:
        RuntimeError: when it fails.
    """
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen([sys.executable, *map(str, arguments)], stdout=out)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        text = out.read()
    if process.returncode:
        raise RuntimeError(f"{' '.join(map(str, arguments))} failed:\n{text}")
    return usage.ru_maxrss * 1024, text


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
