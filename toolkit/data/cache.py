"""The token cache: a folder of flat arrays that training maps into memory and only reads.

    <cache>/tokens/<fingerprint>/
        meta.json              what went in, counts, label names, length histogram
        <split>.tokens.bin     token ids of all rows one after the other, [CLS] .. [SEP] included
        <split>.offsets.bin    int64, one more than rows: row r is tokens[offsets[r]:offsets[r + 1]]
        <split>.labels.bin     uint8, 0 or 1
        <split>.row_ids.bin    int64, number of the row in its source split, from 0

A folder appears by one rename when it is complete; see `toolkit.files`.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from toolkit.errors import DataError

FORMAT_VERSION = 2
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class TokenSplit:
    """The rows of one split; N rows, T tokens."""

    tokens: np.ndarray
    """(T,) token ids."""
    offsets: np.ndarray
    """(N + 1,) int64."""
    labels: np.ndarray
    """(N,) uint8."""
    row_ids: np.ndarray
    """(N,) int64."""

    def __len__(self) -> int:
        return len(self.labels)

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        """Return the number of tokens of each of these rows."""
        return self.offsets[rows + 1] - self.offsets[rows]

    @functools.cached_property
    def longest(self) -> int:
        """The number of tokens of the longest row."""
        return int(np.diff(self.offsets).max(initial=0))


@dataclass(frozen=True)
class TokenCache:
    """An opened cache folder."""

    folder: Path
    meta: dict[str, Any]
    splits: dict[str, TokenSplit]

    @property
    def label_names(self) -> tuple[str, str]:
        """Names of class 0 and class 1."""
        negative, positive = self.meta["label_names"]
        return negative, positive


def open_cache(folder: Path) -> TokenCache:
    """Map a cache folder into memory.

    Raises:
        DataError: when files are missing or do not have the recorded size.
    """
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        splits = {name: _open_split(folder, name, meta) for name in SPLITS}
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            [f"token cache {folder} is damaged ({error}); delete the folder, it will be rebuilt"]
        ) from error
    return TokenCache(folder, meta, splits)


def _open_split(folder: Path, name: str, meta: dict[str, Any]) -> TokenSplit:
    counts = meta["splits"][name]
    rows, tokens = counts["rows"], counts["tokens"]
    return TokenSplit(
        _map(folder / f"{name}.tokens.bin", np.dtype(meta["token_dtype"]), tokens),
        _map(folder / f"{name}.offsets.bin", np.dtype(np.int64), rows + 1),
        _map(folder / f"{name}.labels.bin", np.dtype(np.uint8), rows),
        _map(folder / f"{name}.row_ids.bin", np.dtype(np.int64), rows),
    )


def _map(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    size, expected = path.stat().st_size, count * dtype.itemsize
    if size != expected:
        raise ValueError(f"{path.name} has {size} bytes instead of {expected}")
    return np.memmap(path, dtype, mode="r", shape=(count,)) if count else np.zeros(0, dtype)


class SplitWriter:
    """Appends rows to one split's files."""

    def __init__(self, folder: Path, name: str, token_dtype: np.dtype) -> None:
        self.token_dtype = token_dtype
        self.rows = self.tokens = 0
        self.class_counts = [0, 0]
        self.files: dict[str, BinaryIO] = {
            part: (folder / f"{name}.{part}.bin").open("wb")
            for part in ("tokens", "offsets", "labels", "row_ids")
        }
        self._write("offsets", np.zeros(1, np.int64))

    def append(
        self, tokens: np.ndarray, lengths: np.ndarray, labels: np.ndarray, row_ids: np.ndarray
    ) -> None:
        """Write rows: their tokens one after the other, and one entry for each in the rest."""
        self._write("tokens", tokens.astype(self.token_dtype))
        self._write("offsets", self.tokens + np.cumsum(lengths, dtype=np.int64))
        self._write("labels", labels.astype(np.uint8))
        self._write("row_ids", row_ids.astype(np.int64))
        self.rows += len(labels)
        self.tokens += len(tokens)
        positives = int(labels.sum())
        self.class_counts = [
            self.class_counts[0] + len(labels) - positives,
            self.class_counts[1] + positives,
        ]

    def close(self) -> dict[str, Any]:
        """Close the files and return what `meta.json` says of the split."""
        for file in self.files.values():
            file.close()
        return {"rows": self.rows, "tokens": self.tokens, "class_counts": self.class_counts}

    def _write(self, part: str, array: np.ndarray) -> None:
        self.files[part].write(array.tobytes())
