"""What a run needs, before it is started: memory of each rank, and time of a step.

Measured by real steps where the device is at hand. For another one counted from the model and the rows:
parameters, what a forward pass keeps for the backward pass (here: a CPU's attention keeps weights, a
GPU's kernels do not), and how a step's rows are dealt to ranks. `python -m tests.bench.plan` holds it
against runs.
"""

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from toolkit.data.batches import make_batch
from toolkit.data.steps import Stream, cost, runs_within
from toolkit.engine.memory import forget_peak, peak_bytes
from toolkit.engine.timing import Steps, run_steps
from toolkit.engine.trainer import Trainer, deal_rows, deal_slots, summed_loss

FLOAT = 4
SAMPLE_STEPS = 20
LINE_ROWS = 16
"""A line is drawn through micro-batches of at least so many rows and of a quarter: two sizes of packs."""

Point = tuple[float, float]
Kind = Literal["replicas", "zero1", "zero2", "zero2_offload", "zero3"]
KEPT: dict[Kind, tuple[int, int]] = {
    "replicas": (4, 0),
    "zero1": (3, 3),
    "zero2": (2, 4),
    "zero2_offload": (2, 1),
    "zero3": (2, 5),
}
"""Numbers that a rank keeps for each parameter, of all and of its share; see `state_bytes`."""
KEPT_ON_CPU = KEPT | {"zero1": (2, 3), "zero2_offload": (3, 4), "zero3": (3, 5)}
"""As measured (tests/bench/NOTES.md): stage 1 never touches its bucket, others leave copies behind; what
is offloaded stays where it is."""


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
    num_micro_batches: float
    """Of each rank."""


