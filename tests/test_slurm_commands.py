"""What is asked of SLURM, word for word; `tests/slurm` runs it on a real one."""

import argparse
import json
import os
import stat
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from tests.programs import ROOT
from toolkit import scheduler
from toolkit.experiments import slurm
from toolkit.experiments.arguments import Request
from toolkit.experiments.commands import main
from toolkit.experiments.sweep import load, runs


def test_ranges() -> None:
    assert slurm.ranges([0, 1, 2, 3]) == "0-3"
    assert slurm.ranges([7, 1, 0, 3, 4]) == "0-1,3-4,7"
    assert slurm.ranges([5]) == "5"


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Programs that note how they are called; squeue says what is in a file."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, answer in (
        ("sbatch", "echo 17"),
        ("squeue", f"/bin/cat {folder}/queue"),
        ("scontrol", f"/bin/cat {folder}/job"),
    ):
        file = folder / name
        file.write_text(f'#!/bin/sh\nprintf "%s\\n" "$0 $*" >> {folder}/calls\n{answer}\n')
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    (folder / "queue").write_text("")
    (folder / "job").write_text("JobId=15 PreemptEligibleTime=x PreemptTime=None Reason=None")
    monkeypatch.setenv("PATH", str(folder))
    return folder


SWEEP = ROOT / "configs" / "sweeps" / "smoke.yaml"


def test_what_an_array_starts_otherwise_than_the_file_says(
    fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another program is refused, another launch config is named."""
    content = yaml.safe_load(SWEEP.read_text())
    content["parameters"]["output_dir"] = {"value": str(tmp_path / "out")}
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(content | {"program": "mine.py"}))
    assert main(["submit", str(path)]) == 2
    shown = capsys.readouterr().err
    assert f"program got mine.py, an array starts {ROOT / 'toolkit' / 'train.py'} alone" in shown
    assert not (fake / "calls").exists(), "nothing was submitted"

    command = [word.replace("gpu.yaml", "zero3.yaml") for word in content["command"]]
    path.write_text(yaml.safe_dump(content | {"command": command}))
    for environment, is_named in (({}, True), ({"LAUNCH": "launch/zero3.yaml"}, False)):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert main(["submit", str(path)]) == 0
        shown = capsys.readouterr().out
        assert ("not launch/zero3.yaml of the command" in shown) == is_named
        assert (f"LAUNCH={ROOT}/launch/zero3.yaml in" in shown) == is_named


def test_the_command_line_of_a_submission(
    fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From another folder; what tasks will read is written down, flags and all."""
    monkeypatch.chdir(tmp_path)
    (fake / "sbatch").write_text(
        f'#!/bin/sh\nprintf "%s\\n" "$TOOLKIT_ROOT" "$@" > {fake}/calls\necho "17;cluster"\n'
    )
    extra = ["--output_dir=out", "--wandb.group=a b"]
    assert main(["submit", str(SWEEP), "--throttle=8", "--account", "me", *extra]) == 0
    [frozen] = (tmp_path / "out" / ".submitted").glob("*/smoke.yaml")
    assert (fake / "calls").read_text().splitlines() == [
        str(ROOT),
        "--parsable",
        "--array=0-3%8",
        "--job-name=smoke",
        f"--output={tmp_path}/out/logs/%x_%A_%a.out",
        "--account",
        "me",
        str(ROOT / "slurm" / "sweep.sbatch"),
        str(frozen),
    ]
    ours, theirs = runs(load(SWEEP), extra), runs(load(frozen), [])
    there = [replace(run.config, output_dir=str(tmp_path / "out")) for run in ours]
    assert there == [run.config for run in theirs]
    assert theirs[0].config.wandb.group == "a b"
    assert theirs[0].folder == tmp_path / "out" / theirs[0].run_id, "wherever a task starts"


def test_what_follows_the_arguments_wins_in_tasks_too(tmp_path: Path) -> None:
    content = yaml.safe_load(SWEEP.read_text())
    content["command"] = ["python", "${program}", "${args}", "--epochs=2"]
    content["parameters"]["wandb"] = {"value": {"project": "mine"}}
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(content))
    extra = [f"--output_dir={tmp_path}", "--epochs=5", "--wandb={'group': 'g'}"]
    request = Request(argparse.Namespace(), load(file), extra, [])
    tasks = runs(load(slurm.freeze(request, tmp_path)), [])
    assert [task.config for task in tasks] == [run.config for run in request.runs()]
    assert tasks[0].config.epochs == 5
    assert tasks[0].config.wandb.project == "mine"


