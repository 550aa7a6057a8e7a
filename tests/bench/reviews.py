"""Reviews with the lengths of Amazon Polarity, made by joining real sentences of one polarity."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet

from toolkit.assets import SNIPPETS, fetch
from toolkit.data.rows import SourceSpec
from toolkit.data.sources import open_source

MIN_CHARS, MEDIAN_CHARS, SPREAD, MAX_CHARS = 72, 388, 0.52, 1015
"""Of a lognormal distribution that has, cut at the ends of words, Amazon Polarity's mean of 431."""


def amazon_like(cache: Path, count: int, seed: int = 0) -> Iterator[tuple[str, int]]:
    """Yield reviews as (text, label), labels in turn."""
    fetch(SNIPPETS, cache)
    rows = list(open_source(SourceSpec("snippets"), cache).splits["train"].read())
    pools = [[row.text for row in rows if row.label == label] for label in (0, 1)]
    rng = np.random.default_rng(seed)
    lengths = np.clip(
        rng.lognormal(np.log(MEDIAN_CHARS), SPREAD, count), MIN_CHARS, MAX_CHARS
    ).astype(int)
    picks = rng.integers(0, 2**31, size=(count, 24))
    for number, length in enumerate(lengths.tolist()):
        pool = pools[number % 2]
        text = ""
        for pick in picks[number].tolist():
            text += pool[pick % len(pool)] + " "
            if len(text) >= length:
                break
        yield text[: max(MIN_CHARS, text.rfind(" ", 0, length + 1))], number % 2


def write_hub_folder(cache: Path, folder: Path, train_rows: int, test_rows: int) -> None:
    """Write reviews as Parquet files named and shaped like the hub's repository."""
    target = folder / "amazon_polarity"
    target.mkdir(parents=True)
    schema = pyarrow.schema(
        [("label", pyarrow.int64()), ("title", pyarrow.string()), ("content", pyarrow.string())]
    )
    for name, rows, seed in (("train", train_rows, 0), ("test", test_rows, 1)):
        path = target / f"{name}-00000-of-00001.parquet"
        with pyarrow.parquet.ParquetWriter(path, schema) as writer:
            reviews = amazon_like(cache, rows, seed)
            while batch := [row for _, row in zip(range(50_000), reviews, strict=False)]:
                titles, contents = zip(
                    *(_title_and_content(text) for text, _ in batch), strict=True
                )
                labels = [label for _, label in batch]
                writer.write_table(
                    pyarrow.table([labels, list(titles), list(contents)], schema=schema)
                )


def _title_and_content(text: str) -> tuple[str, str]:
    cut = text.find(" ", 20)
    return (text[:cut], text[cut + 1 :]) if 0 < cut < len(text) else ("", text)
