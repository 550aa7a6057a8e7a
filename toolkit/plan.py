"""What will a run need? Memory, micro-batches, time and cost, for each way to distribute it.

    python -m toolkit plan --encoder bert-base --batch_size 256                 rate measured here
    python -m toolkit plan --encoder bert-base --dataset amazon_polarity --memory_gb 80 --tflops 300
    python -m toolkit plan --sweep configs/sweeps/heads.yaml --price 2.5        what a sweep will cost

Flags of a run (`toolkit train --help`) say what to plan. The data are prepared if they are not yet:
lengths decide about memory and time. Without --tflops a few steps are timed on this machine, with
one process and under each launch config.
"""

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil

from toolkit.config import RunConfig, normalise, parse, part
from toolkit.console import complain, say
from toolkit.data.cache import TokenCache
from toolkit.errors import ConfigError, ToolkitError
from toolkit.experiments.arguments import split_flags
from toolkit.experiments.plan import DECIDE_RATE, SCORING, costs, evaluations
from toolkit.experiments.states import duration
from toolkit.experiments.sweep import load, overridden_flags, runs
from toolkit.imports import uncollected
from toolkit.prepare import prepare_data, refuse_no_steps
from toolkit.ranks import LAUNCH_FOLDER, PROGRAMS, RanksError, ask

if TYPE_CHECKING:
    import torch

    from toolkit.engine.estimate import Activations, Kind, Rates
    from toolkit.engine.trainer import Trainer

GIB = 2**30
CUDA_BYTES = 1.0 * GIB
"""Of a CUDA context with its libraries, before the first tensor; assumed, not measured."""
LAUNCHES: dict[str, "Kind"] = {
    "ddp": "replicas",
    "zero1": "zero1",
    "zero2": "zero2",
    "zero2_offload": "zero2_offload",
    "zero3": "zero3",
}
REHEARSAL_SECONDS = 900
COUNTED_NOTE = (
    "* counted, not timed with these ranks; ZeRO's are without DeepSpeed's own work, which made steps of "
    "two CPU processes 1.4 to 2.5 times as long as DDP's."
)
LINK_NOTE = (
    " Links between ranks are counted as if they took no time: --link_gb says what they carry."
)
POSITIVE = ("num_processes", "memory_gb", "tflops", "bandwidth_gb", "link_gb", "price")


class Row(NamedTuple):
    """What one way to distribute needs."""

    launch: str
    ranks: int
    bytes: float
    """Of each rank, at most."""
    fits: float
    """Reviews in a micro-batch that fits into memory; infinity if that is not known."""
    seconds: float
    """Of a step."""
    counted: bool
    """Those were not measured with these ranks, but follow from what one takes."""


class Facts(NamedTuple):
    """What one device takes for what."""

    rates: "Rates"
    kept: "Activations"
    scoring: float
    """Bytes that evaluation needs at most; with stated rates not known, and less than training."""


@dataclass(frozen=True)
class Ground:
    """What all rows follow from."""

    trainer: "Trainer"
    facts: Facts
    base: float
    """Bytes of a process before the model."""
    parameters: int
    memory: float
    """Bytes of a device."""
    compiled: bool
    on_cpu: bool
    """The ranks share this machine's cores and memory."""
    link: float
    """Bytes/s between ranks."""
    timed: dict[str, float]
    """Seconds of a step by launch file, where they could be measured."""


def main(argv: list[str]) -> int:
    """Print the plan; return the exit code."""
    try:
        options, config, flags = _options(argv)
        tokens, encoder = prepare_data(config)
        refuse_no_steps(config, tokens)
        timed = {} if options.tflops else rehearse(options, config, flags)
        ground = survey(config, tokens, encoder, options, timed)
        report(config, tokens, ground, options, flags)
    except (ToolkitError, OSError) as error:
        complain(f"error: {error}")
        return getattr(error, "exit_code", 1)
    return 0


