"""Score texts with a model that a run has left, without padding: as fast as the run scored its test set.

from toolkit.predict import Classifier
Classifier("runs/v2-a7b2194d5d/best").scores(["Great sound.", "Broke after a day."])
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from toolkit.build import evaluation_tokens, is_padded
from toolkit.config import RunConfig
from toolkit.data.cache import TokenSplit
from toolkit.data.prepare import CHUNK_ROWS, MAX_CHARS
from toolkit.data.tokenise import encode, load_tokenizer, truncate
from toolkit.engine.evaluate import evaluate
from toolkit.engine.runtime import Runtime
from toolkit.errors import DataError
from toolkit.model.classifier import HeadClassifier
from toolkit.record.export import trained_length


class Classifier:
    """A trained model on this process's device."""

    def __init__(self, folder: str | Path, precision: Literal["bf16", "fp32"] = "bf16") -> None:
        """Load it.

        Args:
            folder: `best` of a run folder.
            precision: what to compute in; the run's `config.yaml` says what that did.

        Raises:
            ValueError: when there is no such precision.
            DataError: when there is no such model.
        """
        if precision not in ("bf16", "fp32"):
            raise ValueError(f"precision got {precision!r}, allowed are bf16 and fp32")
        folder = Path(folder).expanduser()
        if not (folder / "model.safetensors").exists():
            raise DataError([f"{folder} holds no model; a run leaves one in runs/<run_id>/best"])
        self.tokenizer = load_tokenizer(folder)
        self.runtime = Runtime(precision)
        model = HeadClassifier.from_pretrained(folder, use_safetensors=True)
        longest = trained_length(folder, model.config.max_position_embeddings)
        self.config = replace(RunConfig(), precision=precision, max_length=longest)
        self.labels = tuple((model.config.id2label or {}).values())
        """Negative, positive."""
        self.model = self.runtime.prepare_to_score(model)

    def scores(self, texts: Iterable[str]) -> np.ndarray:
        """Return (N,) float32: the probability of the second label for each text.

        Longer texts are cut as in training.

        Raises:
            TypeError: when there is something else among the texts, or one that is not in a list.
        """
        if isinstance(texts, str):
            raise TypeError("scores got one text, allowed is a list of texts: scores([text])")
        known = list(texts)
        if wrong := [text for text in known if not isinstance(text, str)]:
            raise TypeError(f"scores got {wrong[0]!r} among them, allowed is a list of texts")
        found = evaluate(
            self.runtime,
            self.model,
            self._tokenise(known),
            max_tokens=evaluation_tokens(self.config, self.runtime),
            padded=is_padded(self.config, self.runtime),
        )
        return found.scores

    def _tokenise(self, texts: list[str]) -> TokenSplit:
        """Return tokens, with labels that mean nothing."""
        parts = [(np.zeros(0, np.uint16), np.zeros(0, np.int64))]
        for start in range(0, len(texts), CHUNK_ROWS):
            chunk = [text[:MAX_CHARS] for text in texts[start : start + CHUNK_ROWS]]
            parts.append(truncate(*encode(self.tokenizer, chunk), self.config.max_length))
        tokens, lengths = map(np.concatenate, zip(*parts, strict=True))
        offsets = np.append(0, np.cumsum(lengths))
        return TokenSplit(tokens, offsets, np.zeros(len(texts), np.uint8), np.arange(len(texts)))
