"""One run: build, distribute, loop, score. Wires the parts; each of them knows only its own."""

import os
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import load_file
from torch import Tensor

from toolkit.build import about_compiling, evaluation_tokens, make_trainer
from toolkit.config import RunConfig, part
from toolkit.console import complain, say
from toolkit.data.cache import TokenCache
from toolkit.engine.checkpoint import read_moments, read_progress, read_weights
from toolkit.engine.cores import Cores
from toolkit.engine.evaluate import Evaluation, evaluate
from toolkit.engine.loop import Hooks, train
from toolkit.engine.memory import peak_bytes
from toolkit.engine.replicas import unwrap
from toolkit.engine.runtime import Runtime
from toolkit.engine.step import Wants
from toolkit.engine.totals import Progress, Totals
from toolkit.engine.trainer import Trainer
from toolkit.engine.watchdog import Watchdog
from toolkit.errors import CheckpointError, Preempted, ToolkitError
from toolkit.model.classifier import ClassifierSpec, build_classifier
from toolkit.record.checkpoints import Origin
from toolkit.record.export import save_model, save_predictions
from toolkit.record.journal import RunFolder
from toolkit.record.metrics import as_record, table
from toolkit.record.progress import TrainingProgress
from toolkit.record.provenance import provenance
from toolkit.record.tracking import Tracker, give_back, is_agents_run, wandb_arguments
from toolkit.redact import redact_values
from toolkit.restart import MEETING_SECONDS, Restart
from toolkit.saving import Saving
from toolkit.stop import Stop


def run(
    config: RunConfig,
    tokens: TokenCache,
    encoder: Path,
    folder: RunFolder,
    origin: Origin,
    point: Path | None,
    stop: Stop,
) -> int:
    """Train, evaluate and record one run; return the exit code.

    Args:
        config: what to do.
        tokens: the data.
        encoder: folder of the pretrained encoder.
        folder: where to record it, opened by the main process.
        origin: what its checkpoints belong to.
        point: a verified checkpoint to go on from, or None; the main process's counts.
        stop: whether to stop.
    """
    restart = Restart(stop)
    try:
        with stop.leaving(lambda: _record_early_stop(config, folder, stop)):
            runtime = Runtime(config.precision, config.cpu_threads, config.rank_timeout)
            known = (folder.start, folder.split, point)
            folder.start, folder.split, point = runtime.from_main(known)
    except Exception as error:
        folder.record_crash("crashed", message=f"the processes could not start together: {error}")
        raise
    this = Run(config, tokens, encoder, folder, origin, runtime, point, stop, restart)
    try:
        this.watchdog.start()
        this.execute()
    except BaseException as error:
        return this.fail(error)
    finally:
        this.watchdog.end()
        this.tracker.finish()  # last: it may wait for the network
    runtime.end()
    return 0


def _record_early_stop(config: RunConfig, folder: RunFolder, stop: Stop) -> None:
    folder.record_crash("preempted", message=str(Preempted()), split=folder.split)
    is_main = os.environ.get("RANK", "0") == "0"  # the ranks have not met: there is no runtime yet
    if not is_main:
        return
    complain(str(Preempted()))
    if config.track == "wandb" and is_agents_run() and stop.by_scheduler:
        give_back(wandb_arguments(*config.wandb_place))


def _status(error: BaseException) -> str:
    if isinstance(error, ToolkitError):
        return error.status
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "oom"
    return "io_error" if isinstance(error, OSError) else "crashed"


