"""Progress of a run: a bar in a terminal, a plain line every few seconds elsewhere."""

import sys
import time
from contextlib import suppress
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from toolkit.console import say

PLAIN_SECONDS = 5.0


class TrainingProgress:
    """Shows steps and the latest figures; silent on ranks other than the main one."""

    def __init__(self, num_steps: int, first_step: int = 0, *, enabled: bool) -> None:
        self.num_steps = num_steps
        self.first_step = first_step
        """Steps that were done before this start."""
        self.enabled = enabled
        self.started = self.last_line = time.monotonic()
        self.figures = ""
        self.bar = _bar() if enabled and sys.stdout.isatty() else None

    def __enter__(self) -> "TrainingProgress":
        if self.bar:
            self.bar.start()
            self.task = self.bar.add_task("training", total=self.num_steps, figures="")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar:
            with suppress(OSError):  # the terminal may be gone
                self.bar.stop()

    def update(self, done: int, values: dict[str, Any] | None = None) -> None:
        """Report that `done` steps are done, with new figures if there are any."""
        if values:
            self.figures = _figures(done, values)
        if self.bar:
            with suppress(OSError):
                self.bar.update(self.task, completed=done, figures=self.figures)
        elif self.enabled and self._is_due(done, bool(values)):
            self.last_line = time.monotonic()
            left = (
                (self.last_line - self.started) / (done - self.first_step) * (self.num_steps - done)
            )
            say(f"step {done}/{self.num_steps}  {self.figures}  ETA {_minutes(left)}")

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        if self.bar:
            with suppress(OSError):
                self.bar.console.print(text, highlight=False)
        elif self.enabled:
            say(text)

    def _is_due(self, done: int, new: bool) -> bool:
        waited = time.monotonic() - self.last_line >= PLAIN_SECONDS
        return bool(self.figures) and (waited or (new and done == self.num_steps))


def _bar() -> Progress:
    return Progress(
        TextColumn("step {task.completed}/{task.total}"),
        BarColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
    )


def _figures(step: int, values: dict[str, Any]) -> str:
    loss = values["train/loss"]
    return (
        f"at {step}: loss {'n/a' if loss is None else format(loss, '.4f')}  lr {values['train/lr']:.2e}  "
        f"{values['train/reviews_per_s']:.1f} reviews/s  {values['train/tokens_per_s']:.0f} tokens/s  "
        f"padding {values['train/padding']:.1%}"
    )


def _minutes(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
