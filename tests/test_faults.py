"""The quick part of the fault battery: each kind of fault once, under the real launcher.

`python -m tests.faults.battery` is the long part.
"""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.faults.harness import Subject

STEPS = 54
MakeSubject = Callable[..., Subject]


@pytest.fixture(scope="module")
def make(
    tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path, tiny_data: Path
) -> MakeSubject:
    """Make runs of 54 steps in 8 epochs, evaluated and saved at the end of each."""
    cache = tmp_path_factory.mktemp("faults_cache")

    def build(*extra: str, processes: int = 2, config: str | None = None) -> Subject:
        flags = [
            f"--encoder={tiny_encoder}",
            f"--dataset={tiny_data}",
            f"--cache_dir={cache}",
            "--track=none",
            "--max_length=32",
            "--batch_size=16",
            "--lr=0.003",
            "--epochs=8",
            "--log_every=1",
            "--cpu_threads=1",
            "--dropout=0.2",
            "--head=v3",
        ]
        name = config or ("cpu" if processes == 1 else "cpu2")
        runs = tmp_path_factory.mktemp("runs")
        return Subject(runs, [*flags, *extra], name, processes)

    return build


@pytest.fixture(scope="module")
def uninterrupted(make: MakeSubject) -> Callable[[int], Subject]:
    """Runs that nothing happened to, by number of processes."""
    done: dict[int, Subject] = {}

    def get(processes: int) -> Subject:
        if processes not in done:
            done[processes] = make(processes=processes)
            assert done[processes].run() == 0, done[processes].said()
            assert done[processes].steps() == [*range(1, STEPS + 1)]
        return done[processes]

    return get


def assert_same(subject: Subject, reference: Subject) -> None:
    """Compare bit for bit; and count that every row was used once for each epoch."""
    ours, theirs = subject.result(), reference.result()
    assert ours == theirs, [key for key in ours if ours[key] != theirs[key]]
    assert subject.steps() == [*range(1, STEPS + 1)]
    notes = json.loads(
        (subject.folder / "checkpoints" / ours["step"] / "progress.json").read_text()
    )
    assert notes["progress"]["overall"]["rows"] == 8 * 108
    assert subject.status["status"] == "completed"
    assert not subject.workers()


def test_killed_ranks(make: MakeSubject, uninterrupted: Callable[[int], Subject]) -> None:
    """Five starts of one run: killed in another phase each time, then left alone."""
    subject = make("--save_minutes=0")
    for place in ("data:1:3", "save:1:14", "before_rename:0:20", "prune:0:34"):
        step = int(place.split(":")[2])
        assert subject.run(f"kill@{place}") != 0
        assert subject.status["status"] == "crashed"
        phase, rank, _ = place.split(":")
        [lost] = [line for line in subject.status["message"].splitlines() if "DEAD" in line]
        assert f"rank {rank} " in lost
        assert f"in phase {phase} of step {step}" in lost
        assert step - subject.newest_step() == (0 if place.startswith("prune") else 1)
        assert not subject.workers()
    assert subject.run() == 0
    assert "Going on after step 34" in subject.said()
    assert_same(subject, uninterrupted(2))


def test_killed_between_checkpoints(
    make: MakeSubject, uninterrupted: Callable[[int], Subject]
) -> None:
    """Three processes; lines in the journal after the checkpoint are written again, not twice."""
    subject = make(processes=3)
    assert subject.run("kill@backward:2:13") != 0
    assert subject.steps() == [*range(1, 13)]
    assert subject.run() == 0
    assert "Going on after step 7" in subject.said()
    assert_same(subject, uninterrupted(3))


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_launcher(
    make: MakeSubject, uninterrupted: Callable[[int], Subject], processes: int
) -> None:
    """Its trainers save and go by themselves; a start at that very moment waits for them."""
    subject = make(processes=processes)
    process = subject.start()
    subject.wait_for(lambda: subject.has_logged(10))
    process.kill()
    assert subject.run() == 0, subject.said()
    assert "Going on after step" in subject.said(), "the trainer outlived its launcher"
    assert_same(subject, uninterrupted(processes))


