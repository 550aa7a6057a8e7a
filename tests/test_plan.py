"""What is planned follows from counts that can be checked, and fits what a run then takes."""

import re
import time
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import yaml

from tests.bench.plan import planned
from tests.programs import TRAIN, launcher, run_for_peak, run_python
from tests.tiny import make_trainer
from toolkit import plan as plan_module
from toolkit import ranks as ranks_module
from toolkit.data.cache import TokenSplit
from toolkit.data.steps import Stream
from toolkit.engine import estimate, memory, timing
from toolkit.engine.estimate import Activations, Rates
from toolkit.engine.optim import OptimSpec
from toolkit.engine.trainer import LoopSpec, Trainer, deal_slots, summed_loss
from toolkit.plan import main
from toolkit.ranks import RanksError


def test_what_a_forward_pass_keeps() -> None:
    """Two inputs of a product are kept, the parameter is not counted, a shared storage is once."""
    weight = torch.ones(100, 50, requires_grad=True)
    x = torch.ones(8, 100)

    def compute() -> torch.Tensor:
        hidden = x @ weight  # keeps x, and the weight
        return (hidden.exp() * hidden).sum()  # exp keeps its result, the product both

    assert estimate.saved_bytes(compute, [weight]) == 4 * (8 * 100 + 8 * 50 + 8 * 50)


def test_activations_are_those_of_training(split: TokenSplit, tiny_encoder: Path) -> None:
    """With dropout's masks, though a model that was just loaded drops nothing."""
    trainer = make_trainer(split, tiny_encoder)
    batch = deal_slots(trainer, trainer.stream.slots(0))[0]
    expected = [
        estimate.saved_bytes(
            partial(summed_loss, trainer, batch), trainer.model.train(training).parameters()
        )
        for training in (True, False)
    ]
    assert expected[0] > 1.1 * expected[1]
    assert estimate.activations(trainer).of(batch.computed_tokens) == pytest.approx(expected[0])


