"""What a run needs, before it is started: memory of each rank, and time of a step.

Measured by real steps where the device is at hand. For another one counted from the model and the rows:
parameters, what a forward pass keeps for the backward pass (here: a CPU's attention keeps weights, a
GPU's kernels do not), and how a step's rows are dealt to ranks. `python -m tests.bench.plan` holds it
against runs.
"""

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from toolkit.data.batches import make_batch
from toolkit.data.steps import cost, runs_within
from toolkit.engine.memory import forget_peak, peak_bytes
from toolkit.engine.step import Wants, train_step
from toolkit.engine.totals import Progress
from toolkit.engine.trainer import Trainer, deal_rows, deal_slots, summed_loss

FLOAT = 4
SAMPLE_STEPS = 20
TIMED_STEPS = 10
WARM_STEPS = 4
"""ZeRO-3 settles later than others do."""

Kind = Literal["replicas", "zero1", "zero2", "zero2_offload", "zero3"]


@dataclass(frozen=True)
class Activations:
    """Bytes that a micro-batch's forward pass keeps."""

    fixed: float
    """Whatever its size: copies of weights in the precision of the computation."""
    per_token: float

    def of(self, tokens: float) -> float:
        """Return the bytes for so many tokens, padding included."""
        return self.fixed + self.per_token * tokens

    def tokens_within(self, room: float) -> float:
        """Return the tokens that fit; 0 or less if not even the fixed part does."""
        return (room - self.fixed) / self.per_token


@dataclass(frozen=True)
class Work:
    """What the ranks do in a step, on average over a sample of steps."""

    busiest: float
    """Tokens of the busiest rank, padding included."""
    total: float
    """Tokens of all ranks."""
    largest: int
    """Of the largest micro-batch in the sample."""
    per_review: float
    """Tokens of a review, padding included."""


@dataclass(frozen=True)
class Rates:
    """How long a step takes on one device."""

    fixed: float
    """Seconds for what does not grow with the batch: the update, and launching the work."""
    per_token: float
    """Seconds."""
    source: str
    """Where they come from."""


