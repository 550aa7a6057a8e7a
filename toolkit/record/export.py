"""What others load: the model folder with tokenizer and card, and the scores of the test set."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from toolkit.assets import TOKENIZER_FILES
from toolkit.files import publish_file

CARD = """\
# {run_id}

BERT classifier with head **{head}**, trained on `{dataset}` from the encoder `{encoder}`.

| validation, step {step} | value | 95 % interval |
|---|---:|---|
{rows}

```python
from toolkit.model.classifier import HeadClassifier
from transformers import BertTokenizer

folder = "{folder}"
tokenizer = BertTokenizer.from_pretrained(folder)
model = HeadClassifier.from_pretrained(folder).eval()
logits = model(**tokenizer(["Great sound."], return_tensors="pt")).logits
```

Labels: {labels}. The settings of the run are in its `config.yaml`.
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
    model.config.save_pretrained(folder)
    whole = {name: weight.contiguous() for name, weight in weights.items()}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    for name in TOKENIZER_FILES:
        if (encoder_folder / name).exists():
            shutil.copyfile(encoder_folder / name, folder / name)
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
