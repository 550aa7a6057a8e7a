"""A bar in a terminal, plain lines with an ETA elsewhere, silence on other ranks."""

import os
import pty
import subprocess
import sys

import pytest

from toolkit.record import progress as module
from toolkit.record.progress import TrainingProgress

FIGURES = {
    "train/loss": 0.25,
    "train/lr": 1e-5,
    "train/reviews_per_s": 20.0,
    "train/tokens_per_s": 2000.0,
    "train/padding": 0.125,
}


def test_plain_lines_with_eta(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PLAIN_SECONDS", 0.0)
    with TrainingProgress(10, enabled=True) as progress:
        progress.update(1)
        progress.update(5, FIGURES)
        progress.note("validation")
    printed = capsys.readouterr().out
    assert printed.startswith("step 5/10  at 5: loss 0.2500  lr 1.00e-05  20.0 reviews/s")
    assert "2000 tokens/s  padding 12.5%  ETA 0:00:0" in printed
    assert printed.endswith("validation\n")


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with TrainingProgress(1, enabled=False) as progress:
        progress.update(1, FIGURES)
        progress.note("validation")
    assert capsys.readouterr().out == ""


def test_a_bar_in_a_terminal() -> None:
    code = f"""
from toolkit.record.progress import TrainingProgress
with TrainingProgress(4, enabled=True) as progress:
    progress.update(4, {FIGURES!r})
    progress.note("a note")
"""
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "160"}
    with subprocess.Popen([sys.executable, "-c", code], stdout=theirs, env=environment) as process:
        assert process.wait(timeout=60) == 0
        os.close(theirs)
        shown = os.read(ours, 100_000).decode()
    assert "step 4/4" in shown
    assert "━" in shown
    assert "padding 12.5%" in shown
    assert "a note" in shown
