"""What the launcher tells this process, before there is a process group: its place, and settings.

`accelerate launch` hands over what its YAML file and flags say in variables. Batch, accumulation,
clipping and precision are the run's own settings; a launch file that says otherwise is refused.
"""

import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from toolkit.config import RunConfig
from toolkit.errors import ConfigError

POLL_SECONDS = 0.1
FIXED = {
    "data_types.grad_accum_dtype": "fp32",
    "communication_data_type": "fp32",
    "zero_optimization.compute_grad_norm": True,
}
"""What `engine.zero` sets in DeepSpeed's configuration, and a file may not set otherwise."""


class Turn:
    """Lets the first process of a machine prepare the data while the others wait.

    They could all try: locks see to it that one builds. But when data is bad, the launcher ends all
    processes with the first that fails, and the one that has to say why might not be done yet.
    """

    def __init__(self) -> None:
        self.is_main = int(os.environ.get("RANK", "0")) == 0
        self.is_first = int(os.environ.get("LOCAL_RANK", "0")) == 0
        self.processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        launch = (
            os.getppid(),
            _began(os.getppid()) if self.processes > 1 else None,
            os.environ.get("MASTER_PORT"),
            os.environ.get("TORCHELASTIC_RESTART_COUNT"),
        )
        name = "-".join(map(str, (*launch, os.getuid())))
        self.done = Path(tempfile.gettempdir()) / f"toolkit-prepared-{name}"

    @contextmanager
    def in_order(self) -> Iterator[None]:
        """Run the block in the first process; in the others, once it succeeded there."""
        if self.processes == 1:
            yield
        elif self.is_first:
            yield
            self.done.touch()
        else:
            while not self.done.exists():  # if the first one fails, the launcher ends this one
                time.sleep(POLL_SECONDS)
            yield

    def forget(self) -> None:
        """Leave nothing behind, once all processes have had their turn."""
        if self.is_first:
            self.done.unlink(missing_ok=True)


def _began(pid: int) -> float | None:
    """Return when a process began, which tells it from an earlier one with its number; None if hidden."""
    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:  # a container's first process has no parent; others may be hidden
        return None


class Said(NamedTuple):
    """One setting as a launch file says it."""

    place: str
    """Where it stands, for the user to find it."""
    value: Any
    ours: Any
    """What the run says; None where a launch file may not say anything."""
    name: str
    """The run's own name for it, or why it may not be said."""


def uses_deepspeed() -> bool:
    """Tell whether the launch config asks for DeepSpeed, as Accelerate (1.15) reads it."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def refuse_contradictions(config: RunConfig) -> None:
    """Compare what the launch files say with the run's settings.

    Raises:
        ConfigError: naming both places of each contradiction.
    """
    problems = []
    if config.compile and uses_deepspeed():
        problems.append(
            "--compile does not go with DeepSpeed, whose hooks stand between the layers: leave it out, "
            "or use launch/ddp.yaml"
        )
    for said in [*_from_launcher(config), *_from_deepspeed_file(config)]:
        if said.value in (None, "auto", said.ours):
            continue
        if said.ours is not None:
            problems.append(
                f"{said.place} is {said.value!r}, but the run's {said.name} is {said.ours!r}; say "
                f"it in one place only: take it out there (or put 'auto'), or change --{said.name}"
            )
        elif said.value is not False or said.name.startswith("it is always"):
            problems.append(f"{said.place} is {said.value!r}; take it out, {said.name}")
    if problems:
        raise ConfigError(problems)


def _from_launcher(config: RunConfig) -> Iterator[Said]:
    """Yield what flags and YAML file of `accelerate launch` say."""
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION")
    if precision not in (None, "no"):  # "no" is also what it writes when nobody said anything
        place = "mixed_precision of the launch config (ACCELERATE_MIXED_PRECISION)"
        yield Said(place, precision, config.precision, "precision")
    if not uses_deepspeed():
        return
    for name, ours, theirs in (
        ("gradient_accumulation_steps", config.grad_accum, "grad_accum"),
        ("gradient_clipping", config.max_grad_norm, "max_grad_norm"),
    ):
        variable = f"ACCELERATE_{name.upper()}"
        place = f"deepspeed_config.{name} of the launch config ({variable})"
        yield Said(place, _number(os.environ.get(variable)), ours, theirs)


def _from_deepspeed_file(config: RunConfig) -> Iterator[Said]:
    """Yield what a DeepSpeed file says, if the launch config names one."""
    path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if not uses_deepspeed() or path == "none":
        return
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError([f"the DeepSpeed config {path} cannot be read ({error})"]) from error
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    rules: dict[str, tuple[Any, str]] = {
        "train_batch_size": (config.batch_size, "batch_size"),
        "train_micro_batch_size_per_gpu": (
            config.batch_size / ranks / config.grad_accum,
            "batch_size",
        ),
        "gradient_accumulation_steps": (config.grad_accum, "grad_accum"),
        "gradient_clipping": (config.max_grad_norm, "max_grad_norm"),
        "bf16.enabled": (None, "--precision bf16 computes in bf16 over fp32 weights"),
        "fp16.enabled": (None, "there is --precision bf16 or fp32"),
        "torch_autocast.enabled": (None, "that is --precision bf16"),
        "optimizer": (None, "the run has its own: --lr, --weight_decay"),
        "scheduler": (None, "the run has its own: --schedule, --warmup_ratio"),
    }
    for key, kept in FIXED.items():
        if (value := _look_up(content, key)) not in (None, "auto", kept):
            yield Said(f"{key} in {path}", value, None, f"it is always {kept!r} here")
    for key, (ours, name) in rules.items():
        yield Said(f"{key} in {path}", _look_up(content, key), ours, name)


def _look_up(content: Any, key: str) -> Any:
    for name in key.split("."):
        content = content.get(name) if isinstance(content, dict) else None
    return content


def _number(text: str | None) -> Any:
    try:
        return float(text) if text else None
    except ValueError:
        return text
