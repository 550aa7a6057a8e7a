"""How fast are we, next to the Hugging Face Trainer and to Accelerate's example loop?

    python -m tests.bench --repeats 5                              45 minutes on two cores
    python -m tests.bench --dataset snippets --rows 1600 --test_rows 560     short reviews
    python -m tests.bench.gpu                                      all that is asked of a GPU

All train the same rows with the same encoder, tokens, batch size, epochs, rate and threads, each run
in a process of its own, in turns. The first of two epochs warms up. Rows have the lengths of Amazon
Polarity. Ratios are of non-padding tokens/s within a turn; `share` is of the matrix rate that this
machine reached in the same session.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.bench import limits, report
from tests.bench.encoder import write_whole_encoder
from tests.bench.reviews import write_hub_folder
from tests.programs import TRAIN, run_for_peak
from toolkit.assets import MINILM, fetch
from toolkit.config import RunConfig, cache_dir, parse
from toolkit.console import say
from toolkit.data.cache import TokenCache
from toolkit.files import write_json
from toolkit.machine import usable_cores
from toolkit.prepare import prepare_data

PEERS = (
    "run_classification",
    "trainer_dynamic",
    "trainer_best",
    "trainer_tuned",
    "accelerate_loop",
)
CONTENDERS = ("ours", *PEERS)
IN_FP32 = ("run_classification", "trainer_dynamic", "accelerate_loop")
ON_A_GPU = ("ours_compiled", "trainer_compiled")
"""On a CPU the lengths make the Trainer's model compile again and again, and ours gained 4 %, once."""
IN_BF16 = "trainer_best_in_bf16"
"""The best flags, and `bf16_full_eval`: weights are in bf16, too, when it scores."""
VALIDATION_ROWS = 32
"""By their loss ours picks the model that it tests: nearly always the last one, which peers test."""
DATASETS = ("amazon_polarity", "snippets")
"""The first as far as lengths go; the second, short ones, as it is, 1,690 rows of training at most."""
SHAPE_ONLY = "bert-base-shape"
"""See `tests.bench.encoder`."""


def shared_parser(about: str | None = __doc__) -> argparse.ArgumentParser:
    """Return the options that every contender has to know, and the first line about the program."""
    parser = argparse.ArgumentParser(description=(about or "").split("\n")[0])
    parser.add_argument("--encoder", default="minilm")
    parser.add_argument("--dataset", choices=DATASETS, default=DATASETS[0])
    parser.add_argument("--rows", type=int, default=480, help="training rows of an epoch")
    parser.add_argument("--test_rows", type=int, default=640)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--eval_batch", type=int, default=16, help="rows in a peer's evaluation")
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--threads", type=int, default=len(usable_cores()))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="scratch, with the data in it")
    return parser


def flags_of(options: argparse.Namespace) -> list[str]:
    """Return our flags for the same run."""
    written = [f"--dataset_path={options.folder / 'hub'}"]
    chosen = [f"--train_rows={options.rows}", f"--test_rows={options.test_rows}"]
    return [
        *(f"--encoder={options.encoder}", f"--dataset={options.dataset}"),
        *(written if options.dataset == DATASETS[0] else chosen),
        f"--cache_dir={options.folder / 'cache'}",
        f"--output_dir={options.folder / 'runs'}",
        *("--head=v1", "--epochs=2", "--best_metric=loss", f"--validation_rows={VALIDATION_ROWS}"),
        f"--log_every={report.log_every(options.rows, options.batch_size)}",
        *(f"--batch_size={options.batch_size}", f"--max_length={options.max_length}"),
        *(f"--lr={options.lr}", f"--seed={options.seed}", f"--cpu_threads={options.threads}"),
        *("--track=none", "--run_id=ours", "--overwrite"),
    ]


def config_of(options: argparse.Namespace) -> RunConfig:
    """Return our configuration of the same run."""
    return parse(flags_of(options))


def prepare_encoder(options: argparse.Namespace) -> None:
    """Share the user's downloads; or make an encoder of BERT-base's shape, whose speed is all we want."""
    shared = cache_dir(RunConfig()) / "assets"
    fetch(MINILM, shared.parent)
    (options.folder / "cache").mkdir()
    (options.folder / "cache" / "assets").symlink_to(shared)
    if options.encoder == SHAPE_ONLY:
        options.encoder = str(write_whole_encoder(options.folder / "encoder", shared.parent))


def write_reviews(options: argparse.Namespace) -> None:
    """Write the data, with rows of their own for our validation split, unless they are there."""
    if options.dataset != DATASETS[0]:
        return
    hub, train_rows = options.folder / "hub", options.rows + VALIDATION_ROWS
    write_hub_folder(cache_dir(RunConfig()), hub, train_rows, options.test_rows)


