"""Requests to stop are noted whatever the main thread is doing, and whatever the disk does."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from tests.programs import TRAIN, run_python
from toolkit.config import RunConfig
from toolkit.errors import Preempted
from toolkit.record.journal import RunFolder
from toolkit.run import _record_early_stop
from toolkit.stop import Stop


def wait_until_requested(stop: Stop) -> None:
    deadline = time.monotonic() + 5
    while not stop.requested:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP])
def test_a_signal_is_noted_and_its_deadline(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PET_SHUTDOWN_TIMEOUT", "300")
    before = signal.signal(number, usual := signal.default_int_handler)  # nohup may run the tests
    with Stop() as stop:
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # Ctrl-C arrives twice
        wait_until_requested(stop)
        assert 290 < stop.deadline - time.monotonic() <= 300
        with pytest.raises(Preempted), stop.raising():
            pass
    assert signal.signal(number, before) is usual


def test_raising_interrupts() -> None:
    asked = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM))
    with Stop() as stop:
        asked.start()
        with pytest.raises(Preempted), stop.raising():
            time.sleep(5)


def test_a_signal_just_before_is_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The handler has run, when nothing was to be raised yet; the thread has not come to note it."""
    note = Stop._note

    def slowly(stop: Stop, number: int) -> None:
        time.sleep(1)
        note(stop, number)

    monkeypatch.setattr(Stop, "_note", slowly)
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert not stop.requested
        with pytest.raises(Preempted), stop.raising():
            time.sleep(2)


@pytest.mark.parametrize("late", [True, False])
def test_leaving_where_no_handler_gets_to_run(late: bool) -> None:
    """As in torch's meeting of the ranks; or asked just before it."""
    program = f"""
    import os, signal, threading, time
    from toolkit.stop import Stop

    with Stop() as stop:
        asked = threading.Timer(0.3 if {late} else 0, os.kill, (os.getpid(), signal.SIGTERM))
        asked.start()
        while not ({late} or stop.requested):
            time.sleep(0.01)
        with stop.leaving(lambda: print("last words", flush=True)):
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # in this thread only
            time.sleep(20)
    """
    began = time.monotonic()
    done = run_python("-c", textwrap.dedent(program))
    assert done.returncode == Preempted.exit_code, done.stderr
    assert done.stdout == "last words\n"
    assert time.monotonic() - began < 15


def test_a_file_on_a_disk_that_fails_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, failed = Path.unlink, []

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.name == "STOP" and path.exists() and not failed:
            failed.append(path)
            raise OSError(116, "Stale file handle")
        plain(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    with Stop() as stop:
        stop.file = tmp_path / "STOP"
        time.sleep(0.6)
        assert not stop.requested
        stop.file.touch()
        wait_until_requested(stop)
        assert stop.deadline == float("inf"), "nobody kills us for a file"
        assert failed
        assert not stop.file.exists()


def test_a_closed_terminal_does_not_end_a_run(tiny_flags: list[str]) -> None:
    """`| tee log` dies with the same Ctrl-C."""
    code = """
import os, sys
from toolkit.train import main
reader, writer = os.pipe()
os.close(reader)
os.dup2(writer, 1)
os.dup2(writer, 2)
os._exit(main(sys.argv[1:]))
"""
    done = run_python("-c", code, *tiny_flags, "--max_steps=8")
    assert done.returncode == 0, sys.version


@pytest.mark.parametrize("ignored", [True, False])
def test_a_hang_up_is_ignored_under_nohup(ignored: bool) -> None:
    """Neither does it keep from stopping what does not come by SIGHUP."""
    program = f"""
    import os, signal, time
    # `nohup` leaves it ignored
    signal.signal(signal.SIGHUP, signal.SIG_IGN if {ignored} else signal.SIG_DFL)
    from toolkit.stop import GONE, Stop

    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(0.3)
        print(stop.requested)
        os.kill(os.getpid(), GONE)  # the launcher has died
        time.sleep(0.3)
        print(stop.requested)
    """
    done = run_python("-c", textwrap.dedent(program))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(not ignored), "True"]


def test_a_second_signal_leaves_at_once_though_nobody_reads() -> None:
    program = """
    import os, signal, time
    from toolkit.stop import ECHO_SECONDS, Stop

    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 2)
    with Stop():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(ECHO_SECONDS + 0.2)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    print("still here")
    """
    done = run_python("-c", textwrap.dedent(program))
    assert done.returncode == 128 + signal.SIGINT
    assert done.stdout == ""


def test_a_stopped_run_leaves_by_its_exit_code_though_nobody_reads(tiny_flags: list[str]) -> None:
    """Else Python ends as usual, beside a process group that is still there."""
    command = [sys.executable, str(TRAIN), *tiny_flags, "--epochs=500", "--log_every=1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout
        while b"step" not in process.stdout.readline().split(b" ")[:1]:
            assert process.poll() is None
        process.stdout.close()  # `tee` got the Ctrl-C, too
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == Preempted.exit_code


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_stop_before_the_ranks_have_met_is_said_once(
    rank: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    config = RunConfig(output_dir=str(tmp_path), run_id="r", track="none")
    _record_early_stop(config, RunFolder(config.folder), Stop())
    said = "stopped as asked; the same command goes on from there\n"
    assert capsys.readouterr().err == (said if rank == "0" else "")
