"""A run says so when others compute on its cores, and only then."""

import time

import pytest

from toolkit.engine import cores as module
from toolkit.engine.cores import SETTINGS, Cores

WINDOW = 0.2


@pytest.fixture(autouse=True)
def short_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WINDOW_SECONDS", WINDOW)
    for name in SETTINGS:  # the suite runs with one of them
        monkeypatch.delenv(name, raising=False)


def test_it_is_said_once_how_much_of_its_cores_a_process_has() -> None:
    cores = Cores(threads=2)
    assert cores.complaint() is None, "nothing can be known yet"
    time.sleep(WINDOW)  # as if another process had both cores
    complaint = cores.complaint()
    assert complaint is not None
    assert complaint.startswith("This process has 0.0 of the 2 cores")
    assert "--cpu_threads 1" in complaint
    time.sleep(WINDOW)
    assert cores.complaint() is None


def test_each_window_counts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    now, used = 0.0, 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(time, "process_time", lambda: used)
    cores = Cores(threads=4)
    for _ in range(5):  # 3.0 of 4 cores
        now, used = now + 1, used + 3.0
        assert cores.complaint() is None
    now, used = now + 1, used + 2.7
    complaint = cores.complaint()
    assert complaint is not None
    assert "has 2.7 of the 4 cores" in complaint


@pytest.mark.parametrize("name", SETTINGS)
def test_threads_that_sleep_are_the_users_wish(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "passive")
    cores = Cores(threads=2)
    time.sleep(WINDOW)
    assert cores.complaint() is None


def test_one_thread_waits_for_no_other() -> None:
    cores = Cores(threads=1)
    time.sleep(WINDOW)
    assert cores.complaint() is None
