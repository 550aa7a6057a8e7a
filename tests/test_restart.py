"""A process that starts itself again brings nothing along but what it is meant to."""

import json
import textwrap
from pathlib import Path

import psutil
import pytest

from tests.programs import run_python
from toolkit.restart import is_restarted

PROGRAM = """
import json, os, signal, subprocess, sys, time
import psutil
from toolkit.restart import Restart, attempt, is_in_place, is_restarted
from toolkit.stop import Stop

with Stop() as stop:
    if not is_in_place():
        assert not is_restarted()
        restart = Restart(stop)
        os.environ["CHANGED"] = "since"
        reader, _ = os.pipe()
        os.dup2(reader, int(sys.argv[1]), inheritable=True)
        child = subprocess.Popen(["sleep", "100"])
        end = psutil.wait_procs

        def end_and_be_asked(*arguments):
            os.kill(os.getpid(), signal.SIGUSR2)
            while not stop.requested:
                time.sleep(0.01)
            return end(*arguments)

        psutil.wait_procs = end_and_be_asked  # the request comes late
        print(json.dumps([os.getpid(), child.pid]))
        restart.at(time.time() + 0.2, "kill@data:0:9", lambda: print(json.dumps("last words")))
    time.sleep(0.5)
    facts = {
        "is_open": os.path.exists("/dev/fd/" + sys.argv[1]),
        "attempt": attempt(),
        "is_restarted": is_restarted(),
        "environment": os.environ.get("CHANGED"),
        "faults": os.environ["TOOLKIT_FAULT"],
        "requested": stop.requested,
        "by_scheduler": stop.by_scheduler,
    }
    print(json.dumps([os.getpid(), facts]))
"""


def test_what_goes_along(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))
    done = run_python("-u", program, "40", TORCHELASTIC_RESTART_COUNT="0")
    assert done.returncode == 0, done.stderr
    first, words, second = map(json.loads, done.stdout.splitlines())
    assert words == "last words"
    assert first[0] == second[0], "the launcher knows it by its process id"
    assert not psutil.pid_exists(first[1])
    assert second[1] == {
        "is_open": False,
        "attempt": 1000,
        "is_restarted": True,
        "environment": None,
        "faults": "kill@data:0:9",
        "requested": True,
        "by_scheduler": True,
    }


def test_a_job_that_begins_again_goes_on_but_an_agents_starts_other_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert not is_restarted()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert is_restarted()
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    assert not is_restarted()
