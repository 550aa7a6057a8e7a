"""BERT-base's shape with random weights: a benchmark wants its speed, and there may be no hub."""

import shutil
from pathlib import Path

from toolkit.assets import MINILM, TOKENIZER_FILES, fetch


def write_encoder(folder: Path) -> Path:
    """Write the model; no tokenizer."""
    from transformers import BertConfig, BertModel

    BertModel(BertConfig()).save_pretrained(folder)
    return folder


def write_whole_encoder(folder: Path, cache: Path) -> Path:
    """Write the model and MiniLM's tokenizer, which has the same vocabulary."""
    write_encoder(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(fetch(MINILM, cache) / name, folder)
    return folder
