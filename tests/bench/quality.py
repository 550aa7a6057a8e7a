"""Are models as good as the Hugging Face Trainer's, on the same rows, encoder, epochs and rate?

    python -m tests.bench.quality --seeds 3

The peer is stock `AutoModelForSequenceClassification` under `Trainer` with its best flags (bf16,
fused AdamW, batches of like length), given the very tokens of our cache.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

from toolkit.config import RunConfig, parse
from toolkit.console import say
from toolkit.prepare import prepare_data
from toolkit.train import main as train_main

COMMON = ["--epochs=3", "--lr=5e-5", "--batch_size=16", "--track=none"]


def ours(head: str, seed: int, folder: Path) -> float:
    """Train with the toolkit; return the test accuracy of the best model."""
    name = f"{head}-{seed}"
    flags = [f"--head={head}", f"--seed={seed}", f"--output_dir={folder}", f"--run_id={name}"]
    assert train_main([*COMMON, *flags]) == 0
    return json.loads((folder / name / "summary.json").read_text())["test"]["accuracy"]["value"]


def trainer(seed: int, folder: Path, config: RunConfig) -> float:
    """Train with the peer; return the test accuracy of its model with the best validation F1."""
    import torch
    from sklearn.metrics import f1_score
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    from tests.bench.peers import rows_of

    tokens, encoder = prepare_data(config)
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2)

    rows = {name: rows_of(split) for name, split in tokens.splits.items()}
    peer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder / f"trainer-{seed}"),
            num_train_epochs=config.epochs,
            learning_rate=config.lr,
            per_device_train_batch_size=config.batch_size,
            per_device_eval_batch_size=64,
            warmup_steps=config.warmup_ratio,
            weight_decay=config.weight_decay,
            bf16=config.precision == "bf16",
            train_sampling_strategy="group_by_length",
            optim="adamw_torch_fused",
            eval_strategy="epoch",
            save_strategy="epoch",
            load_best_model_at_end=True,
            metric_for_best_model="f1",
            seed=seed,
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        data_collator=DataCollatorWithPadding(AutoTokenizer.from_pretrained(encoder)),
        compute_metrics=lambda out: {"f1": f1_score(out.label_ids, out.predictions.argmax(-1))},
    )
    peer.train()
    predicted = peer.predict(rows["test"])
    return float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())


def main() -> None:
    """Measure and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--heads", nargs="+", default=["v1", "v2", "v3"])
    arguments = parser.parse_args()
    found: dict[str, list[float]] = {}
    seeds = range(arguments.seeds)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for head in arguments.heads:
            found[head] = [ours(head, seed, folder) for seed in seeds]
            say(json.dumps(found))
        # last: it sets Accelerate's state, which ours refuses to take over
        configs = {seed: parse([*COMMON, f"--seed={seed}"]) for seed in seeds}
        found["trainer"] = [trainer(seed, folder, config) for seed, config in configs.items()]
    means = {name: float(np.mean(values)) for name, values in found.items()}
    say(json.dumps({"accuracy": found, "mean": means}, indent=2))


if __name__ == "__main__":
    main()
