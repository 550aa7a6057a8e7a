"""A pass over a split that left a row out, or took one twice, is no result."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.tiny import make_trainer
from toolkit.data.batches import evaluation_batches, make_batch
from toolkit.data.cache import TokenSplit
from toolkit.engine import evaluate as module
from toolkit.engine.evaluate import Evaluation, evaluate


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (lambda batches: batches, 0),
        (lambda batches: [*batches, np.array([3])], 1),
        (lambda batches: [*batches[:-1], np.append(batches[-1], batches[-1][0])], 1),
        (lambda batches: batches[:-1], 13),
    ],
    ids=["as it is", "again in another batch", "twice in one", "the last left out"],
)
def test_each_row_counts_once(
    change: Callable[[list[np.ndarray]], list[np.ndarray]],
    wrong: int,
    split: TokenSplit,
    tiny_encoder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer = make_trainer(split, tiny_encoder)
    found = evaluation_batches(split, 0, 1, max_tokens=96, padded=False)
    rows = change([batch.rows for batch in found])
    batches = [make_batch(split, numbers, padded=False) for numbers in rows]
    monkeypatch.setattr(module, "evaluation_batches", lambda *place, **settings: batches)

    def score() -> Evaluation:
        return evaluate(trainer.runtime, trainer.model, split, max_tokens=96, padded=False)

    if not wrong:
        assert score().counts.n == len(score().scores) == len(split)
        return
    with pytest.raises(RuntimeError, match=f"evaluation saw {wrong} rows more or less than once"):
        score()