def ours(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train with the toolkit; return the figures of its second epoch."""
    flags = ["--compile"] if name == "ours_compiled" else []
    peak, _ = run_for_peak(TRAIN, *flags_of(options), *flags)
    folder = options.folder / "runs" / "ours"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    [test] = [line for line in lines if line["kind"] == "test"]
    if torch.cuda.is_available():  # of the device then, as peers say it
        summary = json.loads((folder / "summary.json").read_text())
        peak = summary["peak_memory_mib"] * 2**20
    return second_epoch(train, options.rows, options.batch_size) | {
        "eval_seconds": options.test_rows / test["test/reviews_per_s"],
        "accuracy": test["test/accuracy"],
        "peak": peak,
    }


def second_epoch(lines: list[dict[str, Any]], rows: int, batch_size: int) -> dict[str, float]:
    """Return the figures of the second of two epochs of so many rows, from the log of both."""
    second = [line for line in lines if line["step"] > rows // batch_size]
    chunk = report.log_every(rows, batch_size) * batch_size
    in_steps = [chunk / line["train/reviews_per_s"] for line in second]
    # what else happens between log lines; the first line of the epoch follows an evaluation
    outside = second[-1]["time"] - second[0]["time"] - sum(in_steps[1:])
    return {
        "seconds": sum(in_steps) + outside * len(second) / (len(second) - 1),
        "loss": statistics.mean(line["train/loss"] for line in second),
        "padding": statistics.mean(line["train/padding"] for line in second),
    }


def peer(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train with a peer, in a process of its own."""
    known = vars(shared_parser().parse_args([]))
    flags = [f"--{key}={getattr(options, key)}" for key in known]
    peak, text = run_for_peak("-m", "tests.bench.peers", name, *flags)
    return {"peak": peak} | json.loads(text.splitlines()[-1])


def measure(name: str, options: argparse.Namespace, tokens: TokenCache) -> dict[str, float]:
    """Run one contender; return rates, loss, accuracy, padding's share and peak memory."""
    found = ours(name, options) if name.startswith("ours") else peer(name, options)
    train = tokens.splits["train"]
    count = int(train.offsets[-1])
    return {
        "reviews_per_s": len(train) / found["seconds"],
        "tokens_per_s": count / found["seconds"],
        "eval_reviews_per_s": options.test_rows / found["eval_seconds"],
        "loss": found["loss"],
        "accuracy": found["accuracy"],
        "padding": found["padding"],
        "peak_MiB": found.get("memory", found["peak"] / 2**20),
    }


def take_turns(options: argparse.Namespace, tokens: TokenCache) -> list[report.Turn]:
    """Run every contender in turn, with another seed each time; print what came out at once."""
    turns: list[report.Turn] = []
    for seed in range(options.repeats):
        options.seed = seed
        turns.append({})
        for name in report.order(options.only, seed):
            turns[-1][name] = measure(name, options, tokens)
            say(json.dumps({name: turns[-1][name]}))
    return turns


def main(arguments: list[str] | None = None) -> None:
    """Measure all, write JSON and print tables; `arguments` are those of the command by default."""
    parser = shared_parser()
    parser.add_argument("--repeats", type=int, default=5)
    default = CONTENDERS + (ON_A_GPU if torch.cuda.is_available() else ())
    parser.add_argument(
        "--only", nargs="+", choices=(*CONTENDERS, *ON_A_GPU, IN_BF16), default=default
    )
    parser.add_argument("--out", type=Path, default=Path("bench.json"), help="all figures as JSON")
    options = parser.parse_args(arguments)
    if options.rows % options.batch_size or options.rows < 2 * options.batch_size:
        parser.error(
            f"--rows got {options.rows}, allowed are multiples of --batch_size {options.batch_size}, "
            f"{2 * options.batch_size} or more: both epochs are to have the same steps"
        )
    options.out.parent.mkdir(parents=True, exist_ok=True)  # not found out half an hour later
    with tempfile.TemporaryDirectory() as scratch:
        options.folder = Path(scratch)
        prepare_encoder(options)
        write_reviews(options)
        tokens, encoder = prepare_data(config_of(options))
        peaks = limits.measure(options.threads)
        turns = take_turns(options, tokens)
        train = tokens.splits["train"]
        flops = {
            name: limits.flops_of(encoder, train, packed=name == "ours")
            for name in ("ours", "theirs")
        }
    figures = report.summary(turns, peaks, flops, IN_FP32)
    write_json(options.out, figures | {"turns": turns})
    report.show(figures)
    say(f"\nAll of it, ranges and turns included: {options.out}")


if __name__ == "__main__":
    main()