def _options(argv: list[str]) -> tuple[argparse.Namespace, RunConfig, list[str]]:
    made = argparse.ArgumentParser(
        "toolkit plan",
        description=str(__doc__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--num_processes", type=int, default=2, help="ranks that share the work")
    made.add_argument(
        "--launches",
        type=lambda text: text.split(","),
        default=[*LAUNCHES],
        help=f"some of {','.join(LAUNCHES)}",
    )
    made.add_argument("--memory_gb", type=float, help="of a device, in GiB; default: what is here")
    made.add_argument("--tflops", type=float, help="training rate of a device; default: timed here")
    made.add_argument(
        "--bandwidth_gb", type=float, default=1000, help="its memory's, with --tflops"
    )
    made.add_argument(
        "--link_gb",
        type=float,
        help="GB/s between ranks, where steps are counted; default: no limit",
    )
    made.add_argument("--sweep", type=Path, help="sum up this sweep's runs, too")
    made.add_argument("--price", type=float, help="of a device for an hour")
    options, flags = made.parse_known_args(normalise(argv))
    given = {name: getattr(options, name) for name in POSITIVE}
    problems = [
        f"--{name} got {value:g}, allowed is more than 0"
        for name, value in given.items()
        if value is not None and not value > 0
    ]
    problems += [
        f"--launches got {name!r}, allowed are {','.join(LAUNCHES)}"
        for name in options.launches
        if name not in LAUNCHES
    ]
    if options.sweep and not options.sweep.is_file():
        problems.append(f"--sweep got {options.sweep}, which is no file")
    try:
        config = parse(flags, prog="toolkit plan")
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from error
    if problems:
        raise ConfigError(problems)
    return options, config, flags


def rehearse(options: argparse.Namespace, config: RunConfig, flags: list[str]) -> dict[str, float]:
    """Take a few steps of the run under each launch config; return seconds of one by launch file."""
    with uncollected():
        import torch

        from toolkit.engine.runtime import is_on_cpu

    ranks, gpus = options.num_processes, torch.cuda.device_count()
    if not is_on_cpu() and ranks > gpus:
        say(f"{gpus} GPUs here: steps of {ranks} ranks are counted, not timed")
        return {}
    timed = {}
    for launch in launch_files(options, compiled=config.compile, on_cpu=is_on_cpu()):
        say(f"timing steps of {ranks} processes, {launch} ...")
        try:
            answer = ask(
                PROGRAMS / "rehearsal.py",
                LAUNCH_FOLDER / launch,
                ranks,
                *flags,
                seconds=REHEARSAL_SECONDS,
            )
        except RanksError as error:
            say(f"  not timed: {error}")
        else:
            timed[launch] = answer["seconds"]
    return timed


def launch_files(options: argparse.Namespace, *, compiled: bool, on_cpu: bool) -> dict[str, "Kind"]:
    """Return the launch files that share the work among ranks, and what they do."""
    if options.num_processes == 1:
        return {}
    ddp = "cpu2" if on_cpu else "ddp"
    names = [name for name in options.launches if name == "ddp" or not compiled]
    return {f"{ddp if n == 'ddp' else n}.yaml": LAUNCHES[n] for n in names}


def survey(
    config: RunConfig,
    tokens: TokenCache,
    encoder: Path,
    options: argparse.Namespace,
    timed: dict[str, float],
) -> Ground:
    """Build the model and measure what the plan rests on, besides what is timed already."""
    with uncollected():
        from toolkit.build import make_trainer
        from toolkit.engine.runtime import Runtime
        from toolkit.model.classifier import ClassifierSpec, build_classifier

    runtime = Runtime(config.precision, config.cpu_threads)
    base = psutil.Process().memory_info().rss
    on_cpu = runtime.device.type == "cpu" and not options.tflops
    model, _ = build_classifier(part(ClassifierSpec, config), encoder, tokens.label_names)
    if options.tflops and config.batching == "auto":
        # what it means on a GPU, from Ampere on; we may not be on one
        config = replace(config, batching="packed" if config.precision == "bf16" else "padded")
    trainer = make_trainer(config, tokens, runtime, model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if options.tflops:
        facts = _stated(options, model.config, trainer, parameters)
        # cut as a CPU wants it until here; a GPU takes what the user says
        trainer = replace(trainer, spec=replace(trainer.spec, max_tokens=config.max_tokens))
    else:
        facts = _measured(config, trainer, parameters, base if on_cpu else 0)
    memory = options.memory_gb * GIB if options.memory_gb else _memory(runtime.device, on_cpu)
    return Ground(
        trainer=trainer,
        facts=facts,
        base=base if on_cpu else CUDA_BYTES,
        parameters=parameters,
        memory=memory,
        compiled=config.compile,
        on_cpu=on_cpu,
        link=options.link_gb * 1e9 if options.link_gb else math.inf,
        timed=timed,
    )


def _memory(device: "torch.device", on_cpu: bool) -> float:
    """Return the bytes of the device that is planned for; infinity where it is not here."""
    import torch

    from toolkit.engine.memory import usable_bytes

    if on_cpu:
        return usable_bytes()
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(device).total_memory
    return math.inf


def _measured(config: RunConfig, trainer: "Trainer", parameters: int, base: float) -> Facts:
    from toolkit.build import evaluation_tokens
    from toolkit.engine import estimate

    on_cpu = trainer.runtime.device.type == "cpu"
    standing = base + estimate.state_bytes("replicas", parameters, 1, on_cpu=on_cpu)
    rates, kept = estimate.measure(trainer, standing, config.compile)
    at_once = evaluation_tokens(config, trainer.runtime)
    return Facts(rates, kept, estimate.measure_scoring(trainer, at_once, standing))


def _stated(options: argparse.Namespace, shape: Any, trainer: "Trainer", parameters: int) -> Facts:
    from toolkit.engine import estimate

    sizes = shape.num_hidden_layers, shape.hidden_size, shape.intermediate_size
    offsets, packed = trainer.train.offsets, not trainer.padded
    flops = estimate.token_flops(*sizes, offsets, packed=packed)
    rates = estimate.stated(options.tflops, options.bandwidth_gb, flops, parameters)
    return Facts(rates, estimate.activations(trainer), scoring=0.0)


def rows(ground: Ground, options: argparse.Namespace) -> Iterator[Row]:
    """Yield what each way to distribute needs; one process first."""
    yield _row(ground, "cpu.yaml" if ground.on_cpu else "gpu.yaml", "replicas", 1)
    files = launch_files(options, compiled=ground.compiled, on_cpu=ground.on_cpu)
    for launch, kind in files.items():
        yield _row(ground, launch, kind, options.num_processes)


def _row(ground: Ground, launch: str, kind: "Kind", ranks: int) -> Row:
    from toolkit.engine import estimate

    work = estimate.work(ground.trainer, ranks)
    state = estimate.state_bytes(kind, ground.parameters, ranks, on_cpu=ground.on_cpu)
    room = (ground.memory / ranks if ground.on_cpu else ground.memory) - ground.base - state
    fits = ground.facts.kept.tokens_within(room) / work.per_review
    count = work.num_micro_batches
    seconds = ground.facts.rates.seconds(work.busiest, count)
    if ground.on_cpu:  # its ranks share its cores and its memory's bandwidth
        seconds = ranks * ground.facts.rates.seconds(work.total / ranks, count)
    sent = estimate.communication_bytes(kind, ground.parameters, ranks, count) / ground.link
    # on a CPU the best model is read beside the last one, to score the test set
    best = estimate.FLOAT * ground.parameters if ground.on_cpu else 0
    busy = max(ground.facts.kept.of(work.largest), ground.facts.scoring) + best
    return Row(
        launch,
        ranks,
        bytes=ground.base + state + busy,
        fits=fits,
        seconds=ground.timed.get(launch, seconds + sent),
        counted=ranks > 1 and launch not in ground.timed,
    )


def report(
    config: RunConfig,
    tokens: TokenCache,
    ground: Ground,
    options: argparse.Namespace,
    flags: list[str],
) -> None:
    """Print the table, and what it rests on."""
    stream, rates = ground.trainer.stream, ground.facts.rates
    batching = "padded" if ground.trainer.padded else "packed"
    say(f"{config.encoder}, head {config.head}: {ground.parameters / 1e6:.1f} M parameters")
    say(
        f"{stream.num_rows} reviews, {stream.num_steps} steps of {stream.batch_size}, {batching}; "
        f"{ground.facts.kept.per_token / 2**10:.0f} KiB of activations for each token"
    )
    more = (
        f" + {rates.launching * 1e3:.1f} ms for each micro-batch but one" if rates.launching else ""
    )
    say(
        f"a step: {rates.fixed * 1e3:.1f} ms + {rates.per_token * 1e6:.1f} us for each token"
        f"{more} ({rates.source})"
    )
    if ground.compiled:
        say("DeepSpeed runs no compiled model: ZeRO is left out")
    say()
    say(
        f"{'launch':<20} ranks  GiB a rank  reviews that fit        step  reviews/s     run"
        f"  device hours{'   price' if options.price else ''}"
    )
    planned = list(rows(ground, options))
    for row in planned:
        star = "*" if row.counted else " "
        seconds = run_seconds(tokens, ground, row)
        hours = seconds / 3600 * (1 if ground.on_cpu else row.ranks)
        price = f"  {hours * options.price:>6.2f}" if options.price else ""
        say(
            f"{row.launch:<20} {row.ranks:>5}  {row.bytes / GIB:>10.2f}  {_fits(row):>16}"
            f"  {row.seconds * 1e3:>7.1f} ms{star} {stream.batch_size / row.seconds:>9.0f}"
            f"  {duration(seconds):>6}  {hours:>12.2f}{price}"
        )
    if any(row.counted for row in planned):
        say(f"\n{COUNTED_NOTE}{LINK_NOTE if math.isinf(ground.link) else ''}")
    if options.sweep:
        _report_sweep(options, config, flags, stream.batch_size / planned[0].seconds)


def _fits(row: Row) -> str:
    return "any" if row.fits > 10**6 else str(int(row.fits)) if row.fits >= 1 else "NONE"


def run_seconds(tokens: TokenCache, ground: Ground, row: Row) -> float:
    """Return the time of a whole run: its steps, and forward passes over validation and test."""
    stream, every = ground.trainer.stream, ground.trainer.spec.eval_every
    scored = {name: int(tokens.splits[name].offsets[-1]) for name in ("validation", "test")}
    passes = evaluations(stream, every) * scored["validation"] + scored["test"]
    share = 1 if ground.on_cpu else row.ranks
    return stream.num_steps * row.seconds + ground.facts.rates.per_token * SCORING * passes / share


def _report_sweep(
    options: argparse.Namespace, config: RunConfig, flags: list[str], rate: float
) -> None:
    """Sum up a sweep at one process's rate; `toolkit sweep plan` lists its runs."""
    sweep = load(options.sweep)
    given, _ = split_flags(flags)
    varied = set(overridden_flags(sweep, given))
    planned = runs(sweep, [flag for flag in given if flag not in varied])
    found = costs(planned, rate)
    known = [cost.seconds for cost in found if cost.seconds is not None]
    hours = sum(known) / 3600
    price = f", {hours * options.price:.2f} at {options.price:g} an hour" if options.price else ""
    missing = len(found) - len(known)
    unknown = f"; {missing} runs on data not prepared yet" if missing else ""
    say(f"\n{options.sweep}: {len(found)} runs, {hours:.2f} hours of one device{price}{unknown}")
    for name in (*DECIDE_RATE, "batch_size"):
        others = sorted(
            {str(getattr(run.config, name)) for run in planned} - {str(getattr(config, name))}
        )
        if others:
            say(
                f"  all at the rate of this plan, whose {name} is {getattr(config, name)}: runs with "
                f"{', '.join(others)} take another"
            )
