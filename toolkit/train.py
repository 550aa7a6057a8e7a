"""Train one classifier.

    accelerate launch toolkit/train.py --head v2
    accelerate launch --config_file launch/ddp.yaml toolkit/train.py --head v3 --dataset amazon_polarity
    python -m toolkit train --head v1 --train_rows 500          one process

Reads the configuration, prepares the data, and only then imports torch: what is wrong with either is
said within a second. `run.py` then wires the parts together; the loop is in `engine/loop.py`.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    # Started by path: Python put this folder first on sys.path, where our folders named `data`,
    # `model` or `record` would shadow libraries of that name. The repository's root belongs there.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import os

from toolkit.config import RunConfig, parse
from toolkit.console import complain, say
from toolkit.data.report import describe
from toolkit.data.steps import Stream
from toolkit.errors import ToolkitError
from toolkit.prepare import part, prepare_data
from toolkit.record.journal import RunFolder
from toolkit.record.metrics import table


def main(argv: list[str] | None = None) -> int:
    """Train as the arguments say; return the exit code."""
    is_main = int(os.environ.get("RANK", "0")) == 0
    try:
        config = parse(sys.argv[1:] if argv is None else argv)
        return start(config)
    except ToolkitError as error:
        if is_main:
            complain(f"error: {error}")
        return error.exit_code


def start(config: RunConfig) -> int:
    """Prepare the data and train; record in the run folder how it ends."""
    is_main = int(os.environ.get("RANK", "0")) == 0
    folder = RunFolder(Path(config.output_dir) / str(config.run_id))
    if folder.status == "completed" and not config.overwrite:
        if is_main:
            show_result(folder)
            say("This run is complete. To train it again: --overwrite")
        return 0
    try:
        tokens, encoder = prepare_data(config)
    except ToolkitError as error:
        if is_main and folder.status is None:
            folder.set_status(error.status, message=str(error))
        raise
    if is_main:
        say(describe(tokens))
        say(describe_plan(config, len(tokens.splits["train"])))
    if config.dry_run:
        return 0
    from toolkit.run import run  # imports torch, which takes a second

    return run(config, tokens, encoder, folder)


def describe_plan(config: RunConfig, num_rows: int) -> str:
    """Say what a run would do."""
    stream = part(Stream, config, num_rows=num_rows)
    epochs = stream.num_slots / num_rows
    return (
        f"Run {config.run_id}: head {config.head}, {stream.num_steps} steps of {config.batch_size} "
        f"reviews, {stream.num_slots} reviews in all ({epochs:g} epochs of {num_rows})"
    )


def show_result(folder: RunFolder) -> None:
    """Print the test metrics of a completed run and where it is."""
    say(table(folder.summary()["test"], "test"))
    say(f"run folder: {folder.path}")


if __name__ == "__main__":
    sys.exit(main())
