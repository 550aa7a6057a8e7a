"""The first process of a SLURM step outlives its command until the orphans have ended."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.programs import ROOT

SAVES = 'trap "" TERM; sleep 1; touch "$0"'
"""A trainer that still saves after its launcher has gone."""


def start(folder: Path, launcher: str) -> "subprocess.Popen[bytes]":
    command = [
        sys.executable,
        "-m",
        "toolkit.reaper",
        "bash",
        "-c",
        launcher,
        str(folder / "saved"),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, start_new_session=True)


@pytest.mark.parametrize("code", [0, 3])
def test_it_waits_for_orphans_and_returns_the_commands_code(tmp_path: Path, code: int) -> None:
    assert start(tmp_path, f"(setsid bash -c '{SAVES}' \"$0\" &); exit {code}").wait(20) == code
    assert (tmp_path / "saved").exists()


def test_a_signal_to_all_ends_the_launcher_only(tmp_path: Path) -> None:
    launcher = f'bash -c \'{SAVES}\' "$0" & touch "$0.begun"; sleep 60'
    process = start(tmp_path, launcher)
    while not (tmp_path / "saved.begun").exists():
        time.sleep(0.05)
    time.sleep(0.2)  # the trainer has set its trap
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(20) == 128 + signal.SIGTERM
    assert (tmp_path / "saved").exists()