@pytest.mark.parametrize(
    ("processes", "target", "number"),
    [
        (1, "launcher", signal.SIGTERM),
        (1, "rank 0", signal.SIGINT),
        (2, "launcher", signal.SIGTERM),
        (2, "launcher", signal.SIGUSR2),
        (2, "rank 1", signal.SIGUSR2),
        (2, "everyone", signal.SIGINT),
        (2, "file", None),
    ],
)
def test_asked_to_stop(
    make: MakeSubject,
    uninterrupted: Callable[[int], Subject],
    processes: int,
    target: str,
    number: signal.Signals | None,
) -> None:
    subject = make(processes=processes)
    process = subject.start()
    subject.wait_for(lambda: subject.has_logged(10))
    workers = subject.workers()
    assert len(workers) == processes
    asked = time.monotonic()
    if number is None:
        (subject.folder / "STOP").touch()
    elif target == "everyone":  # Ctrl-C in a terminal
        os.killpg(process.pid, number)
    elif target == "launcher":
        process.send_signal(number)
    else:
        workers[int(target.split()[1])].send_signal(number)
    subject.end(process, 30)
    subject.wait_until_gone(30 - (time.monotonic() - asked))
    assert subject.status["status"] == "preempted", subject.said()
    assert subject.newest_step() == subject.steps()[-1] < STEPS, "no step may be lost"
    assert not (subject.folder / "STOP").exists()
    if target in ("launcher", "file"):  # the others leave the same behind
        assert subject.run() == 0, subject.said()
        assert_same(subject, uninterrupted(processes))


def test_asked_to_stop_while_evaluating(
    make: MakeSubject, uninterrupted: Callable[[int], Subject]
) -> None:
    """The evaluation is left to the next start, in validation and in the final test."""
    subject = make("--eval_tokens=32")
    assert subject.run("term@evaluate:1:14") != 0
    assert subject.status["status"] == "preempted"
    assert subject.steps("eval") == [7]
    assert subject.steps()[-1] == 14
    assert subject.run("kill@finish:0:54") != 0
    assert subject.run("term@evaluate:1:0") != 0, "all steps are done: it is the final test's"
    assert subject.status["status"] == "preempted"
    assert subject.run("term@finish:0:0") == 0, "too late to stop: the run is complete"
    ours, theirs = subject.result(), uninterrupted(2).result()
    assert all(ours[key] == theirs[key] for key in ("step", "state", "best"))
    assert subject.steps("eval") == uninterrupted(2).steps("eval")


def test_asked_to_stop_while_preparing(make: MakeSubject, tmp_path: Path) -> None:
    """There is nothing to save yet; the same command starts from the beginning."""
    data = tmp_path / "big.csv"
    lines = [f"it is good {number},pos\nit is bad {number},neg\n" for number in range(200_000)]
    data.write_text("text,label\n" + "".join(lines))
    subject = make(f"--dataset={data}", "--max_steps=3")
    process = subject.start()
    subject.wait_for(lambda: "Preparing" in subject.said())
    process.terminate()
    subject.end(process, 30)
    subject.wait_until_gone(30)
    assert subject.status["status"] == "preempted", subject.said()


def test_a_second_signal_leaves_at_once(make: MakeSubject) -> None:
    """Rank 1 is stopped, so rank 0 waits in a collective: Python's own handlers would never run."""
    subject = make("--save_minutes=0")
    process = subject.start("stop@forward:1:5")
    subject.wait_for(lambda: subject.has_logged(4))
    time.sleep(1)
    [waiting, stopped] = subject.workers()
    waiting.send_signal(signal.SIGTERM)
    time.sleep(1)
    assert waiting.is_running()
    waiting.send_signal(signal.SIGTERM)
    waiting.wait(2)
    stopped.kill()
    subject.end(process, 40)
    assert "second signal: leaving at once" in subject.said()
    assert subject.newest_step() == 4


