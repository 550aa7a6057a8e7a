"""How fast is one pass over a split? As `tests.bench.steps`: one process, a model, random tokens.

    python -m tests.bench.scoring ours_compiled                            a line of JSON for each pass
    python -m tests.bench.scoring trainer_best --eval_batch 64 256         rows that a peer scores at once

The first pass loads kernels or compiles. On a GPU the Trainer starts processes that load rows in each
pass, which weighs in short ones.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from tests.bench.data import make_split
from tests.bench.encoder import write_encoder
from tests.bench.peers import TRAINERS, make_trainer, predict, rows_of
from tests.bench.steps import OURS, build, machine
from toolkit.build import evaluation_tokens
from toolkit.config import RunConfig
from toolkit.console import say
from toolkit.data.cache import TokenSplit
from toolkit.engine.evaluate import evaluate
from toolkit.machine import usable_cores

BATCH = 16
"""Of training, which plays no part."""


def score_ours(
    name: str, split: TokenSplit, encoder: Path, options: argparse.Namespace
) -> Iterator[tuple[str, float]]:
    """Yield what was scored at once, and the seconds of a pass."""
    trainer = build(name, BATCH, encoder, split)
    tokens = options.eval_tokens or evaluation_tokens(RunConfig(), trainer.runtime)
    for _ in range(options.passes):
        found = evaluate(
            trainer.runtime, trainer.model, split, max_tokens=tokens, padded=trainer.padded
        )
        yield f"{tokens} tokens", found.seconds


def score_peer(
    name: str, split: TokenSplit, encoder: Path, options: argparse.Namespace
) -> Iterator[tuple[str, float]]:
    """Yield the same of a peer."""
    torch.set_num_threads(len(usable_cores()))  # as ours has
    given = {"batch_size": 1, "eval_batch": 1, "max_length": split.longest, "lr": 0.0, "seed": 0}
    with tempfile.TemporaryDirectory() as folder:
        settings = argparse.Namespace(folder=folder, **given)
        peer = make_trainer(encoder, None, settings, **TRAINERS[name](settings))
        for size in options.eval_batch:
            peer.args.per_device_eval_batch_size = size
            for _ in range(options.passes):
                yield f"{size} rows", predict(peer, rows_of(split))[0]


def main(arguments: list[str] | None = None) -> None:
    """Measure passes of one contender."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("name", choices=(*OURS, *TRAINERS))
    parser.add_argument("--rows", type=int, default=30_720 if torch.cuda.is_available() else 640)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--eval_batch", type=int, nargs="+", default=[16], help="rows, of a peer")
    parser.add_argument("--eval_tokens", type=int, help="tokens, of ours; default: as in a run")
    parser.add_argument("--encoder", type=Path, help="folder of a BERT; else BERT-base's shape")
    options = parser.parse_args(arguments)
    score = score_ours if options.name in OURS else score_peer
    with tempfile.TemporaryDirectory() as folder:
        encoder = options.encoder or write_encoder(Path(folder) / "encoder")
        split = make_split(Path(folder), options.rows)
        for at_once, seconds in score(options.name, split, encoder, options):
            rates = {"reviews_per_s": round(options.rows / seconds), "seconds": round(seconds, 6)}
            say(json.dumps({"contender": options.name, "at_once": at_once} | rates | machine()))


if __name__ == "__main__":
    main()
