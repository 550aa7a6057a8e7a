"""Start a small program of ours under a launch config, and hear what its main process says."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

LAUNCH_FOLDER = Path(__file__).resolve().parent.parent / "launch"
ANSWER = "answer of the ranks: "
"""What stands before the one line of JSON that such a program prints."""


class RanksError(Exception):
    """The ranks did not start, did not meet in time, or failed; says why in a line."""


def ask(
    program: str, launch: Path, num_processes: int | None, *flags: str, seconds: float
) -> dict[str, Any]:
    """Run a program of this folder on all ranks and return its answer.

    Args:
        program: file name in this folder.
        launch: launch config.
        num_processes: instead of the launch config's.
        flags: the program's.
        seconds: how long to wait.

    Raises:
        RanksError: when there is no answer.
    """
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += ["--config_file", str(launch)]
    command += ["--num_processes", str(num_processes)] if num_processes else []
    command += [str(Path(__file__).with_name(program)), *flags]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, start_new_session=True, **pipes)
    try:
        output, errors = process.communicate(timeout=seconds)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)  # the ranks too
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            text = f"the ranks did not meet in {seconds:.0f} s"
            hint = "check main_process_ip, ports, firewall, num_processes"
            raise RanksError(f"{text}: {hint}") from error
        raise
    answers = [line for line in output.splitlines() if line.startswith(ANSWER)]
    if process.returncode or not answers:
        raise RanksError(_last_error(errors))
    return json.loads(answers[-1].removeprefix(ANSWER))


def _last_error(text: str) -> str:
    """Return the line that says most: the first error that is not the launcher's own."""
    lines = [line.split("]: ", 1)[-1].strip() for line in text.splitlines()]
    errors = [line for line in lines if "Error: " in line and "ChildFailed" not in line]
    return (errors or lines or ["no output"])[0]
