"""How runs stand, and how that reads."""

import errno
import fcntl
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

from toolkit.errors import ConfigError
from toolkit.experiments import slurm, status
from toolkit.experiments.commands import main
from toolkit.experiments.states import read_state
from toolkit.experiments.sweep import load, runs
from toolkit.files import lock, lock_path
from toolkit.record.journal import RunFolder


def write_run(folder: Path, status: str, steps: int = 4, **more: Any) -> None:
    """Leave what a run of 100 steps leaves that has logged every tenth, each in 5 s."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "status.json").write_text(json.dumps({"status": status, "start": "a"} | more))
    about = {"num_steps": 100, "first_step": 1, "start": "a", "host": "node7"}
    (folder / "run.json").write_text(json.dumps(about))
    lines = [{"kind": "train", "step": 10 * n, "time": 5.0 * n} for n in range(1, steps + 1)]
    text = "\n".join(map(json.dumps, lines))
    (folder / "metrics.jsonl").write_text(text + '\n{"kind": "train", "st')


def test_states(tmp_path: Path) -> None:
    assert read_state(tmp_path).kind == "waiting"
    write_run(tmp_path, "running", log="/logs/7.out")
    state = read_state(tmp_path)
    assert (state.kind, state.step, state.steps_of_start) == ("lost", 40, 40)
    assert state.seconds_left == pytest.approx(30)
    assert state.is_open
    assert state.describe() == "step 40 of 100  (log /logs/7.out)"
    write_run(tmp_path, "oom", split=4, message="out of memory\nmore")
    assert read_state(tmp_path).describe() == "oom: out of memory, step 40 of 100"
    assert not read_state(tmp_path).is_open
    write_run(tmp_path, "preempted")
    assert read_state(tmp_path).describe() == "step 40 of 100"
    write_run(tmp_path, "preempted", start="another")
    assert read_state(tmp_path).steps_of_start == 0, "this start did not come to its first step"


def test_a_step_that_was_saved_counts_though_it_was_not_logged(tmp_path: Path) -> None:
    write_run(tmp_path, "preempted", steps=1, start="b")
    run = {"num_steps": 100, "first_step": 12, "start": "b"}
    (tmp_path / "run.json").write_text(json.dumps(run))
    for name in ("step-000011", "step-000017", "aside-1-step-000040", ".step-000041"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    state = read_state(tmp_path)
    assert state.describe() == "step 17 of 100"
    assert state.steps_of_start == 6


def test_a_running_run_says_where_and_how_long(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    write_run(folder, "running")
    with RunFolder(folder).claim():
        assert read_state(folder).describe() == "step 40 of 100, 30 s left, on node7"


def test_hours_in_the_queue_are_no_hours_of_work(tmp_path: Path) -> None:
    write_run(tmp_path, "running")
    rows = [{"kind": "train", "step": 50 + n, "time": 90_000.0 + n} for n in range(10)]
    journal = tmp_path / "metrics.jsonl"
    old = journal.read_text().rsplit("\n", 1)[0]
    journal.write_text("\n".join([old, *map(json.dumps, rows)]))
    assert read_state(tmp_path).seconds_left == pytest.approx(41)


def test_a_reason_is_the_problem_and_not_its_heading(tmp_path: Path) -> None:
    message = "2 problems with the data:\n  - reviews.csv: no column text\n  - another"
    write_run(tmp_path, "data_error", steps=0, message=message)
    assert "data_error: reviews.csv: no column text (and 1 more)" in read_state(tmp_path).describe()
    write_run(tmp_path, "crashed", message="x" * 400)
    assert len(read_state(tmp_path).describe()) < 180


def test_who_writes_in_a_folder(tmp_path: Path) -> None:
    """To ask needs no right to write, makes no file, and does not look like writing to others who ask."""
    folder = RunFolder(tmp_path / "run")
    write_run(folder.path, "running")
    assert not folder.in_use()
    assert not lock_path(folder.path).exists()
    with folder.claim():
        lock_path(folder.path).chmod(0o444)
        assert folder.in_use()
    assert not folder.in_use()
    with lock_path(folder.path).open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # another one asks at this moment
        assert not folder.in_use()


def test_a_failure_is_recorded_though_somebody_asks_at_this_moment(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    write_run(folder.path, "preempted")
    with lock_path(folder.path).open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        threading.Timer(0.2, fcntl.flock, (file.fileno(), fcntl.LOCK_UN)).start()
        folder.record_failure("data_error", "no column text")
    assert folder.status == "data_error"


def test_folders_that_cannot_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system without locks: signs of life tell, and nobody may write."""
    folder = RunFolder(tmp_path / "run")
    write_run(folder.path, "running")
    lock_path(folder.path).touch()

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)  # filelock's, too
    assert not folder.in_use()
    (folder.path / ".ranks" / "a").mkdir(parents=True)
    (folder.path / ".ranks" / "a" / "0").touch()
    assert folder.in_use()
    with pytest.raises(ConfigError, match="file system without locks"), folder.claim():
        pass
    with pytest.raises(OSError, match="not implemented"), lock(tmp_path / "cache"):
        pass


