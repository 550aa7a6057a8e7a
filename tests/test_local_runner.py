"""Sweeps on this machine: what fails stops nothing else, and a Ctrl-C loses nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.programs import ROOT
from toolkit.experiments.commands import main
from toolkit.experiments.local import LocalRunner, Place, gpus, log_file, places
from toolkit.experiments.states import read_state
from toolkit.experiments.sweep import load, runs
from toolkit.record.journal import RunFolder


def write(folder: Path, flags: list[str], command: list[str], **values: list[Any]) -> Path:
    fixed = dict(flag[2:].split("=") for flag in flags)
    parameters: dict[str, Any] = {name: {"value": value} for name, value in fixed.items()}
    parameters |= {name: {"values": value} for name, value in values.items()}
    content = {"program": str(ROOT / "toolkit" / "train.py"), "method": "grid"}
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(content | {"command": command, "parameters": parameters}))
    return path


PYTHON = [sys.executable, "${program}", "${args}"]


def test_one_that_fails_stops_no_other(
    tiny_flags: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Run 0 finds no data; it is left alone until --retry_failed."""
    data = tmp_path / "late.csv"
    flags = [flag for flag in tiny_flags if "--dataset" not in flag] + ["--max_steps=2"]
    good = next(flag for flag in tiny_flags if "--dataset" in flag).split("=")[1]
    path = write(tmp_path, flags, PYTHON, dataset=[str(data), good])
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert main(["run", str(path)]) == 1
    said = capsys.readouterr().out
    assert "failed after" in said
    assert "data_error" in said
    assert "completed after" in said
    assert "1 of 2 runs are complete" in said
    data.write_bytes((Path(good) / "train.csv").read_bytes())
    assert main(["run", str(path)]) == 1
    assert "1 completed, 0 to do, 1 failed" in capsys.readouterr().out
    assert main(["status", str(path)]) == 0
    [line] = [text for text in capsys.readouterr().out.splitlines() if "data_error" in text]
    log = Path(line.partition("(log ")[2].rstrip(")"))
    assert "late.csv" in log.read_text()
    assert main(["run", str(path), "--retry_failed"]) == 0
    assert "2 of 2 runs are complete" in capsys.readouterr().out
    assert main(["status", str(path)]) == 0
    assert f"2 runs in {tmp_path / 'runs'}: 2 completed" in capsys.readouterr().out


def test_a_stop_loses_nothing(tiny_flags: list[str], tmp_path: Path) -> None:
    """Two at a time, under the launcher; started again, each goes on."""
    command = [
        "accelerate",
        "launch",
        "--config_file",
        str(ROOT / "launch" / "cpu.yaml"),
        *PYTHON[1:],
    ]
    path = write(tmp_path, [*tiny_flags, "--epochs=40", "--log_every=1"], command, seed=[1, 2, 3])
    start = [sys.executable, "-m", "toolkit", "sweep", "run", str(path), "--jobs=2"]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}  # no environment is activated
    settings = os.environ | environment
    runs = tmp_path / "runs"
    with subprocess.Popen(start, env=settings, stdout=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while sum('"step": 20' in p.read_text() for p in runs.glob("*/metrics.jsonl")) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGHUP)  # the terminal goes
        time.sleep(0.1)
        process.send_signal(signal.SIGTERM)  # `timeout` signals twice; that is one request
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 75, out
    assert "the same command goes on from there" in out
    folders = [p for p in runs.iterdir() if (p / "status.json").exists()]
    assert sorted(read_state(folder).kind for folder in folders) == ["preempted"] * 2
    done = subprocess.run(start, env=settings, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 runs: 0 completed, 3 to do" in done.stdout
    logs = [log.read_text() for log in (runs / "logs").iterdir()]
    assert sum("Going on after step" in log for log in logs) == 2
    assert (runs / "bert_experiment_results.csv").exists()


def test_what_cannot_be_started_stops_no_other(
    tiny_flags: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And what another process runs is left to it."""
    path = write(tmp_path, tiny_flags, PYTHON, seed=[1, 2, 3])
    first, second, _ = runs(load(path), [])
    log_file(first).mkdir(parents=True)  # a log that cannot be opened
    (second.folder).mkdir()
    (second.folder / "status.json").write_text('{"status": "preempted"}')
    with RunFolder(second.folder).claim():
        (second.folder / "status.json").write_text('{"status": "running"}')
        runner = LocalRunner([first, second], 1)
        assert not runner.run(retry_failed=False)
    said = capsys.readouterr().out
    assert "2 runs: 0 completed, 1 to do, 1 running" in said
    assert f"{first.run_id}  could not be started: " in said


def test_a_launcher_that_dies_at_once(
    tiny_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it printed is in its own log, whatever log an earlier start named."""
    path = write(tmp_path, tiny_flags, ["false", *PYTHON[1:]], seed=[1])
    [run] = runs(load(path), [])
    run.folder.mkdir(parents=True)
    for status in ("preempted", "crashed"):
        old = {"status": status, "message": "why", "log": "/old/17.out"}
        (run.folder / "status.json").write_text(json.dumps(old))
        assert not LocalRunner([run], 1).run(retry_failed=True)
        assert f"(exit code 1, log {log_file(run)})" in capsys.readouterr().out


def test_a_command_that_is_not_there(
    tiny_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, tiny_flags, ["acelerate", *PYTHON[1:]], seed=[1])
    assert main(["run", str(path)]) == 2
    assert "'acelerate'" in capsys.readouterr().err


def test_runs_at_the_same_time_share_out_cores_and_gpus() -> None:
    two = places([4, 5, 6], ["0", "1", "2", "3"], 2)
    assert two == [Place([4, 6], ["0", "2"]), Place([5], ["1", "3"])]
    assert two[1].environment() == {"CUDA_VISIBLE_DEVICES": "1,3"}
    crowded = places([7], ["GPU-a", "GPU-b"], 3)
    assert [(place.cores, place.gpus) for place in crowded] == [
        ([7], ["GPU-a"]),
        ([7], ["GPU-b"]),
        ([7], ["GPU-a"]),
    ]
    assert places([0], [], 1)[0].environment() == {}, "what the user has set stays"


def test_gpus_are_those_that_the_user_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: H100 (UUID: x)'; echo 'GPU 1: H100 (UUID: y)'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-x,3")
    assert gpus() == ["GPU-x", "3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpus() == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    program.write_text(
        "#!/bin/sh\necho 'GPU 0: A100 (UUID: GPU-x)'\n"
        "echo '  MIG 3g.20gb Device 0: (UUID: MIG-a)'; echo '  MIG 3g.20gb Device 1: (UUID: MIG-b)'\n"
    )
    assert gpus() == ["MIG-a", "MIG-b"]
    program.write_text("#!/bin/sh\necho no driver >&2; exit 9\n")
    assert gpus() == []