def test_a_run_without_a_step_is_refused(
    tiny_flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before any launch config is timed."""
    monkeypatch.setattr(plan_module, "ask", None)
    assert main([*tiny_flags, "--epochs=0.001"]) == 3
    assert "not one step" in capsys.readouterr().err


def test_state_of_each_distribution() -> None:
    """Each cut divides by the ranks, and with one rank there is nothing to gain."""
    four = {
        kind: estimate.state_bytes(kind, 1000, 4, on_cpu=False)
        for kind in ("replicas", "zero1", "zero2", "zero2_offload", "zero3")
    }
    assert four == {
        "replicas": 16_000,
        "zero1": 12_000 + 12_000 / 4,
        "zero2": 8_000 + 16_000 / 4,
        "zero2_offload": 8_000 + 4_000 / 4,
        "zero3": 8_000 + 20_000 / 4,
    }
    assert estimate.state_bytes("zero1", 1000, 4, on_cpu=True) == 8_000 + 12_000 / 4
    assert estimate.state_bytes("zero2_offload", 1000, 4, on_cpu=True) == 12_000 + 16_000 / 4


def test_what_fits() -> None:
    kept = Activations(fixed=100.0, per_token=10.0)
    assert kept.of(7) == 170
    assert kept.tokens_within(170) == 7
    assert kept.tokens_within(90) < 0


def test_stated_rates() -> None:
    """BERT-base at Amazon Polarity's lengths: 6 for each weight of its linear layers, and attention's."""
    offsets = np.array([0, 130, 260])
    flops = estimate.token_flops(12, 768, 3072, offsets)
    assert flops == pytest.approx(524e6, rel=0.001)
    packed = estimate.token_flops(12, 768, 3072, offsets, packed=True)
    last = 6 * (4 * 768 * 768 + 2 * 768 * 3072) + 12 * 768 * 130
    assert flops - packed == pytest.approx(last - 6 * 2 * 768 * 768)
    rates = estimate.stated(300, 2000, flops, 110_000_000)
    assert rates.per_token == pytest.approx(524e6 / 300e12, rel=0.001)
    assert rates.fixed == pytest.approx(28 * 110e6 / 2e12)


def test_what_ranks_send() -> None:
    """ZeRO-2 and 3 cut gradients, so they cannot wait for the last micro-batch."""
    once = 4 * 110e6 * 2 * 7 / 8
    sent = partial(estimate.communication_bytes, parameters=110_000_000, micro_batches=3)
    kinds: tuple[estimate.Kind, ...] = ("replicas", "zero1", "zero2", "zero2_offload", "zero3")
    found = {kind: sent(kind, ranks=8) / once for kind in kinds}
    assert found == {"replicas": 1, "zero1": 1.5, "zero2": 3.5, "zero2_offload": 3.5, "zero3": 3}
    assert sent("replicas", ranks=1) == 0


def test_memory_is_as_planned(tmp_path: Path, shared_cache: Path) -> None:
    """Of a run with one process and with two, long enough that memory no longer creeps up."""
    flags = [f"--cache_dir={shared_cache}", "--head=v2", "--batch_size=32", "--max_steps=30"]
    flags += ["--train_rows=500", "--test_rows=64", "--validation_rows=64", "--cpu_threads=1"]
    plan = planned([*flags, "--launches=ddp"])
    assert set(plan) == {"cpu", "cpu2"}
    for processes, name in ((1, "cpu"), (2, "cpu2")):
        place = [f"--output_dir={tmp_path}", f"--run_id={name}", "--track=none"]
        peak, _ = run_for_peak(*launcher(processes), TRAIN, *flags, *place)
        assert plan[name][0] == pytest.approx(peak, rel=0.15), name


def test_where_the_kernel_tells_no_peak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some sandboxes' does not: a run must not fail of that at its end."""
    cpu = torch.device("cpu")
    usual = memory.peak_bytes(cpu)
    monkeypatch.setattr(memory, "STATUS", tmp_path / "status")
    memory.STATUS.write_text("Name: python\nVmRSS: 1 kB\n")
    assert memory.peak_bytes(cpu) == pytest.approx(usual, rel=0.5)


def test_a_peak_is_not_that_of_the_process_before() -> None:
    """Linux hands it down: a run that a large notebook starts would seem as large as the notebook."""
    bytearray(2**30)  # touched, and given back at once
    code = "import torch; from toolkit.engine.memory import peak_bytes"
    code += "; print(peak_bytes(torch.device('cpu')))"
    of_the_child, said = run_for_peak("-c", code)
    assert 2**26 < of_the_child < 2**30
    done = run_python("-c", code)
    assert int(said) == pytest.approx(int(done.stdout), rel=0.1), (
        "and the run says the same of itself"
    )


def test_steps_are_timed_with_the_ranks_that_were_asked_for(
    tiny_flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under the real launcher, of this very run; where that fails, the plan says why and counts."""
    asked: list[tuple[Any, ...]] = []

    def ask(program: Path, launch: Path, ranks: int, *flags: str, seconds: float) -> dict[str, Any]:
        asked.append((launch.stem, ranks, flags))
        if launch.stem == "zero3":
            raise RanksError("the ranks fell out")
        return ranks_module.ask(program, launch, ranks, *flags, seconds=seconds)

    monkeypatch.setattr(plan_module, "ask", ask)
    assert main([*tiny_flags, "--launches", "ddp,zero2,zero3"]) == 0
    said = capsys.readouterr().out
    assert asked == [(name, 2, tuple(tiny_flags)) for name in ("cpu2", "zero2", "zero3")]
    steps = dict(re.findall(r"^(\w+)\.yaml .* ([\d.]+ ms.)", said, re.MULTILINE))
    assert {name: step[-1] for name, step in steps.items()} == {
        "cpu": " ",
        "cpu2": " ",
        "zero2": " ",
        "zero3": "*",
    }
    assert all(float(step.split()[0]) > 0 for step in steps.values())
    assert "not timed: the ranks fell out" in said
    assert "* counted, not timed" in said


@pytest.mark.parametrize(("precision", "batching"), [("bf16", "packed"), ("fp32", "padded")])
def test_a_stated_rate_starts_nothing(
    precision: str,
    batching: str,
    tiny_flags: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of a device that is not here, so how much fits into it is not known either."""
    monkeypatch.setattr(plan_module, "ask", None)
    flags = [*tiny_flags, f"--precision={precision}", "--num-processes", "4", "--link-gb=1"]
    assert main([*flags, "--tflops=1e-3"]) == 0
    said = capsys.readouterr().out
    assert f"steps of 16, {batching};" in said, "as a GPU takes them"
    rows = [line for line in said.splitlines() if ".yaml" in line]
    assert [row.split()[:2] for row in rows] == [
        ["gpu.yaml", "1"],
        *([f"{name}.yaml", "4"] for name in plan_module.LAUNCHES),
    ]
    assert all(row.split()[3] == "any" for row in rows)
    assert "as if they took no time" not in said
    assert "ms*" in rows[1]


def test_a_sweep_costs_what_its_own_runs_do(
    tiny_flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With the flags that were given, but for those that it varies; of one machine, if that is a CPU."""
    monkeypatch.setattr(plan_module, "rehearse", lambda *_: {})
    measure, rates = estimate.measure, Rates(1.0, 0.001, 0.0, "made up")
    monkeypatch.setattr(estimate, "measure", lambda *given: (rates, measure(*given)[1]))
    found: list[Any] = []
    plain = plan_module.costs

    def costs(runs: list[Any], rate: float) -> list[Any]:
        found[:] = [(run.config.head, run.config.lr, run.config.train_rows) for run in runs]
        return plain(runs, rate)

    monkeypatch.setattr(plan_module, "costs", costs)
    sweep = tmp_path / "sweep.yaml"
    parameters = {"head": {"values": ["v2", "v3"]}, "lr": {"value": 1e-3}}
    parameters |= {"batch_size": {"values": [8]}}
    sweep.write_text(
        yaml.safe_dump({"program": "toolkit/train.py", "method": "grid", "parameters": parameters})
    )
    flags = [*tiny_flags, "--lr", "1e-4", "--train_rows=64", "--launches=ddp"]
    flags += ["--head=v1", "--price=3600000", f"--sweep={sweep}"]
    assert main(flags) == 0
    assert found == [("v2", 1e-4, 64), ("v3", 1e-4, 64)]
    said = capsys.readouterr().out
    assert "2 runs" in said
    assert "whose batch_size is 16: runs with 8 take another" in said
    assert "whose encoder" not in said
    steps, number = re.findall(r"([\d.]+) ms", said), re.search(r"(\d+) steps of", said)
    prices = re.findall(r"^cpu2?.yaml .* ([\d.]+)$", said, re.MULTILINE)
    assert number
    for price, milliseconds in zip(prices, steps[-2:], strict=True):
        training = int(number[1]) * float(milliseconds)
        assert training < float(price) < 2 * training, "scoring included, and one machine paid for"


def test_a_compiled_run_has_no_zero_to_plan(
    tiny_flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*tiny_flags, "--tflops=1", "--compile", "--precision=bf16"]
    assert main(flags) == 0
    said = capsys.readouterr().out
    assert re.findall(r"^(\w+)\.yaml", said, re.MULTILINE) == ["gpu", "ddp"]
    assert "as if they took no time: --link_gb" in said
    assert "DeepSpeed runs no compiled model" in said


def test_a_device_that_is_not_here_gets_its_own_micro_batches(
    tiny_flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not those that a CPU's caches want, of at most 8,192 tokens."""
    monkeypatch.setattr("toolkit.build.training_tokens", lambda config, runtime: 64)
    grounds: list[plan_module.Ground] = []
    monkeypatch.setattr(plan_module, "report", lambda *given: grounds.append(given[2]))
    assert main([*tiny_flags, "--tflops=1"]) == main([*tiny_flags, "--tflops=1", "--max_tokens=80"])
    whole, cut = (estimate.work(ground.trainer, 1) for ground in grounds)
    assert whole.largest >= whole.busiest > 64, "one for the whole step"
    assert cut.largest <= 80


@pytest.mark.parametrize("flags", [{"grad_accum": 4}, {"max_tokens": 200}, {}])
def test_memory_follows_the_micro_batch(
    flags: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time and memory are measured on micro-batches of the run's own size, and on smaller ones."""
    tokens = np.zeros(6400, np.uint16)
    rows = np.arange(640)
    split = TokenSplit(tokens, np.arange(641) * 10, (rows % 2).astype(np.uint8), rows)
    stream = Stream(num_rows=640, batch_size=64, epochs=1, seed=0)
    trainer = Trainer(*(cast(Any, None),) * 3, split, stream, False, LoopSpec(**flags), OptimSpec())

    def steps(one: Trainer, rows: int, compiled: bool) -> timing.Steps:
        assert compiled
        number = estimate.work(one, 1).num_micro_batches if rows == 64 else 1
        if one is not trainer:
            assert (one.spec.grad_accum, one.spec.max_tokens) == (1, None)
        seconds = 0.2 + 0.3 * number + 10 * rows * 0.001
        return timing.Steps(10.0 * rows, seconds, 7_000 + 300 + 10 * rows * 50)

    monkeypatch.setattr(estimate, "run_steps", steps)
    rates, kept = estimate.measure(trainer, standing=7_000, compiled=True)
    assert rates.fixed == pytest.approx(0.5)
    assert rates.per_token == pytest.approx(0.001)
    assert rates.launching == pytest.approx(0.3 if flags else 0)
    work = estimate.work(trainer, 1)
    expected = {"grad_accum": (4, 160), "max_tokens": (4, 160)}.get("".join(flags), (1, 640))
    assert (work.num_micro_batches, work.largest) == expected
    assert rates.seconds(work.total, work.num_micro_batches) == pytest.approx(
        0.2 + 0.3 * work.num_micro_batches + 0.64
    )
    assert kept.of(work.largest) == pytest.approx(300 + work.largest * 50)


def test_what_does_not_fit_whole_is_not_measured_cut(
    split: TokenSplit, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU that is too small does a step in pieces: its peak would be that of a larger one."""
    trainer = make_trainer(split, tiny_encoder, batch_size=64)
    asked: list[int] = []

    def loss(one: Trainer, batch: Any) -> torch.Tensor:
        if len(batch.rows) > 20:
            raise torch.OutOfMemoryError
        return summed_loss(one, batch)

    def steps(one: Trainer, rows: int, compiled: bool) -> timing.Steps:
        asked.append(rows)
        found = timing.run_steps(one, rows, compiled)
        assert (found.split > 1) == (rows > 20)
        return found._replace(peak=1000 + 50 * found.tokens)

    monkeypatch.setattr("toolkit.engine.step.summed_loss", loss)
    monkeypatch.setattr(estimate, "run_steps", steps)
    _, kept = estimate.measure(trainer, standing=1000, compiled=False)
    whole = asked[1]
    assert 60 < whole < 80
    assert asked == [whole // 4, whole, whole // 8, whole // 2, whole // 16, whole // 4]
    assert kept.per_token == pytest.approx(50)
    assert kept.fixed == pytest.approx(0, abs=1)


def test_single_reviews_are_planned_like_several(split: TokenSplit, tiny_encoder: Path) -> None:
    """What a review needs does not depend on how many are asked for."""
    found = [
        estimate.activations(make_trainer(split, tiny_encoder, batch_size=size)) for size in (1, 16)
    ]
    assert found[0] == found[1]


def test_memory_of_a_container_or_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "GROUPS", tmp_path)
    monkeypatch.setattr(memory, "OWN_GROUP", tmp_path / "cgroup")
    machine = memory.usable_bytes()
    (tmp_path / "cgroup").write_text("1:cpu:/\n0::/job_7/step_0\n")
    (tmp_path / "job_7" / "step_0").mkdir(parents=True)
    assert memory.usable_bytes() == machine
    (tmp_path / "job_7" / "step_0" / "memory.max").write_text("max\n")
    (tmp_path / "job_7" / "memory.max").write_text(f"{2**28}\n")
    assert memory.usable_bytes() == 2**28 < machine


def test_activations_with_micro_batches(split: TokenSplit, tiny_encoder: Path) -> None:
    """The line is drawn through the run's own size and a quarter of that, not twice the same."""
    whole = make_trainer(split, tiny_encoder)
    cut = make_trainer(split, tiny_encoder, grad_accum=4)
    [batch] = deal_slots(whole, whole.stream.slots(0))
    size = estimate.work(cut, 1).largest
    assert size < batch.computed_tokens / 3
    assert estimate.activations(cut).of(size) == pytest.approx(
        estimate.activations(whole).of(size), rel=0.1
    )


def test_compiled_steps_count_once_their_sizes_were_met() -> None:
    """A GPU begins the next step, too, and a size is run, then captured, then replayed."""
    a, b = [(64, 9)], [(80, 9)]
    assert timing.settled([a, a, a, a, b]) == [False, False, True, False, False]
    assert timing.settled([a, b, a, b, b, a, b]) == [False] * 4 + [True, True, False]
    both = [*a, *b]
    assert timing.settled([a, a, both, both, both, a]) == [False] * 4 + [True, False]


def test_all_ranks_time_the_same_steps(
    split: TokenSplit, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else one of them would wait for the others for ever."""
    trainer = make_trainer(split, tiny_encoder, max_steps=60)
    alone = timing.first_settled(trainer)
    other = [step % 2 == 0 for step in range(60)]  # what another rank has settled
    monkeypatch.setattr(trainer.runtime, "world_size", 2)
    monkeypatch.setattr(trainer.runtime, "sum", lambda here: here + torch.tensor(other).float())
    monkeypatch.setattr(timing, "sizes_of", lambda *_: [[(64, 9)]] * 60)
    counts = timing.first_settled(trainer)
    assert [step for step, counted in enumerate(counts) if counted] == [*range(2, 22, 2)]
    assert len(alone) != len(counts) == 22


def test_timed_steps_of_a_compiled_model_are_replays(
    split: TokenSplit, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever their number: the median of the first would be of steps that capture."""
    trainer = make_trainer(split, tiny_encoder)
    taken: list[int] = []
    clock = 0.0

    def step(smaller: Trainer, progress: Any, *_: Any) -> None:
        nonlocal clock
        [size] = timing.sizes_of(smaller, progress.step + 1)[-1]
        new = taken.count(size[0]) < timing.MET
        taken.append(size[0])
        clock += 7.0 if new else 0.5
        progress.recent.computed_tokens += size[0]
        progress.step += 1

    monkeypatch.setattr(timing, "train_step", step)
    monkeypatch.setattr(time, "perf_counter", lambda: clock)
    tokens, seconds, *_ = timing.run_steps(trainer, 4, compiled=True)
    assert seconds == 0.5
    assert timing.WARM_STEPS + timing.TIMED_STEPS < len(taken) < timing.MOST_STEPS
    assert min(taken) < tokens < max(taken)
    replays = [taken[:place].count(size) >= timing.MET for place, size in enumerate(taken)]
    assert sum(replays) >= timing.TIMED_STEPS
    taken.clear()
    timing.run_steps(trainer, 4, compiled=False)
    assert len(taken) == timing.WARM_STEPS + timing.TIMED_STEPS


def test_what_a_gpu_does_not_compile_is_named(
    tiny_flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*tiny_flags, "--tflops=1", "--compile", "--precision=fp32"]) == 2
    assert (
        "(here: cpu, fp32): set precision to bf16, or leave out compile" in capsys.readouterr().err
    )


def test_wrong_flags_are_named_together(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--tflops=0", "--launches=gpu", "--sweep=nowhere.yaml", "--batch_sise=3"]
    assert main(flags) == 2
    said = capsys.readouterr().err
    assert "4 problems" in said
    for part in (
        "--tflops got 0, allowed is more than 0",
        "--launches got 'gpu', allowed are ddp,zero1",
        "nowhere.yaml, which is no",
        "batch_sise",
    ):
        assert part in said
