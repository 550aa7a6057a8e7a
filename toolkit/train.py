"""Train one classifier.

    accelerate launch toolkit/train.py --head v2
    accelerate launch --config_file launch/ddp.yaml toolkit/train.py --head v3 --dataset amazon_polarity
    python -m toolkit train --head v1 --train_rows 500          one process

Reads the configuration, prepares the data, and only then imports torch: what is wrong with either is
said within a second. `run.py` then wires the parts together; the loop is in `engine/loop.py`.
"""

import os
import sys
from pathlib import Path

if __package__ in (None, ""):
    # Started by path: Python put this folder first on sys.path, where our folders named `data`,
    # `model` or `record` would shadow libraries of that name. The repository's root belongs there.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import time
import traceback
from contextlib import ExitStack

from toolkit.assets import encoder_fingerprint
from toolkit.config import RunConfig, cache_dir, parse, part
from toolkit.console import complain, flush, say
from toolkit.data.report import describe
from toolkit.data.steps import Stream
from toolkit.errors import CheckpointError, ConfigError, Preempted, ToolkitError
from toolkit.imports import uncollected
from toolkit.launcher import Turn, refuse_contradictions
from toolkit.prepare import prepare_data, refuse_no_steps
from toolkit.record.checkpoints import Origin, choose, differences
from toolkit.record.journal import RunFolder
from toolkit.record.metrics import table
from toolkit.record.tracking import give_back, is_agents_run, replay, wandb_arguments
from toolkit.redact import redact_values
from toolkit.restart import is_in_place, is_restarted
from toolkit.stop import Stop

CLAIM_SECONDS = 30.0
"""How long a start waits for the run before it, which may be saving after its launcher has died."""


def main(argv: list[str] | None = None) -> int:
    """Train as the arguments say; return the exit code."""
    turn = Turn()
    try:
        with Stop() as stop:
            return start(parse(sys.argv[1:] if argv is None else argv), turn, stop)
    except Preempted as error:
        if turn.is_first:
            complain(str(error))
        return error.exit_code
    except (ToolkitError, OSError) as error:
        if turn.is_first or isinstance(error, OSError):  # which may be this rank's alone
            complain(f"error: {error}")
        if not turn.is_first:
            time.sleep(5)  # the launcher ends all processes with the first that fails: let it speak
        return getattr(error, "exit_code", 1)
    except Exception:
        complain(traceback.format_exc())  # not Python itself, which would show secrets too
        return 1


def start(config: RunConfig, turn: Turn, stop: Stop) -> int:
    """Prepare the data and train; record in the run folder how it ends."""
    folder = RunFolder(config.folder)
    if turn.is_main and not config.dry_run and not folder.in_use():
        stop.file = folder.stop_file
    try:
        refuse_contradictions(config)
        with stop.raising(), turn.in_order():
            tokens, encoder = prepare_data(config)
        refuse_no_steps(config, tokens)
        weights = encoder_fingerprint(encoder, cache_dir(config))
        origin = Origin(config.identity(), config.hash(), tokens.folder.name, weights)
    except Exception as error:
        # a library may have made something else of `Preempted`
        failure = Preempted() if stop.requested else error
        if turn.is_main and not config.dry_run:
            other = "io_error" if isinstance(failure, OSError) else "crashed"
            folder.record_failure(getattr(failure, "status", other), str(failure))
            if config.track == "wandb" and is_agents_run() and stop.by_scheduler:
                give_back(wandb_arguments(*config.wandb_place))
        raise failure from error
    if folder.status == "completed" and not (config.overwrite and not has_begun(folder)):
        return show_result(config, origin, folder, turn)
    if turn.is_main:
        say(describe(tokens))
        say(describe_plan(config, len(tokens.splits["train"])))
    if config.dry_run:
        if turn.is_main:
            say("Dry run: nothing was trained.")
        return 0
    with ExitStack() as stack:
        point = None
        if turn.is_main:
            stack.enter_context(folder.claim(CLAIM_SECONDS))
            stop.file = folder.stop_file
            point = open_folder(config, origin, folder)
        with uncollected():
            from toolkit.run import run  # imports torch

        stack.callback(turn.forget)  # after a run all have met, and so had their turn
        return run(config, tokens, encoder, folder, origin, point, stop)


def open_folder(config: RunConfig, origin: Origin, folder: RunFolder) -> Path | None:
    """Make the claimed run folder ready; return the checkpoint to go on from, or None.

    Raises:
        CheckpointError: when there are checkpoints and none can be used.
        ConfigError: when they are of another configuration, data or encoder.
    """
    resume = config.resume
    if config.overwrite and folder.status == "completed":
        if resume not in ("auto", "strict", "none"):
            hint = f"leave out --resume {resume}, or choose another --run_id"
            raise ConfigError([f"--overwrite begins at the first step: {hint}"])
        resume = "none"
    elif resume == "none" and has_begun(folder):
        say("This start has begun before: it goes on, whatever --resume says")
        resume = "auto"
    if resume != "none" and folder.status == "completed":
        raise ConfigError(
            [f"{folder.path} was completed while this start waited; start again to see its result"]
        )
    if folder.has_gone_on_from(resume):
        say(f"{folder.path} has gone on from {resume} before, and has newer checkpoints of its own")
        resume = "auto"
    try:
        point = choose(resume, folder.checkpoints, origin)
    except CheckpointError as error:
        folder.set_status(error.status, message=str(error))
        raise
    folder.open(point, is_own=is_in_place(), anew=resume == "none")
    return point


def has_begun(folder: RunFolder) -> bool:
    """Tell whether this very start, by its launcher or by SLURM, has had the folder before."""
    return is_restarted() and folder.job() == os.environ.get("SLURM_JOB_ID")


def describe_plan(config: RunConfig, num_rows: int) -> str:
    """Say what a run would do."""
    stream = part(Stream, config, num_rows=num_rows)
    epochs = stream.num_slots / num_rows
    return (
        f"Run {config.run_id}: head {config.head}, {stream.num_steps} steps of {config.batch_size} "
        f"reviews, {stream.num_slots} reviews in all ({epochs:g} epochs of {num_rows})"
    )


def show_result(config: RunConfig, origin: Origin, folder: RunFolder, turn: Turn) -> int:
    """Show the result of a completed run, if it is a run of these settings, on this data and encoder.

    Raises:
        ConfigError: naming the settings that differ.
    """
    summary = folder.summary()
    made = (summary.get(f"{name}_fingerprint", "") for name in ("data", "encoder"))
    there = Origin(summary["config"], summary["config_hash"], *made)
    if differ := differences(origin, there):
        raise ConfigError(
            [
                f"{folder.path} holds a completed run that is another ({'; '.join(differ)}); "
                "choose another --run_id, or --overwrite to move it aside"
            ]
        )
    if turn.is_main:
        if config.track == "wandb" and is_agents_run():
            shown = redact_values(config.identity())
            replay(folder.path / "metrics.jsonl", wandb_arguments(*config.wandb_place), shown)
        say(table(summary["test"], "test"))
        say(f"run folder: {folder.path}\nThis run is complete. To train it again: --overwrite")
    return 0


if __name__ == "__main__":
    exit_code = main()
    if exit_code and "torch" in sys.modules:
        # a run that failed has left its process group standing, whose teardown may hang: `Runtime.end`
        flush()
        os._exit(exit_code)
    sys.exit(exit_code)
