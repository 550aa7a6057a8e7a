"""From settings to what the loop works on."""

from contextlib import nullcontext

import torch

from toolkit.config import RunConfig, part
from toolkit.data.cache import TokenCache
from toolkit.data.steps import Stream
from toolkit.engine.optim import OptimSpec, build_optimizer
from toolkit.engine.runtime import Runtime
from toolkit.engine.trainer import LoopSpec, Trainer, stand_in_loss
from toolkit.errors import ConfigError
from toolkit.model.attention import has_fast_packing
from toolkit.model.classifier import HeadClassifier

WORTH_COMPILING = 2_000
"""Steps; 35 ms saved in each make up for the minute that it takes (an H100, tests/bench/NOTES.md)."""


def make_trainer(
    config: RunConfig, tokens: TokenCache, runtime: Runtime, model: HeadClassifier
) -> Trainer:
    """Join model, optimizer and data for the loop, and take a step that changes nothing."""
    optim = part(OptimSpec, config)
    padded = is_padded(config, runtime)
    if config.compile:
        _refuse_to_compile(config, runtime, padded)
        model.compile_encoder(on_gpu=runtime.device.type == "cuda")
    prepared, optimizer = runtime.prepare(
        model,
        build_optimizer(model, optim),
        max_norm=config.max_grad_norm,
        compiled=config.compile,
    )
    train_split = tokens.splits["train"]
    trainer = Trainer(
        runtime=runtime,
        model=prepared,
        optimizer=optimizer,
        train=train_split,
        stream=part(Stream, config, num_rows=len(train_split)),
        padded=padded,
        spec=part(LoopSpec, config, max_tokens=training_tokens(config, runtime)),
        optim=optim,
    )
    # a compiled model would be compiled for the few tokens of a stand-in, and again for the first batch
    as_it_stands = torch.compiler.set_stance("force_eager") if config.compile else nullcontext()
    with as_it_stands:
        runtime.warm_up(lambda model: stand_in_loss(trainer, model))
    return trainer


def _refuse_to_compile(config: RunConfig, runtime: Runtime, padded: bool) -> None:
    """Raise `ConfigError` where packs have no fast back end."""
    if padded or not has_fast_packing(runtime.device, config.precision):
        advice = "set precision to bf16, or " if config.precision != "bf16" else ""
        raise ConfigError(
            [
                "compile is for packed reviews, which a GPU takes in bf16, from Ampere on, with Triton "
                f"and a C compiler (here: {runtime.device}, {config.precision}): {advice}leave out "
                "compile"
            ]
        )


def about_compiling(config: RunConfig, runtime: Runtime, padded: bool, steps: int) -> str | None:
    """Say it if a run would be over sooner with `compile`, or without."""
    on_gpu = runtime.device.type == "cuda"
    if config.compile and not on_gpu:
        return "--compile is for GPUs: on two cores of a CPU it made steps longer by a quarter"
    if not on_gpu or config.compile or padded or runtime.is_zero or steps <= WORTH_COMPILING:
        return None
    return "--compile would take a minute; on an H100 it made steps 1.9 to 3 times as fast"


def is_padded(config: RunConfig, runtime: Runtime) -> bool:
    """Resolve `batching: auto`: packed where there is a fast back end for it."""
    if config.batching == "auto":
        return not has_fast_packing(runtime.device, config.precision)
    return config.batching == "padded"


def training_tokens(config: RunConfig, runtime: Runtime) -> int | None:
    """Return the most tokens of a micro-batch in training; None if their number is said instead.

    On a CPU, larger tensors are mapped anew each time, and the kernel clears them page by page: with
    26,000 tokens of MiniLM that takes a third of the step (tests/bench/NOTES.md).
    """
    by_itself = runtime.device.type == "cpu" and config.grad_accum == 1
    return config.max_tokens or (max(8192, config.max_length) if by_itself else None)


def evaluation_tokens(config: RunConfig, runtime: Runtime) -> int:
    """Return the tokens per micro-batch in evaluation: on a CPU more do not fit into its caches."""
    by_itself = 4096 if runtime.device.type == "cpu" else 32768
    return config.eval_tokens or max(by_itself, config.max_length)
