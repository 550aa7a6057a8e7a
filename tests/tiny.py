"""A tiny BERT and tiny reviews."""

import csv
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.data.cache import TokenCache, TokenSplit
from toolkit.data.prepare import DataSpec, prepare
from toolkit.data.sources import open_source

if TYPE_CHECKING:
    from toolkit.engine.trainer import Trainer

POSITIVE = ["great", "love", "perfect", "excellent", "works", "good"]
NEGATIVE = ["bad", "broken", "awful", "poor", "waste", "hate"]
NEUTRAL = ["the", "phone", "battery", "it", "is", "a", "camera", "and", "very", "this", "sound"]


def make_encoder(folder: Path) -> Path:
    """Write a BERT with random weights into an empty folder."""
    import torch
    from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
    from tokenizers.models import WordPiece
    from transformers import BertConfig, BertModel

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *POSITIVE, *NEGATIVE, *NEUTRAL]
    words += [chr(code) for code in range(ord("a"), ord("z") + 1) if chr(code) not in words]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]"}'
    )
    return folder


def reviews(count: int) -> list[tuple[str, str]]:
    """Make separable reviews of very different lengths: (text, label)."""
    rows = []
    for number in range(count):
        label = ("neg", "pos")[number % 2]
        words = (NEGATIVE, POSITIVE)[number % 2]
        filler = [NEUTRAL[(number * 7 + k) % len(NEUTRAL)] for k in range((number * 5) % 23)]
        rows.append((" ".join([*filler, words[number % 6], words[(number // 2) % 6]]), label))
    return rows


def make_data(folder: Path) -> Path:
    """Write train.csv (120 rows) and test.csv (41 rows) into a folder."""
    for name, count in (("train", 120), ("test", 41)):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *reviews(count)])
    return folder


def build_cache(spec: DataSpec, encoder: Path, cache: Path) -> TokenCache:
    """Prepare a data set as `toolkit.prepare` does."""
    return prepare(spec, open_source(spec, cache), encoder, cache)


def make_trainer(split: TokenSplit, encoder: Path, **settings: Any) -> "Trainer":
    """Join a model of one process with a run's settings and these rows."""
    from toolkit.build import make_trainer as join
    from toolkit.config import RunConfig, part
    from toolkit.engine.runtime import Runtime
    from toolkit.model.classifier import ClassifierSpec, build_classifier

    config = replace(RunConfig(batch_size=16, precision="fp32", max_steps=3), **settings)
    runtime = Runtime(config.precision, 1)
    model, _ = build_classifier(part(ClassifierSpec, config), encoder, ("neg", "pos"))
    trainer = join(config, TokenCache(Path(), {}, {"train": split}), runtime, model)
    trainer.model.train()
    return trainer
