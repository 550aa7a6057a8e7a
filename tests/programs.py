"""Start programs as a user does: this interpreter, and the real launcher."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TRAIN = ROOT / "toolkit" / "train.py"


def run_python(
    *arguments: str | Path, seconds: float = 240, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run this interpreter and capture what it prints."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | environment,
        cwd="/",
        timeout=seconds,
    )


_WITH_PEAK = """
import ctypes, resource, signal, subprocess, sys
def die_with_parent():
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
die_with_parent()
code = subprocess.call(sys.argv[2:], preexec_fn=die_with_parent)
with open(sys.argv[1], "w") as file:
    file.write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
sys.exit(code)
"""
"""A small process in between: a child inherits the peak of the process that starts it."""


def run_for_peak(*arguments: str | Path) -> tuple[int, str]:
    """Run this interpreter; return the peak memory in bytes, and what it printed.

    The peak is that of the largest of the process and those below it.

    Raises:
        RuntimeError: when it fails.
    """
    with tempfile.NamedTemporaryFile("r") as peak:
        command = [sys.executable, "-c", _WITH_PEAK, peak.name, sys.executable]
        done = subprocess.run([*command, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(map(str, arguments))} failed:\n{done.stdout}")
        return int(peak.read()) * 1024, done.stdout


def launcher(processes: int, config: str | None = None) -> list[str]:
    """Return the command line of the real `accelerate-launch`, up to the script.

    It is `accelerate launch` without the imports of all other commands, 0.8 s (accelerate 1.15).
    """
    name = config or ("cpu" if processes == 1 else "cpu2")
    file = ROOT / "launch" / f"{name}.yaml"
    command = ["-m", "accelerate.commands.launch", "--config_file", str(file)]
    return [*command, "--num_processes", str(processes), "--num_cpu_threads_per_process", "1"]


def launch(
    processes: int, script: Path, *arguments: str | Path, config: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a script under the real `accelerate launch`, from another working directory."""
    command = [*launcher(processes, config), str(script)]
    return run_python(*command, *arguments, ACCELERATE_USE_CPU="true")