def test_a_rank_that_hangs_is_named(make: MakeSubject) -> None:
    subject = make("--rank_timeout=6")
    process = subject.start("stop@backward:1:6")
    subject.wait_for(lambda: subject.has_logged(5))
    started = time.monotonic()
    subject.end(process, 40)
    assert time.monotonic() - started < 6 + 10
    assert not subject.workers()
    assert subject.status["status"] == "crashed"
    message = subject.status["message"]
    assert "rank 1" in message.split("DEAD OR STOPPED")[0]
    assert "phase backward of step 6" in message.split("DEAD OR STOPPED")[1]


def test_a_full_disk_on_one_rank(
    make: MakeSubject, uninterrupted: Callable[[int], Subject]
) -> None:
    subject = make("--save_minutes=0")
    assert subject.run("full@save:1:9,readonly@before_rename:0:12") == 0
    said = subject.said()
    assert "no checkpoint of step 9: rank 1 cannot write" in said
    assert "No space left on device. The one before it is whole: it is of step 8" in said
    assert "no checkpoint of step 12: rank 0 cannot write" in said
    assert "Training goes on (--on_failed_save stop would end it)" in said
    assert_same(subject, uninterrupted(2))


def test_a_full_disk_that_ends_the_run(
    make: MakeSubject, uninterrupted: Callable[[int], Subject]
) -> None:
    subject = make("--save_minutes=0", "--on_failed_save=stop")
    assert subject.run("full@save:1:9") != 0
    assert subject.status["status"] == "io_error"
    assert "The run stops here" in subject.status["message"]
    names = {path.name for path in (subject.folder / "checkpoints").iterdir()}
    assert names == {"step-000007", "step-000008"}, "what was half written is gone"
    assert subject.run() == 0
    assert_same(subject, uninterrupted(2))


def test_out_of_memory_on_one_rank(make: MakeSubject) -> None:
    """In the first step: bit for bit the run that was started with smaller micro-batches."""
    small = make("--grad_accum=2", "--max_steps=20")
    assert small.run() == 0
    subject = make("--max_steps=20")
    assert subject.run("oom@forward:1:1") == 0, subject.said()
    assert "Out of memory in step 1: it is done again" in subject.said()
    ours, theirs = subject.result(), small.result()
    assert ours == theirs, [key for key in ours if ours[key] != theirs[key]]


@pytest.mark.parametrize("config", ["cpu2", "zero2"])
def test_out_of_memory_later(make: MakeSubject, in_fp32: Subject, config: str) -> None:
    """Twice, on different ranks, in forward and backward; then killed: the next start remembers."""
    subject = make("--precision=fp32", "--max_steps=30", config=config)
    assert subject.run("oom@backward:0:5,oom@forward:1:8,kill@data:0:20") != 0
    assert subject.said().count("it is done again with its rows in") == 2
    assert subject.run() == 0, subject.said()
    assert "Out of memory" not in subject.said()
    assert_close(subject, in_fp32)
    notes = json.loads(
        (subject.folder / "checkpoints" / "step-000030" / "progress.json").read_text()
    )
    assert notes["progress"]["split"] == 4
    assert notes["progress"]["overall"]["skipped"] == 0


def test_out_of_memory_where_ranks_cannot_meet_again(make: MakeSubject) -> None:
    """ZeRO-3 exchanges parameters in the forward pass: all ranks start again, in place.

    In the first step: bit for bit the run that was started with smaller micro-batches.
    """
    small = make("--grad_accum=2", "--max_steps=6", config="zero3")
    assert small.run() == 0
    subject = make("--max_steps=6", "--track=wandb", config="zero3")
    started = subject.start("oom@forward:1:1,stop@data:1:4")
    subject.wait_for(lambda: subject.stopped_ranks() == [1], 90)
    assert "all start again from the last checkpoint" in subject.said()
    for rank, worker in enumerate(subject.workers()):
        assert len(worker.children()) == (rank == 0), "W&B's process of before is gone"
        worker.send_signal(signal.SIGCONT)
    assert subject.end(started) == 0, subject.said()
    assert not list(subject.runs.glob("*.old-*")), "what was begun is not an earlier run"
    ours, theirs = subject.result(), small.result()
    assert ours == theirs, [key for key in ours if ours[key] != theirs[key]]