class Run:
    """The parts of a run, and what the loop reports to."""

    def __init__(
        self,
        config: RunConfig,
        tokens: TokenCache,
        encoder: Path,
        folder: RunFolder,
        origin: Origin,
        runtime: Runtime,
        point: Path | None,
        stop: Stop,
        restart: Restart,
    ) -> None:
        self.config = config
        self.tokens = tokens
        self.encoder = encoder
        self.folder = folder
        self.runtime = runtime
        self.point = point
        self.stop = stop
        self.restart = restart
        self.tracker = Tracker()
        self.best: dict[str, Any] | None = None
        self.progress = Progress()
        self.origin = origin
        self.saving = Saving(config, runtime, folder, origin, stop)
        self.watchdog = Watchdog(
            folder.ranks,
            runtime.world_size,
            runtime.phases,
            stop,
            config.rank_timeout,
            self.on_lost,
            self.join_restart,
        )

    def execute(self) -> None:
        """Build, distribute, loop, score the test set once, write the summary."""
        trainer = self.build()
        self.begin(trainer.stream.num_steps)
        bar = TrainingProgress(
            trainer.stream.num_steps, self.progress.step, enabled=self.runtime.is_main
        )
        # a GPU's host and ranks wait for others as it is
        on_cpu_alone = self.runtime.device.type == "cpu" and self.runtime.world_size == 1
        self.cores = Cores(torch.get_num_threads() if on_cpu_alone else 1)
        with bar as self.bar:
            hooks = Hooks(self.wants, self.on_step, self.on_log, self.on_eval, self.on_save)
            totals = train(trainer, hooks, self.progress)
        del trainer
        self.score_test(totals)
        del self.model  # `Runtime.end` says why

    def fail(self, error: BaseException) -> int:
        """Record how a run ended that did not complete; return the exit code."""
        if isinstance(error, ToolkitError):  # raised on all ranks together
            self.end_together(error)
            raise error
        place = f"rank {self.runtime.rank}, phase {self.runtime.phases}"
        text = f"{place}: {type(error).__name__}: {error}"
        if self._smaller_helps(error):
            self.restart_smaller(text)
        if self.runtime.world_size > 1 and _is_about_others(error):
            text += f"\n{self.watchdog.find_lost()}"
            self.join_restart()
        self.folder.record_crash(_status(error), message=text, split=self.progress.split)
        complain(f"{traceback.format_exc()}error in {text}{self._advice(error)}")
        self.tracker.finish(exit_code=1)
        return 1

    def end_together(self, error: ToolkitError) -> None:
        """Record an end that all ranks know of."""
        status, preempted = error.status, isinstance(error, Preempted)
        if preempted and is_agents_run() and not self.runtime.any(self.stop.by_scheduler):
            # by early termination, or by who stopped the agent: W&B must not give it to another one
            status, preempted = "stopped", False
        if self.runtime.is_main:
            self.folder.record_crash(status, message=str(error), split=self.progress.split)
            self.tracker.finish(exit_code=error.exit_code, preempted=preempted)
            if self.tracker.is_cut_off and preempted and is_agents_run():
                give_back(wandb_arguments(*self.config.wandb_place))
        if isinstance(error, Preempted):
            self.runtime.any(False)  # who leaves first makes the launcher end the others

    def _smaller_helps(self, error: BaseException) -> bool:
        """Tell whether smaller micro-batches would have fitted into memory."""
        in_step = self.runtime.phases.name in ("data", "forward", "backward")
        pieces = self.progress.split * self.config.grad_accum * self.runtime.world_size
        return _status(error) == "oom" and in_step and pieces < self.config.batch_size

    def restart_smaller(self, text: str) -> None:
        """Start all ranks again, with micro-batches half as large; the others look once a second."""
        split = self.progress.split * 2
        moment = time.time() + MEETING_SECONDS
        moment = self.folder.record_restart(moment, message=text, split=split)
        complain(
            f"Out of memory ({text}). The ranks cannot meet again in mid-step: all start again from "
            f"the last checkpoint, with each step's rows in {split} times as many micro-batches."
        )
        self._restart_at(moment)

    def join_restart(self) -> None:
        """Start this rank again, if one of them said that all do."""
        if moment := self.folder.restarts_at:
            self._restart_at(moment)

    def _restart_at(self, moment: float) -> NoReturn:
        # W&B's own process holds rows back in blocks: unless it is told to finish, they are lost
        self.restart.at(moment, self.runtime.phases.faults_left(), self.tracker.finish)

    def _advice(self, error: BaseException) -> str:
        if _status(error) != "oom":
            return ""
        if self.runtime.phases.name == "evaluate":
            return f"\nEvaluate in smaller pieces: --eval_tokens {self.config.max_length}"
        return (
            "\nSmaller micro-batches do not help here: more processes, or launch/zero3.yaml, may."
        )

    def on_lost(self, text: str) -> None:
        """Record that a rank is dead or hangs; called by the watchdog, which then ends this one."""
        self.folder.record_crash("crashed", message=text, split=self.progress.split)
        complain(f"error: rank {self.runtime.rank}: {text}")

    def build(self) -> Trainer:
        """Make model and optimizer, hand them to the runtime, and put back a checkpoint's state."""
        config, runtime = self.config, self.runtime
        spec = part(ClassifierSpec, config)
        model, notes = build_classifier(spec, self.encoder, self.tokens.label_names)
        for note in notes:
            self.say(note)
        if self.point:
            runtime.phases.enter("start")  # each part may take as long as a phase may
            weights = read_weights(self.point) if runtime.is_main else {}
            runtime.load_weights(model, weights)
        runtime.phases.enter("start")
        trainer = make_trainer(config, self.tokens, runtime, model)
        self.model, self.padded = trainer.model, trainer.padded
        runtime.phases.enter("start")
        self.restore()
        return trainer

    def restore(self) -> None:
        """Put back what a checkpoint holds besides the weights."""
        runtime = self.runtime
        if self.point:
            notes = runtime.from_main(read_progress(self.point) if runtime.is_main else None)
            runtime.load_moments(
                read_moments(self.point) if runtime.is_main else {}, notes["updates"]
            )
            self.progress = Progress.from_json(notes["progress"])
            self.best = notes["best"]
            self.saving.saved_step = self.progress.step
            if problem := runtime.from_main(self._rewind(notes["journal_bytes"])):
                raise CheckpointError(problem)
        self.progress.split = max(self.progress.split, self.folder.split)

    def _rewind(self, journal_bytes: int) -> str | None:
        """Take the record back to the checkpoint's time; return what went wrong."""
        if self.runtime.is_main:
            try:
                self.folder.rewind(journal_bytes, self.best["step"] if self.best else None)
            except CheckpointError as error:
                return str(error)
        return None

    def begin(self, num_steps: int) -> None:
        """Record what is known before the first step."""
        config, runtime = self.config, self.runtime
        facts = provenance() | runtime.describe()
        facts |= {"batching": "padded" if self.padded else "packed", "precision": config.precision}
        facts |= {"encoder_folder": str(self.encoder), "data": self.tokens.meta["inputs"]}
        facts |= {"first_step": self.progress.step + 1, "num_steps": num_steps}
        if not runtime.is_main:
            return
        # said of this start alone: kept, each start with this file would train anew
        self.folder.begin(replace(config, overwrite=False).to_yaml(), facts)
        if config.track == "wandb":
            arguments = wandb_arguments(*config.wandb_place)
            shown = redact_values(config.identity())
            self.tracker = Tracker(lambda: runtime.start_wandb(arguments, shown))
        alone = facts["distributed_type"] == "NO"
        how = "one process" if alone else facts["distributed_type"]
        self.say(
            f"Training on {runtime.world_size} x {facts['device']} ({how}), "
            f"{facts['batching']}; run folder: {self.folder.path}"
        )
        for name, plan in facts["precision_plan"].items():
            self.say(f"  {name.replace('_', ' ')}: {plan}")
        if config.batching == "auto" and self.padded and config.precision == "bf16":
            self.say(
                "  padded, because packs need a GPU from Ampere on, triton, and a C compiler (or CC=)"
            )
        left = num_steps - self.progress.step
        if hint := about_compiling(config, runtime, self.padded, left):
            self.say(f"  {hint}")
        if self.progress.split > 1:
            self.say(
                f"Each step's rows in {self.progress.split} times as many micro-batches, because memory "
                "ran out before; --resume none forgets that"
            )
        if self.point:
            self.say(f"Going on after step {self.progress.step}, from {self.point}")

    def wants(self) -> Wants:
        """Say what this rank wants besides training."""
        return Wants(stop=self.stop.requested, save=self.runtime.is_main and self.saving.is_due)

    def on_step(self, step: int) -> None:
        """Show that a step is done, and what slows it down."""
        self.bar.update(step)
        if complaint := self.cores.complaint():
            self.bar.note(complaint)

    def on_log(self, step: int, values: dict[str, Any]) -> None:
        """Record training figures."""
        self.record("train", step, values)
        self.bar.update(step, values)

    def on_eval(self, step: int) -> None:
        """Evaluate on validation and keep the model if it is the best so far."""
        result = self.evaluate("validation")
        record = as_record(result.counts, result.loss)
        better = self.best is None or _score(record, self.config) > _score(self.best, self.config)
        if better:
            record |= {"step": step}
            weights = self.runtime.whole_weights()
            if self.saving.best(step, lambda folder: self.write_best(folder, weights, record)):
                self.best = record
        self.record("eval", step, flatten("eval", record) | _rate("eval", result))
        name = self.config.best_metric
        shown = record["loss"] if name == "loss" else record[name]["value"]
        self.bar.note(
            f"validation at step {step}: {name} {'n/a' if shown is None else format(shown, '.4f')}"
            f"{' (best so far)' if better else ''}"
        )

    def evaluate(self, split: str) -> Evaluation:
        """Score a split with the model as it is."""
        return evaluate(
            self.runtime,
            self.model,
            self.tokens.splits[split],
            max_tokens=evaluation_tokens(self.config, self.runtime),
            padded=self.padded,
            wants_stop=lambda: self.stop.requested,
        )

    def write_best(self, folder: Path, weights: dict[str, Tensor], record: dict[str, Any]) -> None:
        """Write the model as a folder that transformers reads."""
        card = {
            "run_id": self.config.run_id,
            "head": self.config.head,
            "dataset": self.config.dataset,
            "encoder": self.config.encoder,
            "labels": ", ".join(self.tokens.label_names),
            "positive": self.tokens.label_names[1],
            "max_length": self.config.max_length,
            "precision": self.config.precision,
            "step": record["step"],
            "folder": (self.folder.path / "best").absolute(),
        }
        model = unwrap(self.model)
        save_model(model, weights, self.encoder, folder, card, record)

    def on_save(self, progress: Progress) -> None:
        """Write a checkpoint."""
        self.saving.checkpoint(progress, self.best)
        self.cores.begin()

    def score_test(self, totals: Totals) -> None:
        """Score the test set with the best model, once, and write what a sweep reads."""
        if self.best is None:
            raise CheckpointError("no best model could be kept, so there is none to test")
        folder = self.folder.path / f"best-step-{self.best['step']:06d}"
        weights = load_file(folder / "model.safetensors") if self.runtime.is_main else {}
        self.runtime.load_weights(self.model, weights)
        result = self.evaluate("test")
        self.runtime.phases.enter("finish")
        record = as_record(result.counts, result.loss)
        self.record("test", self.best["step"], flatten("test", record) | _rate("test", result))
        if not self.runtime.is_main:
            return
        split = self.tokens.splits["test"]
        save_predictions(
            self.folder.path / "predictions.parquet", split.row_ids, split.labels, result.scores
        )
        self.folder.finish(self.summary(record, totals))
        self.say(table(record, "test"))
        self.say(f"run folder: {self.folder.path}")

    def summary(self, test: dict[str, Any], totals: Totals) -> dict[str, Any]:
        """Return all that a sweep reads of a run."""
        config, seconds = self.config, totals.seconds
        return {
            "run_id": config.run_id,
            "experiment": config.experiment,
            "config_hash": config.hash(),
            "config": config.identity(),
            "data_fingerprint": self.origin.data,
            "encoder_fingerprint": self.origin.encoder,
            "data_revision": self.tokens.meta["inputs"]["revision"],
            "test": test,
            "validation": self.best,
            "steps_skipped": totals.skipped,
            "world_size": self.runtime.world_size,
            "train_seconds": round(seconds, 3),
            "device_seconds": round(seconds * self.runtime.world_size, 3),
            "reviews_per_s": totals.reviews_per_s,
            "tokens_per_s": totals.tokens_per_s,
            "peak_memory_mib": round(peak_bytes(self.runtime.device) / 2**20),
            "padding": totals.padding,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }

    def record(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Write figures to the journal, then mirror them."""
        if self.runtime.is_main:
            self.folder.log(kind, step, values)
            self.tracker.log(step, values)

    def say(self, text: str) -> None:
        """Print on the main process."""
        if self.runtime.is_main:
            say(text)


def _is_about_others(error: BaseException) -> bool:
    """Tell whether a rank failed because another one did not answer it."""
    return isinstance(error, RuntimeError) and any(
        word in str(error) for word in ("gloo", "NCCL", "Connection", "Timed out", "timed out")
    )


def _score(record: dict[str, Any], config: RunConfig) -> float:
    """Return the metric that picks the best model, larger being better."""
    if config.best_metric == "loss":
        return -record["loss"]
    return record[config.best_metric]["value"] or 0.0


def _rate(prefix: str, result: Evaluation) -> dict[str, float]:
    return {f"{prefix}/reviews_per_s": len(result.scores) / result.seconds}


def flatten(prefix: str, record: dict[str, Any]) -> dict[str, Any]:
    """Turn a metrics record into flat names: eval/f1, eval/f1_low, eval/tp ..."""
    flat = {f"{prefix}/loss": record["loss"], f"{prefix}/n": record["n"]}
    for name in ("accuracy", "precision", "recall", "f1"):
        flat[f"{prefix}/{name}"] = record[name]["value"]
        flat[f"{prefix}/{name}_low"] = record[name]["low"]
        flat[f"{prefix}/{name}_high"] = record[name]["high"]
    return flat | {f"{prefix}/{name}": count for name, count in record["confusion"].items()}