def test_the_next_morning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run of each kind: each line says what there is to know, and the last ones what to type."""
    file = tmp_path / "mine.yaml"
    parameters = {"output_dir": {"value": str(tmp_path / "out")}, "seed": {"values": [*range(8)]}}
    file.write_text(yaml.safe_dump({"method": "grid", "parameters": parameters}))
    folders = [run.folder for run in runs(load(file), [])]
    write_run(folders[0], "completed")
    f1 = {"value": 0.9, "low": 0.85, "high": 0.93}
    summary = {"test": {"f1": f1}, "train_seconds": 90}
    (folders[0] / "summary.json").write_text(json.dumps(summary))
    write_run(folders[1], "running", log="/logs/1.out")
    write_run(folders[2], "preempted")
    write_run(folders[3], "diverged", message="11 steps", log="/logs/3.out")
    write_run(folders[4], "stopped", message="its metric was not promising")
    logs = tmp_path / "out" / "logs"
    logs.mkdir()
    (logs / "mine_17_5.out").write_text("No module named toolkit")
    task = slurm.Task("18_2", "PENDING", "JobHeldUser", "")
    queue = {
        folders[2].resolve(): task,
        folders[6].resolve(): slurm.Task("18_6", "RUNNING", "", "n1"),
    }
    monkeypatch.setattr(slurm, "queue", lambda: queue)
    assert main(["status", str(file)]) == 0
    said = capsys.readouterr().out.splitlines()
    for line, words in zip(
        said,
        (
            "completed seed=0 F1 0.9000 (0.850 to 0.930), 2 min",
            "lost seed=1 step 40 of 100 (log /logs/1.out)",
            "queued seed=2 job 18_2, PENDING (JobHeldUser) step 40 of 100",
            "failed seed=3 diverged: 11 steps, step 40 of 100 (log /logs/3.out)",
            "stopped seed=4 stopped: its metric was not promising, step 40 of 100",
            "waiting seed=5 its last start has not begun its run, or ended before it did "
            f"(log {logs}/mine_17_5.out)",
            "queued seed=6 job 18_6, RUNNING on n1, not begun yet",
            "waiting seed=7",
        ),
        strict=False,
    ):
        found = line.split()
        assert [found[3], found[2], *found[4:]] == words.split()
    assert said[8].startswith(
        f"8 runs in {tmp_path / 'out'}: 2 queued, 2 waiting, 1 lost, 1 failed"
    )
    assert f"python -m toolkit sweep run {file}" in said[9]
    assert "--retry_failed" in said[10]
    assert f"results {file}" in said[11]
    assert main(["status", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 7, "what a folder holds, a count and one hint"
    assert said[5].startswith("5 runs in")


def test_a_search_has_a_status_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.yaml"
    parameters = {"output_dir": {"value": str(tmp_path)}, "lr": {"min": 1e-5, "max": 1e-4}}
    file.write_text(yaml.safe_dump({"method": "random", "parameters": parameters}))
    write_run(tmp_path / "v2-abc", "preempted")
    write_run(tmp_path / "v2-def", "failed")
    assert main(["status", str(file)]) == 0
    said = capsys.readouterr().out
    assert "v2-abc" in said
    assert f"what is preempted: python -m toolkit sweep run {file} --search optuna\n" in said
    assert "submit" not in said
    assert "--retry_failed" not in said
    assert status.list_runs("status", None, [str(file)]).folder == tmp_path
