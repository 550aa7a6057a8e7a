"""Start a small program of ours under a launch config, and hear what its main process says.

Such a program ends with `run(main)`, and its main process calls `answer` once.
"""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

import psutil

from toolkit.console import flush, say

PROGRAMS = Path(__file__).resolve().parent
LAUNCH_FOLDER = PROGRAMS.parent / "launch"
ANSWER = "answer of the ranks: "
"""What stands before the answer, one line of JSON among what libraries print."""


class RanksError(Exception):
    """The ranks did not start, failed or said nothing in time; says why in a line."""


def ask(
    program: Path, launch: Path, num_processes: int | None, *flags: str, seconds: float
) -> dict[str, Any]:
    """Run a program on all ranks and return its answer; none of its processes is left behind.

    Args:
        program: such a program.
        launch: launch config.
        num_processes: instead of the launch config's.
        flags: the program's.
        seconds: how long to wait.

    Raises:
        RanksError: when there is no answer.
    """
    # `accelerate-launch`: `accelerate launch` imports all other commands first, 0.8 s (1.15)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(launch)]
    command += ["--num_processes", str(num_processes)] if num_processes else []
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*command, str(program), *flags], start_new_session=True, **pipes)
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired as error:
        hint = "check main_process_ip, ports, firewall, num_processes, or is it only slow?"
        raise RanksError(f"no answer in {seconds:.0f} s: {hint}") from error
    finally:
        _end(process)
    answers = [line for line in output.splitlines() if line.startswith(ANSWER)]
    if process.returncode or not answers:
        raise RanksError(_reason(errors))
    try:
        return json.loads(answers[-1].removeprefix(ANSWER))
    except ValueError as error:
        raise RanksError(f"cannot read the answer {answers[-1]!r}") from error


def _end(process: "subprocess.Popen[str]") -> None:
    """Kill what still runs: the launcher, and its ranks, which have sessions of their own."""
    if process.poll() is None:
        launcher = psutil.Process(process.pid)
        for one in [*launcher.children(recursive=True), launcher]:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()


def _reason(errors: str) -> str:
    """Return what says most: the first error that is not the launcher's own, with its list."""
    lines = [line.split("]: ", 1)[-1].strip() for line in errors.splitlines()]
    for number, line in enumerate(lines):
        if "Error: " in line and "ChildFailed" not in line:
            problems = takewhile(lambda line: line.startswith("- "), lines[number + 1 :])
            return " ".join([line, *problems])
    if "SIGKILL" in errors:
        return "a rank was killed: is there enough memory?"
    return (lines or ["no output"])[0]


def answer(values: dict[str, Any]) -> None:
    """Say what `ask` returns."""
    say(ANSWER + json.dumps(values))


def run(main: Callable[[], None]) -> None:
    """Run such a program; one that fails leaves at once (its process group may hang: `Runtime.end`)."""
    try:
        main()
    except Exception:
        traceback.print_exc()
        flush()
        os._exit(1)
