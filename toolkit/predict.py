"""Score texts with a model that a run has left, without padding: as fast as the run scored its test set.

from toolkit.predict import Classifier
Classifier("runs/v2-a7b2194d5d/best").scores(["Great sound.", "Broke after a day."])
"""

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from toolkit.build import evaluation_tokens, is_padded
from toolkit.config import RunConfig
from toolkit.data.tokenise import load_tokenizer, tokenise
from toolkit.engine.evaluate import evaluate
from toolkit.engine.runtime import Runtime
from toolkit.errors import DataError
from toolkit.model.classifier import HeadClassifier


class Classifier:
    """A trained model on this process's device."""

    def __init__(
        self,
        folder: str | Path,
        *,
        precision: Literal["bf16", "fp32"] | None = None,
        max_length: int | None = None,
        cpu_threads: int | None = None,
    ) -> None:
        """Load it.

        Args:
            folder: `best` of a run folder.
            precision: what to compute in; None means what training did.
            max_length: tokens that texts are cut to; None means where training cut them.
            cpu_threads: of this process; None means one for each core.

        Raises:
            DataError: when there is no such model, or it does not say how it was trained.
            ValueError: when there is no such precision.
            RuntimeError: in one of several ranks.
        """
        folder = Path(folder).expanduser()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise RuntimeError(
                "a Classifier works in one process, and a launcher has started several: start them "
                "without it, each with its own texts"
            )
        if not (folder / "model.safetensors").exists():
            raise DataError([f"{folder} holds no model; a run leaves one in runs/<run_id>/best"])
        model = HeadClassifier.from_pretrained(folder, use_safetensors=True)
        self.config = replace(RunConfig(), **_as_trained(folder, model, precision, max_length))
        self.tokenizer = load_tokenizer(folder)
        self.runtime = Runtime(self.config.precision, cpu_threads)
        self.labels = tuple((model.config.id2label or {}).values())
        """Negative, positive."""
        self.model = self.runtime.prepare_to_score(model)

    def scores(self, texts: Iterable[str]) -> np.ndarray:
        """Return (N,) float32: the probability of the second label for each text.

        Raises:
            TypeError: when there is something else among the texts, or one that is not in a list.
            ValueError: when a text has characters that are none (lone surrogates).
        """
        if isinstance(texts, str):
            raise TypeError("scores got one text, allowed is a list of texts: scores([text])")
        known = list(texts)
        _refuse_what_is_no_text(known)
        found = evaluate(
            self.runtime,
            self.model,
            tokenise(self.tokenizer, known, self.config.max_length),
            max_tokens=evaluation_tokens(self.config, self.runtime),
            padded=is_padded(self.config, self.runtime),
        )
        return found.scores


def _as_trained(
    folder: Path, model: HeadClassifier, precision: str | None, max_length: int | None
) -> dict[str, Any]:
    """Return the settings; what is not given has to be in the model folder."""
    found: dict[str, Any] = {
        "precision": precision or model.config.trained_precision,
        "max_length": max_length or model.config.trained_length,
    }
    if missing := [name for name, value in found.items() if value is None]:
        given = ", ".join(f"{name}=..." for name in missing)
        raise DataError(
            [f"{folder} does not say its {' and '.join(missing)}: Classifier(folder, {given})"]
        )
    longest = model.config.max_position_embeddings
    if found["precision"] not in ("bf16", "fp32") or not 2 <= found["max_length"] <= longest:
        raise ValueError(f"got {found}, allowed are bf16 and fp32, and 2 to {longest} tokens")
    return found


def _refuse_what_is_no_text(texts: list[str]) -> None:
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts[{number}] is {text!r}, allowed is a list of texts")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"texts[{number}] was read in another encoding: {error}") from error
