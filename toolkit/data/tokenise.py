"""Texts -> token ids, truncated and written to the token cache's splits."""

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from toolkit.data.cache import SPLITS, SplitWriter, TokenSplit
from toolkit.errors import DataError

MAX_CHARS = 100_000
"""Longer texts are cut here before they are tokenised, to bound memory; `meta.json` counts them."""
CHUNK_ROWS, CHUNK_CHARS = 2048, 2_000_000
"""Texts that are tokenised together; the tokenizer's own objects take some 80 bytes a token."""
HISTOGRAM_EDGES = (0, 16, 32, 64, 96, 128, 192, 256, 384, 512, 1024)


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load a fast tokenizer, with its own padding and truncation off.

    Raises:
        DataError: when the folder has none, or one that puts no token before a text.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        raise DataError(
            [
                f"{folder} has no tokenizer.json; make one with "
                f"`AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})`"
            ]
        )
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if tokenizer.encode("a").special_tokens_mask[:1] != [1]:
        raise DataError(
            [
                f"{path} puts no [CLS] before a text, so there is no token to classify it by; "
                "use the tokenizer that the encoder was trained with"
            ]
        )
    return tokenizer


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """Return the smallest type that holds all token ids."""
    return np.dtype(np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32)


def encode(tokenizer: Tokenizer, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Tokenise texts; return their tokens one after the other, and the length of each."""
    encodings = tokenizer.encode_batch_fast(texts)
    ids = [encoding.ids for encoding in encodings]
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    tokens = chain.from_iterable(ids)
    return np.fromiter(tokens, token_dtype(tokenizer), int(lengths.sum())), lengths


def truncate(
    tokens: np.ndarray, lengths: np.ndarray, max_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Cut texts to so many tokens, of which the last stays the closing [SEP]."""
    kept = np.minimum(lengths, max_length)
    ends = np.cumsum(lengths)
    place = np.arange(len(tokens)) - np.repeat(ends - lengths, lengths)
    tokens = tokens.copy()
    tokens[ends - lengths + kept - 1] = tokens[ends - 1]
    return tokens[place < np.repeat(kept, lengths)], kept


def tokenise(tokenizer: Tokenizer, texts: list[str], max_length: int) -> TokenSplit:
    """Return a split, in memory, of texts without labels: all are 0."""
    rows = (Chosen(text[:MAX_CHARS], row_id) for row_id, text in enumerate(texts))
    parts = [(np.zeros(0, token_dtype(tokenizer)), np.zeros(0, np.int64))]
    for chunk in in_chunks(rows):
        parts.append(truncate(*encode(tokenizer, [row.text for row in chunk]), max_length))
    tokens, lengths = map(np.concatenate, zip(*parts, strict=True))
    offsets = np.append(0, np.cumsum(lengths))
    return TokenSplit(tokens, offsets, np.zeros(len(texts), np.uint8), np.arange(len(texts)))


class Chosen(NamedTuple):
    """A row whose text is to be tokenised."""

    text: str
    row_id: int
    target: int = 0
    """Number of the split that it is for."""


def in_chunks(rows: Iterable[Chosen]) -> Iterator[list[Chosen]]:
    """Gather rows into chunks of bounded size."""
    chunk: list[Chosen] = []
    chars = 0
    for row in rows:
        chunk.append(row)
        chars += len(row.text)
        if len(chunk) >= CHUNK_ROWS or chars >= CHUNK_CHARS:
            yield chunk
            chunk, chars = [], 0
    if chunk:
        yield chunk


class TokenWriter:
    """Writes tokenised chunks to the three splits and counts lengths."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.dtype = token_dtype(tokenizer)
        self.writers = [SplitWriter(folder, name, self.dtype) for name in SPLITS]
        self.length_counts = np.zeros(len(HISTOGRAM_EDGES), np.int64)
        self.truncated = self.tokens_cut = self.clipped = 0

    def write(
        self, chunk: list[Chosen], encoded: tuple[np.ndarray, np.ndarray], labels: np.ndarray
    ) -> None:
        """Truncate and append the rows of a chunk, each to its split."""
        self._count(encoded[1])
        tokens, lengths = truncate(*encoded, self.max_length)
        row_ids, targets = np.array([(row.row_id, row.target) for row in chunk]).T
        for number, writer in enumerate(self.writers):
            mine = targets == number
            if mine.any():
                mine_tokens = tokens[np.repeat(mine, lengths)]
                writer.append(mine_tokens, lengths[mine], labels[row_ids[mine]], row_ids[mine])

    def _count(self, lengths: np.ndarray) -> None:
        self.length_counts += np.bincount(
            np.digitize(lengths, HISTOGRAM_EDGES) - 1, minlength=len(HISTOGRAM_EDGES)
        )
        self.truncated += int((lengths > self.max_length).sum())
        self.tokens_cut += int((lengths - self.max_length).clip(min=0).sum())

    def close(self) -> dict[str, Any]:
        """Close the files and return what `meta.json` says of the tokens."""
        splits = {name: writer.close() for name, writer in zip(SPLITS, self.writers, strict=True)}
        return {
            "splits": splits,
            "token_dtype": self.dtype.name,
            "length_edges": HISTOGRAM_EDGES,
            "length_counts": self.length_counts.tolist(),
            "truncated_rows": self.truncated,
            "truncated_tokens": self.tokens_cut,
            "clipped_texts": self.clipped,
        }