@dataclass(frozen=True)
class Rates:
    """How long a step takes on one device."""

    fixed: float
    """Seconds for what does not grow with the batch: the update, and launching one micro-batch."""
    per_token: float
    """Seconds."""
    launching: float
    """Seconds that each further micro-batch takes besides its tokens."""
    source: str
    """Where they come from."""

    def seconds(self, tokens: float, micro_batches: float) -> float:
        """Return the seconds of a step."""
        return self.fixed + self.launching * (micro_batches - 1) + self.per_token * tokens


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
    """Measure a micro-batch of the run's size and one of a quarter of its rows; draw the line."""
    trainer.model.train()  # with dropout's masks
    trainer = replace(trainer, stream=_for_a_line(trainer.stream))
    slots = trainer.stream.slots(0)
    full = max(LINE_ROWS, len(deal_slots(trainer, slots)[0].rows))
    one = in_one_piece(trainer)
    points = []
    for rows in (full, full // 4):
        [batch] = deal_slots(one, slots[:rows])
        kept = saved_bytes(partial(summed_loss, trainer, batch), trainer.model.parameters())
        points.append((batch.computed_tokens, kept))
    many, few = points
    return Activations(*_line(few, many))


def _line(few: Point, many: Point, least: float = 0.0) -> tuple[float, float]:
    """Return where the line through two points begins, not below 0, and its slope, not below `least`."""
    slope = max(least, (many[1] - few[1]) / (many[0] - few[0]))
    return max(0.0, many[1] - slope * many[0]), slope


def in_one_piece(trainer: Trainer) -> Trainer:
    """Return the same with whole steps as micro-batches."""
    return replace(trainer, spec=replace(trainer.spec, grad_accum=1, max_tokens=None))


def work(trainer: Trainer, world_size: int) -> Work:
    """Deal a sample of the run's steps to so many ranks, and look at the busiest."""
    steps = np.linspace(0, trainer.stream.num_steps - 1, SAMPLE_STEPS).astype(int)
    busiest, totals, largest, reviews, micro_batches = [], [], 0, 0, []
    for step in np.unique(steps):
        rows = trainer.stream.rows(trainer.stream.slots(int(step)))
        lengths = trainer.train.lengths(rows)
        dealt = deal_rows(trainer, rows, world_size)
        sizes = [
            [cost(lengths[places], padded=trainer.padded) for places in rank] for rank in dealt
        ]
        busiest.append(max(map(sum, sizes)))
        totals.append(sum(map(sum, sizes)))
        largest = max(largest, *(size for rank in sizes for size in rank))
        reviews += len(lengths)
        micro_batches.append(len(dealt[0]))  # all ranks have as many
    mean = statistics.mean
    return Work(mean(busiest), mean(totals), largest, sum(totals) / reviews, mean(micro_batches))


def state_bytes(kind: Kind, parameters: int, ranks: int, *, on_cpu: bool) -> float:
    """Return what a rank keeps from step to step, gradients included, on its device.

    AdamW's two moments, a weight and a gradient for each parameter, all fp32. DeepSpeed keeps the
    weights that it updates apart from those that it computes with (0.19.8, `bf16_optimizer` is not
    used): stage 1 cuts those and the moments, stage 2 the gradients too, stage 3 everything. All gather
    gradients in a bucket of the model's size; stage 3 keeps models of this size gathered
    from the forward to the backward pass.
    """
    whole, cut = (KEPT_ON_CPU if on_cpu else KEPT)[kind]
    return FLOAT * parameters * (whole + cut / ranks)


def measure(trainer: Trainer, standing: float, compiled: bool) -> tuple[Rates, Activations]:
    """Run real steps of one process, of the run's largest micro-batch and of a quarter; draw the lines.

    Args:
        trainer: of the run.
        standing: bytes that this process has before its first forward pass, gradients included.
        compiled: the model is.

    Returns:
        The rates, and what the process's memory grew by: on a CPU that is more than what a forward
        pass keeps, because freed memory stays with the process, in pieces.
    """
    sizes = work(trainer, world_size=1)
    rows = max(LINE_ROWS, round(sizes.largest / sizes.per_review))
    few, many = _two_sizes(in_one_piece(trainer), rows, compiled)
    fixed, per_token = _line((few.tokens, few.seconds), (many.tokens, many.seconds))
    launching = 0.0
    if sizes.num_micro_batches > 1:
        whole = run_steps(trainer, trainer.stream.batch_size, compiled)
        each = (whole.seconds - fixed - per_token * whole.tokens) / (sizes.num_micro_batches - 1)
        launching = min(fixed, max(0.0, each))
    grown, more = few.peak - standing, many.peak - standing
    kept = Activations(*_line((few.tokens, grown), (many.tokens, more), least=1.0))
    return Rates(fixed, per_token, launching, "measured here"), kept


def _two_sizes(one: Trainer, rows: int, compiled: bool) -> tuple[Steps, Steps]:
    """Time steps of a quarter of these rows, and of all or, if they do not fit, of as many as do."""
    while True:
        few, many = (run_steps(one, count, compiled) for count in (rows // 4, rows))
        if many.split == 1 or rows < 8:
            return few, many
        # steps that were cut smaller say neither what a whole one takes nor what it needs
        rows //= 2


def _for_a_line(stream: Stream) -> Stream:
    """Return the same with enough rows in a step, however few there are."""
    rows = max(LINE_ROWS, stream.batch_size)
    return replace(stream, batch_size=rows, max_steps=None, epochs=rows)


def step_seconds(trainer: Trainer, compiled: bool) -> float:
    """Take a few steps of the run, on all ranks; return the median of their seconds."""
    return run_steps(trainer, trainer.stream.batch_size, compiled).seconds


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
    return Rates(update, flops_per_token / (tflops * 1e12), 0.0, source)


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


def communication_bytes(kind: Kind, parameters: int, ranks: int, micro_batches: float) -> float:
    """Return the bytes that a rank sends in a step.

    A ring sum of gradients sends 2 (N - 1) / N of them (Patarasuk and Yuan, 2009), scattering a sum or
    gathering parameters half of that. DeepSpeed's stages 1 and 2 sum whole gradients, stage 2 those of
    each micro-batch, and gather the new weights; stage 3 gathers weights and scatters gradients in each
    micro-batch (0.19.8, its collectives counted in steps of two ranks).
    """
    rounds = {
        "replicas": 2.0,
        "zero1": 3.0,
        "zero2": 2 * micro_batches + 1,
        "zero2_offload": 2 * micro_batches + 1,
        "zero3": 2 * micro_batches,
    }[kind]
    return FLOAT * parameters * rounds * (ranks - 1) / ranks
