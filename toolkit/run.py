"""One run: build, distribute, loop, score. Wires the parts; each of them knows only its own."""

import time
import traceback
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from toolkit.config import RunConfig, part
from toolkit.console import complain, say
from toolkit.data.cache import TokenCache
from toolkit.data.steps import Stream
from toolkit.engine.evaluate import Evaluation, evaluate
from toolkit.engine.loop import Hooks, LoopSpec, Totals, Trainer, train
from toolkit.engine.optim import OptimSpec, build_optimizer
from toolkit.engine.runtime import Runtime
from toolkit.errors import ToolkitError
from toolkit.model.classifier import ClassifierSpec, build_classifier, load_weights
from toolkit.record.export import save_model, save_predictions
from toolkit.record.journal import RunFolder
from toolkit.record.metrics import as_record, table
from toolkit.record.progress import TrainingProgress
from toolkit.record.provenance import provenance
from toolkit.record.tracking import Tracker, wandb_project, wandb_settings


def run(config: RunConfig, tokens: TokenCache, encoder: Path, folder: RunFolder) -> int:
    """Train, evaluate and record one run; return the exit code."""
    runtime = Runtime(config.precision, config.cpu_threads)
    with ExitStack() as stack:
        if runtime.is_main:
            stack.enter_context(folder.claim())
        this = Run(config, tokens, encoder, folder, runtime)
        stack.callback(this.finish_tracking)  # last: it may wait for the network
        try:
            this.execute()
        except BaseException as error:
            if runtime.is_main:
                folder.set_status(_status(error), message=str(error) or type(error).__name__)
            if isinstance(error, ToolkitError | KeyboardInterrupt):
                raise
            complain(f"rank {runtime.rank}:\n{traceback.format_exc()}{_advice(error)}")
            return 1
        runtime.end()
    return 0


def _status(error: BaseException) -> str:
    if isinstance(error, ToolkitError):
        return error.status
    return "oom" if isinstance(error, torch.OutOfMemoryError | MemoryError) else "crashed"


def _advice(error: BaseException) -> str:
    if _status(error) != "oom":
        return ""
    return (
        "Out of memory: --grad_accum 2 (or more) or --max_tokens N split a step into micro-batches, "
        "and the result stays the same."
    )


