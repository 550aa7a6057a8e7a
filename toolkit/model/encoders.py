"""Which pretrained encoder: a name, a folder or a model of the hub -> a local folder."""

import json
from pathlib import Path
from typing import NamedTuple

from toolkit.assets import MINILM, fetch, hub_folder
from toolkit.errors import DataError


class HubModel(NamedTuple):
    """A model of the hub at a known commit."""

    repository: str
    commit: str


BERT_BASE = HubModel("google-bert/bert-base-uncased", "86b5e0934494bd15c9632b12f734a8a67f723594")
HUB_ENCODERS = {"bert-base": BERT_BASE, "bert-base-uncased": BERT_BASE}

NAMES = ("minilm", *HUB_ENCODERS)

FILES = [
    "config.json",
    "model.safetensors",
    "tokenizer*.json",
    "vocab.txt",
    "special_tokens_map.json",
]
"""No pickled weights: they are code."""


def encoder_folder(encoder: str, revision: str | None, cache: Path) -> Path:
    """Return a local folder with the encoder's configuration, weights and tokenizer.

    Raises:
        DataError: when it is neither here nor to be had.
    """
    folder = Path(encoder).expanduser()
    if revision and (encoder == "minilm" or folder.is_dir()):
        raise DataError([f"encoder_revision has no effect on the encoder {encoder}"])
    if encoder == "minilm":
        return fetch(MINILM, cache)
    if folder.is_dir():
        return folder.absolute()
    if encoder.startswith((".", "/", "~")) or encoder.count("/") > 1:
        raise DataError([f"encoder {encoder} is no folder; names are {', '.join(NAMES)}"])
    known = HUB_ENCODERS.get(encoder, HubModel(encoder, "main"))
    return hub_folder(
        known.repository,
        "model",
        revision or known.commit,
        FILES,
        required=["config.json", "model.safetensors", "tokenizer.json"],
        hint="--encoder minilm, or --encoder FOLDER with config.json, model.safetensors and "
        "tokenizer.json",
    )


def check_encoder(folder: Path, max_length: int) -> None:
    """Check, without loading it, that a folder holds a BERT that can be used.

    Raises:
        DataError: naming everything that does not fit.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError([f"encoder {folder} has no readable config.json ({error})"]) from error
    problems = []
    if config.get("model_type") != "bert":
        problems.append(f"is of type {config.get('model_type')!r}; only BERT models can be used")
    if not (folder / "model.safetensors").exists():
        problems.append("has no model.safetensors; pickled weights are not loaded, they are code")
    positions = config.get("max_position_embeddings", max_length)
    if max_length > positions:
        problems.append(f"has {positions} positions, less than max_length ({max_length})")
    if problems:
        raise DataError([f"encoder {folder} {problem}" for problem in problems])