def test_out_of_memory_later_where_ranks_cannot_meet_again(
    make: MakeSubject, in_fp32: Subject
) -> None:
    """Twice, in the backward pass: what was done stays, the rest is cut smaller."""
    subject = make("--precision=fp32", "--max_steps=30", "--save_minutes=0", config="zero3")
    assert subject.run("oom@backward:0:6,oom@backward:1:9") == 0, subject.said()
    for step in (5, 8):
        assert f"Going on after step {step}," in subject.said()
    assert subject.steps() == [*range(1, 31)]
    assert_close(subject, in_fp32)
    notes = json.loads(
        (subject.folder / "checkpoints" / "step-000030" / "progress.json").read_text()
    )
    assert notes["progress"]["split"] == 4
    assert notes["progress"]["overall"]["rows"] == 30 * 16


def test_stopped_while_out_of_memory(make: MakeSubject, in_fp32: Subject) -> None:
    """The request reaches the processes that start again; the next start keeps the smaller cut."""
    subject = make("--precision=fp32", "--max_steps=30", "--save_minutes=0", config="zero3")
    assert subject.run("term@forward:1:6,oom@backward:1:6") != 0
    assert subject.status["status"] == "preempted", subject.said()
    assert subject.newest_step() == 5
    assert subject.run() == 0, subject.said()
    assert_close(subject, in_fp32)
    notes = json.loads(
        (subject.folder / "checkpoints" / "step-000030" / "progress.json").read_text()
    )
    assert notes["progress"]["split"] == 2


@pytest.mark.parametrize("config", ["cpu2", "zero3"])
def test_out_of_memory_with_single_reviews(make: MakeSubject, config: str) -> None:
    """Micro-batches of one review cannot be cut: the run ends, and says so."""
    subject = make("--grad_accum=8", "--max_steps=6", config=config)
    assert subject.run("oom@forward:1:2") != 0
    assert subject.status["status"] == "oom"
    assert "Smaller micro-batches do not help here" in subject.said()
    assert "all start again" not in subject.said()
    assert not subject.workers()


@pytest.mark.parametrize(
    "course",
    [
        [("cpu", 1), ("cpu2", 2), ("cpu2", 3), ("cpu", 1)],
        [("zero2", 2), ("zero3", 3), ("cpu", 1), ("zero1", 2), ("zero3", 2)],
    ],
)
def test_other_ranks_and_other_distributions(
    make: MakeSubject, in_fp32: Subject, course: list[tuple[str, int]]
) -> None:
    """Each start goes on from the last one's checkpoint under another launch config."""
    subject = make("--precision=fp32", "--max_steps=30", "--save_minutes=0")
    for number, (config, processes) in enumerate(course):
        subject.config, subject.processes = config, processes
        last = number == len(course) - 1
        code = subject.run("" if last else f"kill@data:{processes - 1}:{5 * number + 5}")
        assert (code == 0) == last, subject.said()
        done = 30 if last else 5 * number + 4
        assert subject.newest_step() == done, f"{config} did not get that far\n{subject.said()}"
    assert_close(subject, in_fp32)


@pytest.fixture(scope="module")
def in_fp32(make: MakeSubject) -> Subject:
    """A run that nothing happened to, on one process."""
    subject = make("--precision=fp32", "--max_steps=30", processes=1)
    assert subject.run() == 0, subject.said()
    return subject


def assert_close(subject: Subject, reference: Subject) -> None:
    """Compare steps and rates exactly, losses and weights up to rounding."""
    ours, theirs = subject.result()["journal"], reference.result()["journal"]
    names = ("kind", "step", "train/lr")
    assert [[r.get(n) for n in names] for r in ours] == [[r.get(n) for n in names] for r in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        if mine["kind"] == "train":
            assert mine["train/loss"] == pytest.approx(other["train/loss"], abs=1e-5)
    ours, theirs = (
        load_file(run.folder / "best" / "model.safetensors") for run in (subject, reference)
    )
    far = sum(float(((ours[key] - theirs[key]) ** 2).sum()) for key in theirs)
    assert (far / sum(float((theirs[key] ** 2).sum()) for key in theirs)) ** 0.5 < 1e-5