def saved_bytes(compute: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    """Return the bytes that a forward pass keeps for the backward pass, besides the parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = compute()  # lives until its storages are counted: no address is used twice
    total = sum(kept.values())
    del result
    return total


def activations(trainer: Trainer) -> Activations:
    """Measure a micro-batch of one step and one of a quarter of its rows; draw the line."""
    trainer.model.train()  # with dropout's masks
    points = []
    for rows in (trainer.stream.batch_size, max(1, trainer.stream.batch_size // 4)):
        slots = trainer.stream.slots(0)[:rows]
        batch = deal_slots(trainer, slots)[0]
        kept = saved_bytes(partial(summed_loss, trainer, batch), trainer.model.parameters())
        points.append((batch.computed_tokens, kept))
    (many, much), (few, little) = points
    per_token = (much - little) / (many - few) if many > few else much / many
    return Activations(much - per_token * many, per_token)


def work(trainer: Trainer, world_size: int) -> Work:
    """Deal a sample of the run's steps to so many ranks, and look at the busiest."""
    steps = np.linspace(0, trainer.stream.num_steps - 1, SAMPLE_STEPS).astype(int)
    busiest, totals, largest, reviews = [], [], 0, 0
    for step in np.unique(steps):
        rows = trainer.stream.rows(trainer.stream.slots(int(step)))
        lengths = trainer.train.lengths(rows)
        dealt = deal_rows(trainer, rows, world_size)
        sizes = [[cost(lengths[places], trainer.padded) for places in rank] for rank in dealt]
        busiest.append(max(map(sum, sizes)))
        totals.append(sum(map(sum, sizes)))
        largest = max(largest, *(size for rank in sizes for size in rank))
        reviews += len(lengths)
    mean = statistics.mean
    return Work(mean(busiest), mean(totals), largest, sum(totals) / reviews)


def state_bytes(kind: Kind, parameters: int, ranks: int, *, on_cpu: bool) -> float:
    """Return what a rank keeps from step to step, gradients included, on its device.

    AdamW's two moments, a weight and a gradient for each parameter, all fp32. DeepSpeed keeps the
    weights that it updates apart from those that it computes with (0.19.8, `bf16_optimizer` is not
    used): stage 1 cuts those and the moments, stage 2 the gradients too, stage 3 everything. All gather
    gradients in a bucket of the model's size; stage 3 keeps models of this size gathered once it has.
    """
    whole = {"replicas": 4, "zero1": 3, "zero2": 2, "zero2_offload": 2, "zero3": 2}[kind]
    cut = {"replicas": 0, "zero1": 3, "zero2": 4, "zero2_offload": 1, "zero3": 5}[kind]
    # as measured (tests/bench/NOTES.md): stage 1 never touches its bucket, others leave copies behind
    if on_cpu:
        whole += {"zero1": -1, "zero2_offload": 1, "zero3": 1}.get(kind, 0)
        cut = 4 if kind == "zero2_offload" else cut  # it offloads to where it is
    return FLOAT * parameters * (whole + cut / ranks)


def measure(trainer: Trainer, standing: float) -> tuple[Rates, Activations]:
    """Run real steps of one process, of the run's largest micro-batch and of a quarter; draw the lines.

    Args:
        trainer: of the run.
        standing: bytes that this process has before its first forward pass, gradients included.

    Returns:
        The rates, and what the process's memory grew by: on a CPU that is more than what a forward
        pass keeps, because freed memory stays with the process, in pieces.
    """
    one = replace(trainer, spec=replace(trainer.spec, grad_accum=1, max_tokens=None))
    sizes = work(trainer, world_size=1)
    full = max(1, round(sizes.largest / sizes.per_review))
    few, short, little = _run_steps(one, max(1, full // 4))
    many, long, much = _run_steps(one, full)
    if many == few:
        few = short = little = 0
    per_token = max(0.0, (long - short) / (many - few))
    rates = Rates(max(0.0, long - per_token * many), per_token, "measured here")
    growth = max(1.0, (much - little) / (many - few))
    return rates, Activations(max(0.0, much - standing - growth * many), growth)


def step_seconds(trainer: Trainer) -> float:
    """Take a few steps of the run, on all ranks; return the median of their seconds."""
    return _run_steps(trainer, trainer.stream.batch_size)[1]


def measure_scoring(trainer: Trainer, eval_tokens: int, standing: float) -> float:
    """Score one micro-batch of the longest reviews; return what the process's memory grew by."""
    lengths = trainer.train.lengths(np.arange(len(trainer.train)))
    longest = np.argsort(-lengths, kind="stable")
    [(start, stop), *_] = runs_within(lengths[longest], eval_tokens, padded=trainer.padded)
    batch = make_batch(trainer.train, longest[start:stop], padded=trainer.padded)
    forget_peak(trainer.runtime.device)
    trainer.model.eval()
    with torch.no_grad():
        summed_loss(trainer, batch)
    return max(0.0, peak_bytes(trainer.runtime.device) - standing)


def _run_steps(trainer: Trainer, batch_size: int) -> tuple[float, float, float]:
    """Return the mean of the steps' tokens, the median of their seconds, the peak of the memory."""
    steps = WARM_STEPS + TIMED_STEPS  # and none is begun behind the last
    epochs = batch_size * steps  # enough, however few rows there are
    stream = replace(trainer.stream, batch_size=batch_size, epochs=epochs, max_steps=steps)
    smaller = replace(trainer, stream=stream)
    forget_peak(trainer.runtime.device)
    trainer.model.train()
    progress, seconds, before = Progress(), [], 0.0
    report = None
    for step in range(steps):
        if step == WARM_STEPS:
            before = progress.recent.computed_tokens
        started = time.perf_counter()
        report = train_step(smaller, progress, Wants(), report)
        seconds.append(time.perf_counter() - started)
    tokens = (progress.recent.computed_tokens - before) / TIMED_STEPS
    return tokens, statistics.median(seconds[WARM_STEPS:]), peak_bytes(trainer.runtime.device)


def stated(tflops: float, bandwidth_gb: float, flops_per_token: float, parameters: int) -> Rates:
    """Return rates that follow from a device's figures.

    Launching the work, which bounds small batches on a GPU, is not in them.

    Args:
        tflops: operations that training sustains, in 10^12 a second.
        bandwidth_gb: of the device's memory, in 10^9 bytes a second.
        flops_per_token: see `token_flops`.
        parameters: of the whole model; AdamW reads four numbers of each and writes three.
    """
    update = 7 * FLOAT * parameters / (bandwidth_gb * 1e9)
    source = f"stated: {tflops:g} TFLOP/s; small batches take longer, to launch their kernels"
    return Rates(update, flops_per_token / (tflops * 1e12), source)


def token_flops(
    layers: int, width: int, inner: int, offsets: np.ndarray, *, packed: bool = False
) -> float:
    """Return the operations that a token needs, forward and backward, in matrix products.

    6 for each weight of the encoder's linear layers, and 12 x features x length for attention, whose
    length is that of the token's own review.

    Args:
        layers: of the encoder.
        width: features of a token.
        inner: units of the feed-forward layers.
        offsets: (N + 1,) places that cut the split's tokens into reviews.
        packed: the last layer has keys and values of all tokens, the rest of first ones, next to none.
    """
    lengths = np.diff(offsets).astype(float)
    mean_length = float((lengths**2).sum() / lengths.sum())
    whole, keys_and_values = 4 * width * width + 2 * width * inner, 2 * width * width
    weights = (layers - packed) * whole + packed * keys_and_values
    return 6 * weights + 12 * (layers - packed) * width * mean_length


def communication_bytes(kind: Kind, parameters: int, ranks: int) -> float:
    """Return the bytes that a rank sends in a step of one micro-batch.

    A ring sum of gradients sends 2 (N - 1) / N of them (Patarasuk and Yuan, 2009); so do ZeRO 1 and
    2, in two halves; stage 3 gathers parameters for the backward pass once more (Rajbhandari et al.,
    2020: ZeRO).
    """
    rounds = 3 if kind == "zero3" else 2
    return FLOAT * parameters * rounds * (ranks - 1) / ranks