def test_configurations_that_a_sweep_names_are_kept_too(tmp_path: Path) -> None:
    """An edit after the submission changes neither the runs nor their names."""
    files = [tmp_path / f"{name}.yaml" for name in ("one", "two")]
    for number, file in enumerate(files):
        file.write_text(f"seed: {number}\nhead: v1\n")
    content = yaml.safe_load(SWEEP.read_text())
    content["parameters"] = {"config": {"values": [str(file) for file in files]}}
    sweep = tmp_path / "own.yaml"
    sweep.write_text(yaml.safe_dump(content))
    extra = [f"--output_dir={tmp_path}"]
    request = Request(argparse.Namespace(), load(sweep), extra, [])
    frozen = slurm.freeze(request, tmp_path)
    before = [(run.run_id, run.label, run.config.seed) for run in request.runs()]
    files[0].write_text("seed: 9\n")
    after = [(run.run_id, run.label, run.config.seed) for run in runs(load(frozen), [])]
    assert before == after
    assert [seed for _, _, seed in after] == [0, 1]


def test_a_configuration_in_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("epochs: 3\n")
    content = yaml.safe_load(SWEEP.read_text())
    content["parameters"]["config"] = {"value": "~/mine.yaml"}
    sweep = tmp_path / "own.yaml"
    sweep.write_text(yaml.safe_dump(content))
    request = Request(argparse.Namespace(), load(sweep), [f"--output_dir={tmp_path}"], [])
    tasks = runs(load(slurm.freeze(request, tmp_path)), [])
    assert [task.config for task in tasks] == [run.config for run in request.runs()]


@pytest.mark.parametrize("is_two_words", [False, True])
def test_a_configuration_given_as_a_flag_is_kept_too(tmp_path: Path, is_two_words: bool) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("epochs: 3\n")
    content = yaml.safe_load(SWEEP.read_text())
    del content["parameters"]["config"]
    extra = [f"--output_dir={tmp_path}"]
    if is_two_words:
        content["command"] = ["python", "${program}", "${args}", "--config", str(file)]
    else:
        extra.append(f"--config={file}")
    sweep = tmp_path / "own.yaml"
    sweep.write_text(yaml.safe_dump(content))
    request = Request(argparse.Namespace(), load(sweep), extra, [])
    frozen = slurm.freeze(request, tmp_path)
    file.write_text("epochs: 7\n")
    assert {run.config.epochs for run in runs(load(frozen), [])} == {3}


