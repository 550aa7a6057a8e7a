"""How fast are texts scored with a saved model, and with a stock one around the same encoder?

    python -m tests.bench.predict runs/v2-a7b2194d5d/best

Ours through `Classifier`; a stock classifier as its users score texts: some at a time, in the order that
they come in, padded to the longest of them, under autocast. In turns, in this process.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

from tests.bench.reviews import amazon_like
from tests.bench.steps import machine
from toolkit.config import RunConfig, cache_dir
from toolkit.console import say
from toolkit.predict import Classifier

AT_ONCE = 32


@torch.inference_mode()
def stock(model: BertForSequenceClassification, tokenizer: BertTokenizer, texts: list[str]) -> None:
    """Score texts as a user of transformers does."""
    options = {"padding": True, "truncation": True}
    for start in range(0, len(texts), AT_ONCE):
        inputs = tokenizer(texts[start : start + AT_ONCE], return_tensors="pt", **options)
        with torch.autocast(model.device.type, torch.bfloat16):
            model(**inputs.to(model.device)).logits.float().softmax(-1).cpu()


def seconds(score: Callable[[list[str]], object], texts: list[str]) -> float:
    """Time a pass."""
    started = time.perf_counter()
    score(texts)
    return time.perf_counter() - started


def main(arguments: list[str] | None = None) -> None:
    """Print reviews/s of each pass; the first ones load kernels."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="best of a run folder")
    parser.add_argument("--rows", type=int, default=640)
    parser.add_argument("--passes", type=int, default=4)
    options = parser.parse_args(arguments)
    texts = [text for text, _ in amazon_like(cache_dir(RunConfig()), options.rows)]
    ours = Classifier(options.folder)
    config: Any = ours.model.config
    shape = BertConfig.from_dict(config.to_dict() | {"model_type": "bert"})
    stock_model: Any = BertForSequenceClassification.from_pretrained(options.folder, config=shape)
    model = stock_model.eval().to(ours.runtime.device)
    tokenizer = BertTokenizer.from_pretrained(options.folder)
    ways = {"ours": ours.scores, "stock": partial(stock, model, tokenizer)}
    for _ in range(options.passes):
        rates = {name: round(len(texts) / seconds(score, texts), 1) for name, score in ways.items()}
        say(
            json.dumps(
                rates | {"ours over it": round(rates["ours"] / rates["stock"], 2)} | machine()
            )
        )


if __name__ == "__main__":
    main()
