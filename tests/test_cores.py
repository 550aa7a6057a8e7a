"""A run says so when others compute on its cores, and only then."""

import textwrap
import time

import pytest

from tests.programs import run_python
from toolkit.engine import cores as module
from toolkit.engine.cores import Cores

WINDOW = 0.2
SETTINGS = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"


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


@pytest.mark.parametrize(
    ("name", "value", "watches"),
    [
        ("OMP_WAIT_POLICY", "PASSIVE", False),
        ("OMP_WAIT_POLICY", "active", True),
        ("GOMP_SPINCOUNT", "1000", False),
        ("KMP_BLOCKTIME", "1", True),  # Accelerate sets it on CPUs; torch's OpenMP does not know it
    ],
)
def test_threads_that_sleep_are_the_users_wish(
    name: str, value: str, watches: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    cores = Cores(threads=2)
    time.sleep(WINDOW)
    assert bool(cores.complaint()) == watches


def test_a_wait_for_the_disk_does_not_count() -> None:
    cores = Cores(threads=2)
    time.sleep(WINDOW)
    cores.begin()
    assert cores.complaint() is None


@pytest.mark.parametrize(("threads", "said"), [(2, 1), (1, 0)])
def test_a_run_says_it_once(threads: int, said: int, tiny_flags: list[str]) -> None:
    """As `launch/cpu.yaml` starts it."""
    code = """
    import sys
    from toolkit.engine import cores
    from toolkit.train import main

    cores.WINDOW_SECONDS, cores.FAIR_SHARE = 0.0, 100.0  # as if there were many others
    sys.exit(main(sys.argv[1:]))
    """
    flags = [*tiny_flags, "--max_steps=4", f"--cpu_threads={threads}"]
    environment = dict.fromkeys(SETTINGS, "") | {"KMP_BLOCKTIME": "1"}
    done = run_python("-c", textwrap.dedent(code), *flags, **environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("cores that its threads want") == said


def test_one_thread_waits_for_no_other() -> None:
    cores = Cores(threads=1)
    time.sleep(WINDOW)
    assert cores.complaint() is None
