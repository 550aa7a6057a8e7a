"""The benchmark's arithmetic: ratios are of one turn, and everything that was measured is shown."""

import json
import subprocess
import sys
import time
from argparse import Namespace
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tests.bench import __main__ as bench
from tests.bench import gpu, peers, report, scoring, steps
from tests.programs import ROOT
from tests.tiny import make_trainer
from toolkit.data.cache import TokenSplit
from toolkit.engine.timing import settled, sizes_of, time_steps
from toolkit.engine.trainer import micro_batches

RATES = {"fp32": 1e9, "bf16": 2e9, "bytes_per_s": 1e10}


def turn(ours: float, peer: float) -> report.Turn:
    """Make up a turn from two rates in tokens/s; ours takes half of the memory."""

    def figures(rate: float, peak: float) -> dict[str, float]:
        rates = {"reviews_per_s": rate / 100, "tokens_per_s": rate, "eval_reviews_per_s": rate / 50}
        return rates | {"loss": 0.5, "accuracy": 0.875, "padding": 0.25, "peak_MiB": peak}

    return {"ours": figures(ours, 500), "in_fp32": figures(peer, 1000)}


def summarize(turns: list[report.Turn]) -> dict[str, dict[str, dict[str, float]]]:
    flops = {"ours": 1e5, "theirs": 2e5}
    return report.summary(turns, RATES, flops, ("in_fp32",))["contenders"]


def test_ratios_are_of_one_turn() -> None:
    """A machine that is slow in one turn changes no ratio, as it would that of medians."""
    found = summarize([turn(4000, 2000), turn(300, 100), turn(8000, 1600)])["in_fp32"]
    assert found["ours / it, tokens_per_s"] == {"median": 3.0, "min": 2.0, "max": 5.0}
    assert found["ours / it, eval_reviews_per_s"] == {"median": 3.0, "min": 2.0, "max": 5.0}
    assert found["ours / it, peak_MiB"] == {"median": 0.5, "min": 0.5, "max": 0.5}


@pytest.mark.parametrize("count", [2, 3, 6])
def test_nobody_always_comes_after_the_same_other(count: int) -> None:
    names = [str(number) for number in range(count)]
    turns = [report.order(names, turn) for turn in range(2 * count)]
    assert all(sorted(turn) == names for turn in turns)
    assert {turn[0] for turn in turns} == set(names)
    for one, next_one in zip(turns[::2], turns[1::2], strict=True):
        assert not set(pairwise(one)) & set(pairwise(next_one))


def test_share_is_of_what_one_does_at_the_rate_of_its_precision() -> None:
    found = summarize([turn(4000, 2000)])
    assert found["ours"]["share"]["median"] == pytest.approx(4000 * 1e5 / 2e9)
    assert found["in_fp32"]["share"]["median"] == pytest.approx(2000 * 2e5 / 1e9)


def test_all_figures_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    report.show({"contenders": summarize([turn(4000, 2000), turn(300, 100)])})
    lines = capsys.readouterr().out.splitlines()
    for title in [*report.FIGURES.values(), *report.RATIOS.values()]:
        assert any(title in line for line in lines), f"{title} is not a column"
    [ours] = [line for line in lines if line.startswith("ours ") and "over" not in line]
    assert "2,150 (300 to 4,000)" in ours
    peer, ratio = (line for line in lines if line.startswith("in_fp32"))
    assert "0.25 (0.25 to 0.25)" in peer, "the share of padding"
    assert "2.5 (2 to 3)" in ratio


@pytest.mark.parametrize(("rows", "every"), [(480, 5), (192, 4), (112, 1), (80, 1), (32, 1)])
def test_the_second_epoch_counts_whole_and_alone(rows: int, every: int) -> None:
    """The log of a run whose steps take 1, 2, 3 ... s, a line 0.25 s, and what follows an epoch 100 s."""
    assert report.log_every(rows, 16) == every
    steps_an_epoch, clock, since, lines = rows // 16, 0.0, 0.0, []
    for step in range(1, 2 * steps_an_epoch + 1):
        clock, since = clock + step, since + step
        if step % every == 0:
            clock += 0.25
            rate = every * 16 / since
            figures = {"train/reviews_per_s": rate, "train/loss": step, "train/padding": 0.5}
            lines.append({"step": step, "time": clock} | figures)
            since = 0.0
        if step % steps_an_epoch == 0:
            clock += 100
    of_second = range(steps_an_epoch + 1, 2 * steps_an_epoch + 1)
    found = bench.second_epoch(lines, rows, 16)
    assert found["seconds"] == pytest.approx(sum(of_second) + 0.25 * steps_an_epoch / every)
    assert found["loss"] > steps_an_epoch
    assert found["padding"] == 0.5


def test_epochs_have_the_same_steps(capsys: pytest.CaptureFixture[str]) -> None:
    for rows in ("100", "16"):
        with pytest.raises(SystemExit):
            bench.main([f"--rows={rows}"])
        assert f"--rows got {rows}, allowed are multiples of --batch_size 16, 32 or more" in (
            capsys.readouterr().err
        )


