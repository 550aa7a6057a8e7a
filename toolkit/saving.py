"""What a run keeps on disk while it trains: checkpoints, and the best model so far.

All ranks call these functions together. A failure is no reason to lose the run: what was there
before is whole, and the user says whether training goes on.
"""

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from toolkit.config import RunConfig
from toolkit.console import complain
from toolkit.engine.checkpoint import Checkpoints, read_progress
from toolkit.engine.runtime import Runtime
from toolkit.engine.totals import Progress
from toolkit.errors import CheckpointError
from toolkit.record.checkpoints import Origin, prune
from toolkit.record.journal import RunFolder
from toolkit.stop import Stop


class Saving:
    """When to save, and what to do when that fails."""

    def __init__(
        self, config: RunConfig, runtime: Runtime, folder: RunFolder, origin: Origin, stop: Stop
    ) -> None:
        self.config = config
        self.runtime = runtime
        self.folder = folder
        self.stop = stop
        self.checkpoints = Checkpoints(runtime, folder.checkpoints, origin)
        self.saved_step: int | None = None
        """Step of the newest checkpoint."""
        self.saved_at = time.monotonic()

    @property
    def is_due(self) -> bool:
        """Tell whether a checkpoint is due by the clock."""
        return time.monotonic() - self.saved_at >= 60 * self.config.save_minutes

    def checkpoint(self, progress: Progress, best: dict[str, Any] | None) -> None:
        """Write a checkpoint, unless there is one of this step.

        That one may say that an evaluation is due which is done by now: a start from it does it again.

        Raises:
            CheckpointError: when it fails and the run is to stop then.
        """
        if progress.step == self.saved_step:
            return
        problem = self._flush_journal() if self.runtime.is_main else None
        problem = self.runtime.from_main(problem)
        notes = {
            "progress": asdict(progress),
            "updates": self.runtime.updates(),
            "best": best,
            "journal_bytes": self.folder.length() if self.runtime.is_main else None,
        }
        problems = [problem] if problem else self.checkpoints.save(progress.step, notes)
        self.saved_at = time.monotonic()
        if problems:
            self._failed(
                f"no checkpoint of step {progress.step}: {'; '.join(problems)}. The one before it "
                f"is whole: {self._newest()}"
            )
            return
        self.saved_step = progress.step
        if self.runtime.is_main:
            self._prune()

    def best(self, step: int, write: Callable[[Path], None]) -> bool:
        """Keep the best model so far; return whether that worked, the same on all ranks.

        Args:
            step: steps that are done.
            write: writes the model into an empty folder; only called on the main process.

        Raises:
            CheckpointError: when it fails and the run is to stop then.
        """
        self.runtime.phases.enter("save")
        problem = None
        if self.runtime.is_main:
            try:
                with self.folder.best_model(step) as aside:
                    write(aside)
            except (OSError, SafetensorError) as error:
                problem = str(error)
        problem = self.runtime.from_main(problem)
        if problem:
            self._failed(f"the best model so far, of step {step}, was not kept: {problem}")
        return problem is None

    def _newest(self) -> str:
        return (
            "there is none yet" if self.saved_step is None else f"it is of step {self.saved_step}"
        )

    def _flush_journal(self) -> str | None:
        """Write what a full disk did not take; return what went wrong."""
        try:
            self.folder.flush()
        except OSError as error:
            return f"rank 0 cannot write metrics.jsonl: {error}"
        return None

    def _failed(self, problem: str) -> None:
        """Go on or stop, as configured; a run that is to stop anyway cannot go on."""
        stops = self.config.on_failed_save == "stop" or self.runtime.any(self.stop.requested)
        if stops:
            raise CheckpointError(
                f"{problem}. The run stops here; the same command starts it again"
            )
        if self.runtime.is_main:
            complain(f"WARNING: {problem}. Training goes on (--on_failed_save stop would end it)")

    def _prune(self) -> None:
        """Delete old checkpoints, and best models that none of the kept ones knows."""
        self.runtime.phases.enter("prune")
        try:
            kept = prune(self.folder.checkpoints, self.config.keep_checkpoints)
            best = [read_progress(path)["best"] for path in kept]
            self.folder.prune_best({record["step"] for record in best if record})
        except (OSError, ValueError, KeyError) as error:
            complain(f"WARNING: old checkpoints cannot be deleted: {error}")
