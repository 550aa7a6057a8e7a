"""What others load: the model folder with tokenizer and card, and the scores of the test set."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from toolkit.assets import TOKENIZER_FILES
from toolkit.files import publish_file, share_like_its_folder

TOKENIZER_SETTINGS = "tokenizer_config.json"
CARD = """\
# {run_id}

BERT classifier with head **{head}**, trained on `{dataset}` from the encoder `{encoder}`.

| validation, step {step} | value | 95 % interval |
|---|---:|---|
{rows}

Probabilities of `{positive}`, as fast as a run scores its test set, and in its precision ({precision}):

```python
from toolkit.predict import Classifier

classifier = Classifier("{folder}")
classifier.scores(["Great sound.", "Broke after a day."])
```

As any model of transformers:

```python
import torch
from toolkit.model.classifier import HeadClassifier
from transformers import BertTokenizer

folder = "{folder}"
tokenizer = BertTokenizer.from_pretrained(folder)
model = HeadClassifier.from_pretrained(folder).eval()
texts = ["Great sound.", "Broke after a day."]
with torch.inference_mode():
    logits = model(**tokenizer(texts, padding=True, truncation=True, return_tensors="pt")).logits
```

Labels: {labels}. Texts are cut to {max_length} tokens, as in training; several text columns are joined by
newlines. The settings of the run are in its `config.yaml`.
"""


def save_model(
    model: Any,
    weights: dict[str, Any],
    encoder_folder: Path,
    folder: Path,
    card: dict[str, Any],
    validation: dict[str, Any],
) -> None:
    """Write whole weights, configuration, tokenizer and card into an empty folder."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData
    from safetensors.torch import save_file

    # not `save_pretrained` (transformers 5.23): it imports DeepSpeed wherever that is installed, 0.3 s,
    # and under ZeRO-3 it turns LayerNorm's names into those of TensorFlow's BERT
    model.config.architectures, model.config.dtype = [type(model).__name__], "float32"
    # for `Classifier`; for others the tokenizer says the length, below
    model.config.trained_length = card["max_length"]
    model.config.trained_precision = card["precision"]
    model.config.save_pretrained(folder)
    whole = {name: weight.contiguous() for name, weight in weights.items()}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    share_like_its_folder(folder / "model.safetensors")
    for name in TOKENIZER_FILES:
        if (encoder_folder / name).exists():
            shutil.copyfile(encoder_folder / name, folder / name)
    _cut_where_training_did(folder / TOKENIZER_SETTINGS, card["max_length"])
    results = [
        EvalResult(
            task_type="text-classification",
            dataset_type=card["dataset"],
            dataset_name=f"{card['dataset']} (validation)",
            metric_type=name,
            metric_value=validation[name]["value"],
        )
        for name in ("accuracy", "precision", "recall", "f1")
        if validation[name]["value"] is not None
    ]
    data = ModelCardData(
        model_name=card["run_id"], library_name="transformers", eval_results=results
    )
    rows = "\n".join(
        _card_row(name, validation[name]) for name in ("accuracy", "precision", "recall", "f1")
    )
    text = f"---\n{data.to_yaml()}\n---\n\n" + CARD.format(rows=rows, **card)
    ModelCard(text).save(folder / "README.md")


def _cut_where_training_did(settings: Path, max_length: int) -> None:
    """Let `truncation=True` of the tokenizer mean the length of training, not the encoder's longest."""
    known = json.loads(settings.read_text(encoding="utf-8")) if settings.exists() else {}
    text = json.dumps(known | {"model_max_length": max_length}, indent=2)
    settings.write_text(text, encoding="utf-8")


def _card_row(name: str, estimate: dict[str, Any]) -> str:
    value = "n/a" if estimate["value"] is None else f"{estimate['value']:.4f}"
    return f"| {name} | {value} | {estimate['low']:.4f} to {estimate['high']:.4f} |"


def save_predictions(
    path: Path, row_ids: np.ndarray, labels: np.ndarray, scores: np.ndarray
) -> None:
    """Write one line for each test row; `score` is the probability of class 1."""
    import pyarrow
    import pyarrow.parquet

    def column(values: np.ndarray) -> Any:
        """Do for numbers what `pyarrow.array` does; that imports pandas first, 0.2 s (pyarrow 26)."""
        assert values.dtype.isnative
        assert values.dtype.kind in "iuf"
        kind, buffer = pyarrow.from_numpy_dtype(values.dtype), np.ascontiguousarray(values)
        return pyarrow.Array.from_buffers(kind, len(values), [None, pyarrow.py_buffer(buffer)])

    columns = {"row_id": column(row_ids), "label": column(labels), "score": column(scores)}
    with publish_file(path) as aside:
        pyarrow.parquet.write_table(pyarrow.table(columns), aside)


def save_state_dict(safetensors: Path, path: Path) -> None:
    """Write a model's weights as a plain state dict, which loads with `weights_only=True`."""
    import torch
    from safetensors.torch import load_file

    with publish_file(path) as aside:
        torch.save(load_file(safetensors), aside)