def test_steps_count_when_their_sizes_were_met(split: TokenSplit, tiny_encoder: Path) -> None:
    settings = {"batch_size": 24, "max_steps": 15, "grad_accum": 2, "epochs": 9.0}
    trainer = make_trainer(split, tiny_encoder, **settings)
    every = [
        [(b.computed_tokens, len(b.bounds)) for b in micro_batches(trainer, step)]
        for step in range(15)
    ]
    met, counted = Counter[tuple[int, ...]](), 0
    for now, following in pairwise(every):
        counted += all(met[size] >= 2 for size in now + following)
        met.update(now)
    times = time_steps(trainer, settled(sizes_of(trainer, 15)))
    assert 0 < counted < 13
    assert len(times.seconds) == len(times.tokens) == counted
    assert set(times.tokens) <= {sum(tokens for tokens, _ in size) for size in every}


@pytest.mark.parametrize("name", ["ours", "trainer_best"])
def test_step_times_are_shown(
    name: str, split: TokenSplit, tiny_encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measure = steps.measure_ours if name == "ours" else steps.measure_peer
    measure(name, [12, 8], 16, tiny_encoder, split)
    printed = capsys.readouterr().out.splitlines()  # the Trainer's own lines, too
    lines = [json.loads(line) for line in printed if line.startswith('{"contender"')]
    assert [(line["contender"], line["batch_size"]) for line in lines] == [(name, 12), (name, 8)]
    for line in lines:
        expected = line["batch_size"] * 1e3 / line["step_ms"]
        assert line["reviews_per_s"] == pytest.approx(expected, rel=1e-3)


def test_a_trace_is_of_the_last_size(
    split: TokenSplit, tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.json"
    steps.measure_ours("ours", [12, 8], 16, tiny_encoder, split, trace)
    events = json.loads(trace.read_text())["traceEvents"]
    names = Counter(event.get("name") for event in events)
    assert names["Optimizer.step#AdamW.step"] == steps.PROFILED


@pytest.mark.parametrize(("name", "at_once"), [("ours", "4096 tokens"), ("trainer_best", "3 rows")])
def test_passes_are_shown(
    name: str,
    at_once: str,
    split: TokenSplit,
    tiny_encoder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(scoring, "make_split", lambda _, rows: steps.first_rows(split, rows))
    flags = ["--rows=30", "--passes=2", "--eval_batch=3", f"--encoder={tiny_encoder}"]
    scoring.main([name, *flags])
    printed = capsys.readouterr().out.splitlines()
    lines = [json.loads(line) for line in printed if line.startswith('{"contender"')]
    assert [(line["contender"], line["at_once"]) for line in lines] == [(name, at_once)] * 2
    for line in lines:
        assert line["reviews_per_s"] == pytest.approx(30 / line["seconds"], rel=1e-2)


def test_a_peers_step_is_one_of_those_of_its_second_epoch(
    split: TokenSplit, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(steps.PEERS, "trainer_best", lambda *_: {"seconds": 5.0, "padding": 0.25})
    steps.measure_peer("trainer_best", [12], 10, Path(), split)
    shown = json.loads(capsys.readouterr().out)
    assert (shown["step_ms"], shown["reviews_per_s"], shown["padding"]) == (500, 24, 0.25)


@pytest.mark.parametrize(("name", "sorts"), [("trainer_best", True), ("trainer_dynamic", False)])
def test_a_peer_sorts_by_length_in_evaluation_too(
    name: str, sorts: bool, split: TokenSplit, tiny_encoder: Path, tmp_path: Path
) -> None:
    """As in epochs of 50 batches; without it, its evaluation would be a third as fast."""
    options = Namespace(folder=tmp_path, lr=5e-5, batch_size=4, eval_batch=4, seed=0, max_length=64)
    rows = peers.rows_of(split)
    peer = peers.make_trainer(tiny_encoder, rows, options, **peers.TRAINERS[name](options))
    for sampler in (peer._get_train_sampler(), peer._get_eval_sampler(rows)):
        order = list(sampler)
        assert sorted(order) == list(range(len(rows)))
        lengths = np.array([len(rows[place]["input_ids"]) for place in order[: len(rows) // 4 * 4]])
        padded = int((4 * lengths.reshape(-1, 4).max(1)).sum())
        assert (padded < 1.1 * lengths.sum()) == sorts


@pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux tells a process of its parent's end"
)
def test_a_killed_benchmark_leaves_nobody(tmp_path: Path) -> None:
    """What it had started would go on to compute beside the next one."""
    note = tmp_path / "pid"
    child = f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    code = f"from tests.programs import run_for_peak; run_for_peak('-c', {child!r})"
    bench = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    while not (note.exists() and note.read_text()):
        assert bench.poll() is None
        time.sleep(0.05)
    bench.kill()
    bench.wait()
    for _ in range(200):
        if not Path("/proc", note.read_text()).exists():
            return
        time.sleep(0.05)
    pytest.fail("it is still there")


def test_a_part_that_fails_keeps_no_other_from_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise subprocess.CalledProcessError(1, "tests", stderr="why it failed")

    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu.torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(gpu, "PARTS", {"tests": fail, "plan": lambda: print("planned")})
    with pytest.raises(SystemExit, match="failed: tests"):
        gpu.main([])
    assert capsys.readouterr().out.splitlines()[1:] == ["why it failed", "planned"]
    with pytest.raises(SystemExit):
        gpu.main(["plans"])
    assert "got plans, allowed are tests, plan" in capsys.readouterr().err
