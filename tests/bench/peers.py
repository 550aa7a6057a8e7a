"""What we are compared with: the same encoder, tokens, batch size, epochs and threads, stock code.

    python -m tests.bench.peers NAME --rows 640 ...        one run, figures as JSON

Each trains two epochs; the first warms up, the second counts. `trainer_best` is the one to beat.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_linear_schedule_with_warmup,
)
from transformers.trainer_pt_utils import LengthGroupedSampler, get_length_grouped_indices

from tests.bench.report import log_every
from toolkit.console import say
from toolkit.data.cache import TokenSplit

Row = dict[str, Any]
Figures = dict[str, float]


def load(encoder: Path, **settings: Any) -> Any:
    """Return the stock classifier; its head starts as ours does, or losses would tell heads apart."""
    model = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2, **settings)
    torch.nn.init.xavier_uniform_(model.classifier.weight)
    return model


def rows_of(split: TokenSplit) -> list[Row]:
    """Return a split as a list of rows for a collator."""
    cut = split.offsets
    return [
        {
            "input_ids": split.tokens[cut[row] : cut[row + 1]].tolist(),
            "labels": int(split.labels[row]),
        }
        for row in range(len(split))
    ]


def collator(multiple: int, length: int | None) -> Callable[[list[Row]], dict[str, torch.Tensor]]:
    """Pad as `DataCollatorWithPadding` does, to the longest row or to a fixed length; [PAD] is 0."""

    def collate(rows: list[Row]) -> dict[str, torch.Tensor]:
        longest = length or max(len(row["input_ids"]) for row in rows)
        width = -(-longest // multiple) * multiple
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(rows):
            tokens = torch.tensor(row["input_ids"])
            ids[place, : len(tokens)] = tokens
            mask[place, : len(tokens)] = 1
        labels = torch.tensor([row["labels"] for row in rows])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    return collate


class AsInLongEpochs(LengthGroupedSampler):
    """Sorts 50 batches at a time, or all there are.

    The Trainer sorts a quarter of an epoch at most, so in short ones it pads more than its users see.
    """

    def __iter__(self) -> Iterator[int]:
        many = min(50, -(-len(self.lengths) // self.batch_size))
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, many, self.generator))

    @classmethod
    def instead_of(cls, sampler: LengthGroupedSampler) -> "AsInLongEpochs":
        """Return one in its place."""
        return cls(sampler.batch_size, lengths=sampler.lengths, generator=sampler.generator)


class LongEpochsTrainer(Trainer):
    """Groups by length as in long epochs, and counts the places that it trains on, padding included."""

    places = 0

    def _get_train_sampler(self, *dataset: Any) -> Any:
        return self._sorting(super()._get_train_sampler(*dataset))

    def _get_eval_sampler(self, *dataset: Any) -> Any:
        return self._sorting(super()._get_eval_sampler(*dataset))

    def _sorting(self, sampler: Any) -> Any:
        if self.args.train_sampling_strategy != "group_by_length":
            return sampler
        return AsInLongEpochs.instead_of(sampler)  # fails if it does not sort, in evaluation, too

    def training_step(
        self, model: Any, inputs: dict[str, torch.Tensor], *rest: Any, **more: Any
    ) -> torch.Tensor:
        """Count, then train."""
        self.places += inputs["input_ids"].numel()
        return super().training_step(model, inputs, *rest, **more)


def padding(train: TokenSplit, places: int) -> float:
    """Return the share of padding in the places of two epochs."""
    return 1 - 2 * int(train.offsets[-1]) / places


class Clock(TrainerCallback):
    """Notes when epochs end."""

    def __init__(self) -> None:
        self.ends = [0.0]

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        _finish_device()
        self.ends.append(time.monotonic())


def _finish_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def make_trainer(
    encoder: Path, rows: list[Row] | None, options: argparse.Namespace, **settings: Any
) -> LongEpochsTrainer:
    """Return the Hugging Face Trainer for these training rows; it predicts without any."""
    model = load(encoder, **settings.pop("model", {}))
    multiple, length = settings.pop("multiple", 1), settings.pop("length", None)
    return LongEpochsTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(options.folder),
            num_train_epochs=2,
            learning_rate=options.lr,
            warmup_steps=0.1,
            weight_decay=0.01,
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=options.eval_batch,
            seed=options.seed,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=log_every(len(rows), options.batch_size) if rows else 1,
            **settings,
        ),
        train_dataset=rows,
        data_collator=collator(multiple, length),
    )


def predict(peer: LongEpochsTrainer, rows: list[Row]) -> tuple[float, float]:
    """Return what it took in seconds, and the accuracy."""
    started = time.monotonic()
    predicted = peer.predict(rows)
    _finish_device()
    seconds = time.monotonic() - started
    right = predicted.predictions.argmax(-1) == predicted.label_ids
    return seconds, float(np.mean(right))


def trainer(
    settings: Callable[[argparse.Namespace], dict[str, Any]],
    encoder: Path,
    train: TokenSplit,
    test: TokenSplit,
    options: argparse.Namespace,
) -> Figures:
    """Train and predict with the Hugging Face Trainer."""
    peer = make_trainer(encoder, rows_of(train), options, **settings(options))
    clock, tests = Clock(), rows_of(test)
    peer.add_callback(clock)
    peer.train()
    logged = [line for line in peer.state.log_history if "loss" in line]
    losses = [line["loss"] for line in logged if line["epoch"] > 1]
    eval_seconds, accuracy = predict(peer, tests)
    return {
        "seconds": clock.ends[2] - clock.ends[1],
        "eval_seconds": eval_seconds,
        "loss": statistics.mean(losses),
        "accuracy": accuracy,
        "padding": padding(train, peer.places),
    }


def accelerate_loop(
    encoder: Path, train: TokenSplit, test: TokenSplit, options: argparse.Namespace
) -> Figures:
    """Train as Accelerate's example for text classification does: dynamic padding, fp32."""
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    set_seed(options.seed)
    model = load(encoder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
    collate: Any = collator(1, None)
    loader = DataLoader(rows_of(train), options.batch_size, shuffle=True, collate_fn=collate)
    tests = DataLoader(rows_of(test), options.eval_batch, collate_fn=collate)
    steps = 2 * len(loader)
    schedule = get_linear_schedule_with_warmup(optimizer, math.ceil(0.1 * steps), steps)
    model, optimizer, loader, tests, schedule = accelerator.prepare(
        model, optimizer, loader, tests, schedule
    )
    ends, losses, places = [], [], 0
    for _ in range(2):
        model.train()
        for batch in loader:
            places += batch["input_ids"].numel()
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        _finish_device()
        ends.append(time.monotonic())
    started = time.monotonic()
    model.eval()
    right = 0
    for batch in tests:
        with torch.no_grad():
            logits = model(**batch).logits
        found, labels = accelerator.gather_for_metrics((logits.argmax(-1), batch["labels"]))
        right += int((found == labels).sum())
    return {
        "seconds": ends[1] - ends[0],
        "eval_seconds": time.monotonic() - started,
        "loss": float(torch.stack(losses[len(loader) :]).mean()),
        "accuracy": right / len(test),
        "padding": padding(train, places),
    }


def best_flags(**more: Any) -> dict[str, Any]:
    """Return the Trainer's settings that make it fastest, as its documentation advises."""
    # where the device computes, rows are collated beside it; on a CPU that would take its cores
    workers = {"dataloader_num_workers": 4, "dataloader_persistent_workers": True}
    return {
        "bf16": True,
        "train_sampling_strategy": "group_by_length",
        "optim": "adamw_torch_fused",
        "multiple": 8,
        "logging_nan_inf_filter": False,  # would wait for the device in each step
        **(workers if torch.cuda.is_available() else {}),
        **more,
    }


def tuned() -> dict[str, Any]:
    """Return what makes the Trainer's model train faster and is no flag: the same work as ours.

    Without a backward pass the attention that it has by itself is the faster one.
    """
    fastest = {} if torch.cuda.is_available() else {"attn_implementation": "eager"}
    return {"model": {"attention_probs_dropout_prob": 0.0, **fastest}}


TRAINERS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "run_classification": lambda options: {"length": options.max_length},
    "trainer_dynamic": lambda options: {},
    "trainer_best": lambda options: best_flags(),
    "trainer_best_in_bf16": lambda options: best_flags(bf16_full_eval=True),
    "trainer_tuned": lambda options: best_flags(**tuned()),
    "trainer_compiled": lambda options: best_flags(torch_compile=True),
}
"""Settings. `trainer_compiled` is for GPUs: on a CPU the lengths make it compile again and again.
`trainer_best_in_bf16` scores with weights in bf16, which no other does."""
PEERS: dict[str, Callable[..., Figures]] = {
    **{name: partial(trainer, settings) for name, settings in TRAINERS.items()},
    "accelerate_loop": accelerate_loop,
}


def main() -> None:
    """Run one peer and print its figures."""
    from tests.bench.__main__ import config_of, shared_parser
    from toolkit.prepare import prepare_data

    parser: argparse.ArgumentParser = shared_parser()
    parser.add_argument("name", choices=PEERS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    tokens, encoder = prepare_data(config_of(options))
    train, test = tokens.splits["train"], tokens.splits["test"]
    figures = PEERS[options.name](encoder, train, test, options)
    if torch.cuda.is_available():
        figures["memory"] = torch.cuda.max_memory_allocated() / 2**20
    say(json.dumps(figures))


if __name__ == "__main__":
    main()