class Run:
    """The parts of a run, and what the loop reports to."""

    def __init__(
        self,
        config: RunConfig,
        tokens: TokenCache,
        encoder: Path,
        folder: RunFolder,
        runtime: Runtime,
    ) -> None:
        self.config = config
        self.tokens = tokens
        self.encoder = encoder
        self.folder = folder
        self.runtime = runtime
        self.padded = _is_padded(config, runtime)
        self.tracker = Tracker()
        self.best: dict[str, Any] | None = None

    def execute(self) -> None:
        """Build, distribute, loop, score the test set once, write the summary."""
        trainer = self.build()
        self.begin()
        with TrainingProgress(trainer.stream.num_steps, enabled=self.runtime.is_main) as progress:
            self.progress = progress
            totals = train(trainer, Hooks(progress.update, self.on_log, self.on_eval))
        self.score_test(totals)
        del self.model  # `Runtime.end` says why

    def build(self) -> Trainer:
        """Make model and optimizer and hand them to the runtime."""
        config, runtime = self.config, self.runtime
        model, warnings = build_classifier(
            part(ClassifierSpec, config), self.encoder, self.tokens.label_names
        )
        for warning in warnings:
            self.say(warning)
        optim = part(OptimSpec, config)
        prepared, optimizer = runtime.prepare(model, build_optimizer(model, optim))
        self.model = prepared
        train_split = self.tokens.splits["train"]
        return Trainer(
            runtime=runtime,
            model=prepared,
            optimizer=optimizer,
            train=train_split,
            stream=part(Stream, config, num_rows=len(train_split)),
            padded=self.padded,
            spec=part(LoopSpec, config),
            optim=optim,
        )

    def begin(self) -> None:
        """Record what is known before the first step."""
        config, runtime = self.config, self.runtime
        facts = provenance() | runtime.describe()
        facts |= {"batching": "padded" if self.padded else "packed", "precision": config.precision}
        facts |= {"encoder_folder": str(self.encoder), "data": self.tokens.meta["inputs"]}
        if not runtime.is_main:
            return
        self.folder.begin(config.to_yaml(), facts)
        if config.track == "wandb":
            options = asdict(config.wandb)
            settings = wandb_settings(options, str(config.run_id), self.folder.path)
            self.tracker = Tracker(
                lambda: runtime.start_wandb(wandb_project(options), settings, config.identity())
            )
        self.say(
            f"Training on {runtime.world_size} x {facts['device']}, {config.precision}, "
            f"{facts['batching']}; run folder: {self.folder.path}"
        )

    def on_log(self, step: int, values: dict[str, Any]) -> None:
        """Record training figures."""
        self.record("train", step, values)
        self.progress.update(step, values)

    def on_eval(self, step: int) -> None:
        """Evaluate on validation and keep the model if it is the best so far."""
        result = self.evaluate("validation")
        record = as_record(result.counts, result.loss)
        self.record("eval", step, flatten("eval", record))
        better = self.best is None or _score(record, self.config) > _score(self.best, self.config)
        if better:
            self.best = record | {"step": step}
            self.save_best(step)
        name = self.config.best_metric
        shown = record["loss"] if name == "loss" else record[name]["value"]
        self.progress.note(
            f"validation at step {step}: {name} {'n/a' if shown is None else format(shown, '.4f')}"
            f"{' (best so far)' if better else ''}"
        )

    def evaluate(self, split: str) -> Evaluation:
        """Score a split with the model as it is."""
        return evaluate(
            self.runtime,
            self.runtime.unwrap(self.model),
            self.tokens.splits[split],
            max_tokens=self.config.eval_tokens,
            padded=self.padded,
        )

    def save_best(self, step: int) -> None:
        """Write the model folder; the main process has all weights."""
        if self.runtime.is_main:
            assert self.best is not None
            config = self.config
            card = {
                "run_id": config.run_id,
                "head": config.head,
                "dataset": config.dataset,
                "encoder": config.encoder,
                "labels": ", ".join(self.tokens.label_names),
                "step": step,
                "folder": (self.folder.path / "best").absolute(),
            }
            with self.folder.best_model(step) as aside:
                save_model(self.runtime.unwrap(self.model), self.encoder, aside, card, self.best)

    def score_test(self, totals: Totals) -> None:
        """Score the test set with the best model, once, and write what a sweep reads."""
        assert self.best is not None
        seconds = totals.seconds()
        if self.runtime.is_main:
            load_weights(self.runtime.unwrap(self.model), self.folder.path / "best")
        self.runtime.copy_from_main(self.model)
        result = self.evaluate("test")
        record = as_record(result.counts, result.loss)
        self.record("test", self.best["step"], flatten("test", record))
        if not self.runtime.is_main:
            return
        split = self.tokens.splits["test"]
        save_predictions(
            self.folder.path / "predictions.parquet", split.row_ids, split.labels, result.scores
        )
        self.folder.finish(self.summary(record, totals, seconds))
        self.say(table(record, "test"))
        self.say(f"run folder: {self.folder.path}")

    def summary(self, test: dict[str, Any], totals: Totals, seconds: float) -> dict[str, Any]:
        """Return all that a sweep reads of a run."""
        config = self.config
        return {
            "run_id": config.run_id,
            "config_hash": config.hash(),
            "config": config.identity(),
            "data_fingerprint": self.tokens.folder.name,
            "test": test,
            "validation": self.best,
            "steps_skipped": totals.skipped,
            "world_size": self.runtime.world_size,
            "train_seconds": round(seconds, 3),
            "device_seconds": round(seconds * self.runtime.world_size, 3),
            "reviews_per_s": totals.rows / seconds,
            "tokens_per_s": totals.tokens / seconds,
            "padding": 1 - totals.tokens / max(1.0, totals.computed_tokens),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }

    def record(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Write figures to the journal, then mirror them."""
        if self.runtime.is_main:
            self.folder.log(kind, step, values)
            self.tracker.log(step, values)

    def finish_tracking(self) -> None:
        """End the mirrored run."""
        self.tracker.finish()

    def say(self, text: str) -> None:
        """Print on the main process."""
        if self.runtime.is_main:
            say(text)


def _is_padded(config: RunConfig, runtime: Runtime) -> bool:
    """Resolve `batching: auto`: packed where there is a back end for it."""
    if config.batching == "auto":
        return runtime.device.type != "cpu"
    return config.batching == "padded"


def _score(record: dict[str, Any], config: RunConfig) -> float:
    """Return the metric that picks the best model, larger being better."""
    if config.best_metric == "loss":
        return -record["loss"]
    return record[config.best_metric]["value"] or 0.0


def flatten(prefix: str, record: dict[str, Any]) -> dict[str, Any]:
    """Turn a metrics record into flat names: eval/f1, eval/f1_low, eval/tp ..."""
    flat = {f"{prefix}/loss": record["loss"], f"{prefix}/n": record["n"]}
    for name in ("accuracy", "precision", "recall", "f1"):
        flat[f"{prefix}/{name}"] = record[name]["value"]
        flat[f"{prefix}/{name}_low"] = record[name]["low"]
        flat[f"{prefix}/{name}_high"] = record[name]["high"]
    return flat | {f"{prefix}/{name}": count for name, count in record["confusion"].items()}
