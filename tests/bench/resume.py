"""How long from the start of a run to its first step: fresh, and going on from late steps?

    python -m tests.bench.resume --rows 3600000

Resuming is arithmetic, so it must not depend on how many steps lie behind. The checkpoints at late
steps are a real one whose step is written anew.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet

from tests.programs import TRAIN
from tests.tiny import make_encoder, reviews
from toolkit.console import say
from toolkit.engine.checkpoint import read_progress
from toolkit.files import write_json
from toolkit.record.checkpoints import describe_file, folder_name, read_manifest, write_manifest

BATCH = 256


def write_data(path: Path, rows: int) -> Path:
    """Write a Parquet file of short reviews, as large as they are: a start may have to read it."""
    texts, labels = zip(*reviews(1000), strict=True)
    table = pyarrow.concat_tables(
        [pyarrow.table({"text": texts, "label": labels})] * (rows // 1000)
    )
    pyarrow.parquet.write_table(table, path, compression="none", use_dictionary=False)
    return path


def move_to_step(checkpoint: Path, step: int) -> None:
    """Make a checkpoint one of another step."""
    target = checkpoint.with_name(folder_name(step))
    checkpoint.rename(target)
    notes, manifest = read_progress(target), read_manifest(target)
    notes["progress"] |= {"step": step, "eval_due": False}
    write_json(target / "progress.json", notes)
    manifest["files"]["progress.json"] = describe_file(target / "progress.json")
    write_manifest(target, manifest | {"step": step})


def seconds_to_first_step(flags: list[str], run: Path) -> float:
    """Start training; return the seconds until the first new step is in the journal."""
    journal = run / "metrics.jsonl"
    before = journal.stat().st_size if journal.exists() else 0
    command = [sys.executable, str(TRAIN), *flags]
    started = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while not journal.exists() or journal.stat().st_size <= before:
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.01)
    seconds = time.perf_counter() - started
    process.terminate()
    process.wait(60)
    return seconds


def main() -> None:
    """Measure and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        (place / "encoder").mkdir()
        held_out = min(1000, options.rows // 10)
        flags = [
            f"--encoder={make_encoder(place / 'encoder')}",
            f"--dataset={write_data(place / 'train.parquet', options.rows)}",
            f"--cache_dir={place / 'cache'}",
            f"--output_dir={place / 'runs'}",
            "--run_id=x",
            *("--track=none", "--max_length=32", f"--batch_size={BATCH}", "--log_every=1"),
            *(f"--validation_rows={held_out}", f"--test_rows={held_out}", "--epochs=3"),
        ]
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "toolkit", "prepare", *flags], check=True)
        figures: dict[str, object] = {"rows": options.rows}
        figures["prepare_seconds"] = time.perf_counter() - started
        run = place / "runs" / "x"
        steps = 3 * (options.rows * 4 // 5 - held_out) // BATCH
        late = {step for step in (10, steps // 2, steps - 100) if step >= 10}
        fresh, resumed = [], {step: [] for step in sorted(late)}
        for _ in range(options.repeats):
            shutil.rmtree(place / "runs", ignore_errors=True)
            fresh.append(seconds_to_first_step(flags, run))
            for step, seconds in resumed.items():
                [checkpoint] = sorted((run / "checkpoints").glob("step-*"))[-1:]
                move_to_step(checkpoint, step)
                for other in (run / "checkpoints").glob("step-*"):
                    if other.name != folder_name(step):
                        shutil.rmtree(other)
                seconds.append(seconds_to_first_step(flags, run))
        figures["fresh_seconds"] = fresh
        figures["resumed_seconds"] = resumed
    say(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
