"""Who is called dead, and when a rank gives up."""

import os
import time
from pathlib import Path

import pytest

from toolkit.engine.phases import PHASES, Phases
from toolkit.engine.watchdog import Watchdog
from toolkit.stop import Stop


def make(folder: Path, rank: int, stop: Stop | None = None, timeout: float = 120) -> Watchdog:
    watchdog = Watchdog(
        folder, 3, Phases(rank), stop or Stop(), timeout, on_lost=print, on_beat=lambda: None
    )
    path = folder / f"{rank}.json"
    watchdog.file = os.open(path, os.O_WRONLY | os.O_CREAT)
    return watchdog


def test_the_silent_one_is_named_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three ranks, 1 beats and 2 has stopped."""
    me, alive, silent = (make(tmp_path, rank) for rank in range(3))
    silent.phases.enter("backward", 7)
    silent.note()
    alive.phases.enter("evaluate", 6)
    alive.note()

    def beat(_: float) -> None:
        alive.beats += 1
        alive.note()

    monkeypatch.setattr(time, "sleep", beat)
    lines = me.find_lost().splitlines()
    assert "rank 2 " in lines[1]
    assert "DEAD OR STOPPED; it was in phase backward of step 7" in lines[1]
    assert "rank 1 " in lines[2]
    assert "alive, in phase evaluate of step 6" in lines[2]
    assert "rank 0 (this one)" in lines[3]
    assert list(me.silent) == [2]


def test_a_rank_that_gave_no_sign_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    assert "rank 2 has given no sign of life" in make(tmp_path, 0).find_lost()


@pytest.mark.parametrize("phase", PHASES)
def test_a_slow_save_may_take_until_the_launcher_kills(tmp_path: Path, phase: str) -> None:
    """Eight seconds before SIGKILL, 20 s in a phase: whoever does not save gives up and says why."""
    stop = Stop()
    stop.deadline = time.monotonic() + 8
    watchdog = make(tmp_path, 0, stop)
    watchdog.phases.enter(phase)
    watchdog.phases.since -= 20
    saves = phase in ("save", "before_rename", "after_rename", "prune")
    assert watchdog._overdue() == (not saves)
    watchdog.phases.since -= 120
    assert watchdog._overdue(), "nothing may take longer than --rank_timeout"


def test_a_step_that_just_began_is_not_given_up(tmp_path: Path) -> None:
    stop = Stop()
    stop.deadline = time.monotonic() + 8
    watchdog = make(tmp_path, 0, stop)
    watchdog.phases.enter("forward")
    assert not watchdog._overdue()