def test_only_what_is_missing_is_submitted(
    fake: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever put it into the queue; another sweep's tasks do not count, however they are numbered."""
    monkeypatch.chdir(ROOT)
    out = tmp_path / "runs"
    arguments = [str(SWEEP), f"--output_dir={out}"]
    assert main(["submit", *arguments]) == 0
    assert "Submitted 4 of 4 runs as array 17" in capsys.readouterr().out
    script = f"{ROOT}/slurm/sweep.sbatch"
    [frozen] = (out / ".submitted").glob("*/smoke.yaml")
    other = tmp_path / "other.yaml"
    other.write_text(SWEEP.read_text().replace("2.0e-5", "3.0e-5"))
    by_hand = f"slurm/sweep.sbatch configs/sweeps/smoke.yaml --output-dir {out}"
    lines = [
        f"0|17_0|PENDING|Priority||/elsewhere|{script} {frozen}",
        f"1|18_1|RUNNING||n1|{ROOT}|{by_hand}",
        f"2|19_2|PENDING|JobHeldUser||{ROOT}|{by_hand}-2",
        f"2|20_2|PENDING|Resources||{ROOT}|{script} {other} --output_dir={out}",
        f"3|21_3|PENDING|Resources||/elsewhere|{script} missing.yaml",
        f"3|22_3|PENDING|Resources||/elsewhere|{by_hand}",
        f"N/A|23|PENDING|Resources||{ROOT}|{ROOT}/slurm/train.sbatch --head=v1",
    ]
    (fake / "queue").write_text("\n".join(lines) + "\n")
    assert main(["submit", *arguments]) == 0
    assert "--array=2-3 " in (fake / "calls").read_text()
    shown = capsys.readouterr()
    assert shown.err.count("a task in the queue is not understood") == 1, "missing.yaml"
    assert main(["status", *arguments]) == 0
    said = capsys.readouterr().out
    assert "job 17_0, PENDING (Priority)" in said
    assert "job 18_1, RUNNING on n1, not begun yet" in said
    assert "2 queued, 2 waiting" in said


OWN = ["--array=0", "-a", "--test-only", "--output=x", "-a0-9", "-ox", "--arr=0", "--outp=x"]


@pytest.mark.parametrize("option", OWN)
def test_what_submit_decides_itself(
    fake: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    assert (
        main(["submit", str(SWEEP), f"--output_dir={tmp_path}", option, "--nodes=1", "--open"]) == 2
    )
    shown = capsys.readouterr()
    assert f"{option.partition('=')[0]} is not for `sweep submit`" in shown.err
    assert "--nodes" not in shown.err
    assert "--open" not in shown.err
    assert not list(tmp_path.glob("*/.submitted"))


def test_a_refusal_of_sbatch_is_shown(
    fake: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    (fake / "sbatch").write_text("#!/bin/sh\necho unrecognized option >&2; exit 1\n")
    file = str(ROOT / "configs" / "sweeps" / "smoke.yaml")
    arguments = ["submit", file, f"--output_dir={tmp_path}", "--acount=me"]
    assert main(arguments) == 1
    assert "unrecognized option" in capsys.readouterr().err
    (fake / "sbatch").unlink()
    assert main(arguments) == 1
    assert "is this a login node" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("status", "asked", "restarts", "wanted"),
    [
        ({"status": "preempted"}, True, 0, True),
        ({"status": "preempted"}, False, 0, False),
        ({"status": "preempted"}, True, 20, False),
        ({"status": "completed"}, True, 0, False),
        ({"status": "diverged"}, True, 0, False),
        ({"status": "crashed"}, True, 0, False),
        ({"status": "oom", "split": 16}, True, 0, False),
        ({}, True, 0, True),
    ],
)
def test_who_queues_again(
    fake: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    status: dict[str, object],
    asked: bool,
    restarts: int,
    wanted: bool,
) -> None:
    if status:
        (tmp_path / "status.json").write_text(json.dumps(status))
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    monkeypatch.setattr(slurm, "ASK_AGAIN_SECONDS", (0, 0))
    flag = ["--asked"] if asked else []
    assert main(["requeue", str(tmp_path), *flag]) == (0 if wanted else 1)
    calls = (fake / "calls").read_text() if (fake / "calls").exists() else ""
    assert calls.endswith("scontrol requeue 12_3\n") == wanted, "exactly this task"


def test_a_controller_that_is_away_for_a_moment(
    fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Asked again; and if it refuses for good, nobody is told that the job is queued."""
    monkeypatch.setenv("SLURM_JOB_ID", "15")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    monkeypatch.setattr(slurm, "ASK_AGAIN_SECONDS", (0, 0))
    (tmp_path / "status.json").write_text('{"status": "preempted"}')
    script = "#!/bin/sh\necho x >> {0}/tries\n[ $(wc -l < {0}/tries) -ge {1} ] || exit 1\n"
    monkeypatch.setenv("PATH", f"{fake}:/usr/bin:/bin")
    (fake / "scontrol").write_text(script.format(fake, 3))
    assert main(["requeue", str(tmp_path), "--asked"]) == 0
    assert "asked again" in capsys.readouterr().err
    (fake / "tries").unlink()
    (fake / "scontrol").write_text(script.format(fake, 9))
    assert main(["requeue", str(tmp_path), "--asked"]) == 1
    shown = capsys.readouterr()
    assert "failed" in shown.err
    assert "queued again (1" in shown.out
    assert "to be queued" in shown.out


def test_a_start_that_took_no_step_is_said(
    fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "15")
    (tmp_path / "status.json").write_text('{"status": "preempted", "start": "b"}')
    run = {"start": "a", "first_step": 1, "num_steps": 9}
    (tmp_path / "run.json").write_text(json.dumps(run))
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 4, "time": 1}\n')
    assert main(["requeue", str(tmp_path), "--asked"]) == 0
    assert "This start took no step" in capsys.readouterr().out
    (tmp_path / "run.json").write_text(json.dumps(run | {"start": "b"}))
    assert main(["requeue", str(tmp_path), "--asked"]) == 0
    assert "took no step" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("job", "takes"),
    [
        ("JobId=15 JobState=RUNNING PreemptTime=None Restarts=1", False),
        ("JobId=15 JobState=RUNNING PreemptTime=2026-11-23T19:08:10 Restarts=1", True),
        ("JobId=15 JobState=COMPLETING Restarts=2", True),
        ("JobId=15 JobState=COMPLETING PreemptTime=None Restarts=1", False),
        ("slurm_load_jobs error: Invalid job id specified", False),
    ],
    ids=["terminated by another", "preempted", "requeued", "cancelled", "no answer"],
)
def test_whose_sigterm_it_is(
    fake: Path, monkeypatch: pytest.MonkeyPatch, job: str, takes: bool
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "15")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    (fake / "job").write_text(job)
    assert scheduler.takes_the_place() == takes


def test_a_task_of_an_array_asks_for_itself(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last task's own number is the array's, which would stand for all of them."""
    for name, value in (("JOB_ID", "12"), ("ARRAY_JOB_ID", "12"), ("ARRAY_TASK_ID", "3")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    scheduler.job_facts()
    assert (fake / "calls").read_text().endswith("show job 12_3\n")


def supervised(script: str, **settings: str) -> "subprocess.CompletedProcess[str]":
    """Run a script as a template runs it."""
    job = {"SLURM_JOB_ID": f"test-{os.getpid()}", "TOOLKIT_ROOT": str(ROOT)}
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f'source "$TOOLKIT_ROOT/slurm/supervise.sh"\n{script}'],
        env=os.environ | job | settings,
        capture_output=True,
        text=True,
    )


def test_the_code_of_a_command_is_not_lost() -> None:
    """Though it ends at once, or the warning comes while it runs."""
    done = supervised("""
    for ((i = 0; i < 40; i++)); do wait_for bash -c "exit 3"; echo "$code"; done
    wait_for bash -c "kill -USR2 $$; sleep 0.3; exit 5"; echo "$code"
    is_asked && rm "$TOOLKIT_STOP_FILE" && echo asked
    """)
    assert done.stdout.split() == ["3"] * 40 + ["5", "asked"], done.stderr


def test_a_node_without_the_tmpdir_of_the_login_node(tmp_path: Path) -> None:
    script = 'kill -USR2 $$; rm "$TOOLKIT_STOP_FILE"; mktemp -u; is_asked && echo asked'
    done = supervised(script, TMPDIR=str(tmp_path / "absent"))
    assert done.stdout.split()[1:] == ["asked"], done.stderr


def test_a_stop_file_that_cannot_be_written_does_not_end_the_job(tmp_path: Path) -> None:
    done = supervised(
        f"TOOLKIT_STOP_FILE={tmp_path}/absent/stop; kill -USR2 $$; is_asked && echo asked"
    )
    assert done.stdout == "asked\n", done.stderr
    assert "warning: the run is not asked to stop" in done.stderr


def test_asked_before_the_first_command() -> None:
    """A job that may not queue again ends with an exit code, not with a mistake of the script."""
    done = supervised("toolkit() { return 1; }; MAX_REQUEUES=0 requeue_if_asked")
    assert (done.returncode, done.stderr) == (1, "")


def test_an_array_that_is_too_large(
    fake: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "sbatch: error: Batch job submission failed: Invalid job array specification"
    (fake / "sbatch").write_text(f"#!/bin/sh\necho '{text}' >&2; exit 1\n")
    assert main(["submit", str(SWEEP), f"--output_dir={tmp_path}"]) == 1
    assert "MaxArraySize" in capsys.readouterr().err


def test_preempted_by_sigterm(fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "status.json").write_text('{"status": "preempted"}')
    monkeypatch.setenv("SLURM_JOB_ID", "15")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    assert main(["requeue", str(tmp_path)]) == 1
    (fake / "job").write_text("JobId=15 PreemptTime=2026-11-23T19:08:10 Reason=None")
    assert main(["requeue", str(tmp_path)]) == 0
    assert (fake / "calls").read_text().endswith("scontrol requeue 15\n")


def test_keys_are_in_no_command_and_no_file(
    fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    for name in ("WANDB_API_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, "canary-7f3a")
    file = str(ROOT / "configs" / "sweeps" / "smoke.yaml")
    assert main(["submit", file, f"--output_dir={tmp_path / 'runs'}"]) == 0
    shown = capsys.readouterr()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 5, "the calls and the note of the submission are among them"
    assert all(b"canary" not in path.read_bytes() for path in files)
    assert "canary" not in shown.out + shown.err
