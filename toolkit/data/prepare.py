"""Read, check, select, tokenise once: from a data set to a published token cache."""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from tokenizers import Tokenizer

from toolkit.console import say
from toolkit.data.cache import FORMAT_VERSION, SPLITS, SplitWriter, TokenCache, open_cache
from toolkit.data.selection import Selection, select
from toolkit.data.sources import Source, SourceSpec, open_source
from toolkit.data.validate import CheckedSplit, check
from toolkit.errors import DataError
from toolkit.files import lock, publish_folder, write_json

MAX_CHARS = 100_000
"""Longer texts are cut here before they are tokenised, to bound memory; `meta.json` counts them."""
CHUNK_ROWS, CHUNK_CHARS = 2048, 2_000_000
"""Texts that are tokenised together; the tokenizer's own objects take some 80 bytes a token."""
HISTOGRAM_EDGES = (0, 16, 32, 64, 96, 128, 192, 256, 384, 512, 1024)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "special_tokens_map.json",
)


@dataclass(frozen=True)
class DataSpec(SourceSpec):
    """All that decides what the token cache holds. The fields are those of `RunConfig`."""

    bad_rows: str = "error"
    train_rows: int | None = None
    validation_rows: int | None = None
    test_rows: int | None = None
    split_seed: int = 0
    max_length: int = 256


def prepare(spec: DataSpec, tokenizer_folder: Path, cache: Path) -> TokenCache:
    """Open the token cache of a data set, building it if nobody has yet.

    Any number of processes may call this at once: one builds, the others wait for it.

    Raises:
        DataError: when the data cannot be found or used.
    """
    source = open_source(spec, cache)
    inputs = _inputs(spec, source, tokenizer_folder)
    fingerprint = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    folder = cache / "tokens" / fingerprint[:16]
    if not folder.exists():
        with lock(folder):
            if not folder.exists():  # another process may have finished while we waited
                _build(folder, spec, source, tokenizer_folder, inputs)
    return open_cache(folder)


def _inputs(spec: DataSpec, source: Source, tokenizer_folder: Path) -> dict[str, Any]:
    """List what the fingerprint covers. Where files lie is not in it, what they hold is."""
    place = {"dataset", "dataset_path", "dataset_revision"}
    choices = {f.name: getattr(spec, f.name) for f in fields(spec) if f.name not in place}
    files = {name: tokenizer_folder / name for name in TOKENIZER_FILES}
    tokenizer = {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in files.items()
        if path.exists()
    }
    return {
        "format": FORMAT_VERSION,
        "revision": source.revision,
        "choices": choices,
        "splits": sorted(source.splits),
        "tokenizer": tokenizer,
    }


def _build(
    folder: Path, spec: DataSpec, source: Source, tokenizer_folder: Path, inputs: dict[str, Any]
) -> None:
    say(f"Preparing {spec.dataset}: reading and checking ...")
    checked = check(source, spec.bad_rows)
    selection = select(
        checked,
        seed=spec.split_seed,
        train_rows=spec.train_rows,
        validation_rows=spec.validation_rows,
        test_rows=spec.test_rows,
    )
    tokenizer = load_tokenizer(tokenizer_folder)
    with publish_folder(folder) as aside:
        writer = _CacheWriter(aside, tokenizer, spec.max_length)
        for name, split in checked.items():
            _tokenise_split(split, name, selection, writer, aside)
        meta = {
            "inputs": inputs,
            "dataset": asdict(spec),
            "label_names": source.label_names,
            **writer.close(),
        }
        meta["source_rows"] = {name: len(split.usable) for name, split in checked.items()}
        meta["quarantined"] = {name: int((~split.usable).sum()) for name, split in checked.items()}
        write_json(aside / "meta.json", meta)


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load a fast tokenizer, with its own padding and truncation off.

    Raises:
        DataError: when the folder has none.
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
    return tokenizer


@dataclass
class _Chunk:
    """Some rows on their way to the cache."""

    texts: list[str]
    row_ids: list[int]
    targets: list[int]


def _tokenise_split(
    split: CheckedSplit,
    source_split: str,
    selection: Selection,
    writer: "_CacheWriter",
    aside: Path,
) -> None:
    """Tokenise the chosen rows of one source split, while the rows before are written."""
    targets = np.full(len(split.usable), -1, np.int8)
    for number, name in enumerate(SPLITS):
        if selection[name][0] == source_split:
            targets[selection[name][1]] = number
    with (
        (aside / "quarantine.jsonl").open("a", encoding="utf-8") as quarantine,
        ThreadPoolExecutor(1) as tokeniser,  # the tokenizer runs its own threads, without the GIL
    ):
        before = None
        for chunk in _chunks(split, targets, writer, quarantine):
            encoded = tokeniser.submit(writer.encode, chunk.texts)
            if before:
                writer.write(before[0], before[1].result(), split.labels)
            before = (chunk, encoded)
        if before:
            writer.write(before[0], before[1].result(), split.labels)


def _chunks(
    split: CheckedSplit, targets: np.ndarray, writer: "_CacheWriter", quarantine: TextIO
) -> Iterator[_Chunk]:
    """Gather the chosen rows into chunks of bounded size; write the unusable ones aside."""
    chunk, chars = _Chunk([], [], []), 0
    for row_id, row in enumerate(split.split.read()):
        if not split.usable[row_id]:
            record = {
                "split": split.split.name,
                "row": row_id + 1,
                "problem": split.problem(row_id),
            }
            quarantine.write(
                json.dumps(record | {"label": str(row.label), "text": row.text[:1000]}) + "\n"
            )
        elif targets[row_id] >= 0:
            writer.clipped += len(row.text) > MAX_CHARS
            chunk.texts.append(row.text[:MAX_CHARS])
            chunk.row_ids.append(row_id)
            chunk.targets.append(targets[row_id])
            chars += min(len(row.text), MAX_CHARS)
            if len(chunk.texts) >= CHUNK_ROWS or chars >= CHUNK_CHARS:
                yield chunk
                chunk, chars = _Chunk([], [], []), 0
    if chunk.texts:
        yield chunk


class _CacheWriter:
    """Writes tokenised chunks to the three splits and counts lengths."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.dtype = np.dtype(np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32)
        self.writers = [SplitWriter(folder, name, self.dtype) for name in SPLITS]
        self.length_counts = np.zeros(len(HISTOGRAM_EDGES), np.int64)
        self.truncated = self.tokens_cut = self.clipped = 0

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Tokenise texts; return their tokens one after the other and the length of each."""
        encodings = self.tokenizer.encode_batch_fast(texts)
        ids = [encoding.ids for encoding in encodings]
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        return np.fromiter(chain.from_iterable(ids), self.dtype, int(lengths.sum())), lengths

    def write(
        self, chunk: _Chunk, encoded: tuple[np.ndarray, np.ndarray], labels: np.ndarray
    ) -> None:
        """Truncate and append the rows of a chunk, each to its split."""
        tokens, lengths = self._truncate(*encoded)
        row_ids, targets = np.array(chunk.row_ids), np.array(chunk.targets)
        for number, writer in enumerate(self.writers):
            mine = targets == number
            if mine.any():
                mine_tokens = tokens[np.repeat(mine, lengths)]
                writer.append(mine_tokens, lengths[mine], labels[row_ids[mine]], row_ids[mine])

    def _truncate(self, tokens: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cut rows to `max_length`, keeping the closing [SEP]."""
        self.length_counts += np.bincount(
            np.digitize(lengths, HISTOGRAM_EDGES) - 1, minlength=len(HISTOGRAM_EDGES)
        )
        kept = np.minimum(lengths, self.max_length)
        self.truncated += int((lengths > self.max_length).sum())
        self.tokens_cut += int((lengths - kept).sum())
        ends = np.cumsum(lengths)
        place = np.arange(len(tokens)) - np.repeat(ends - lengths, lengths)
        tokens = tokens.copy()
        tokens[ends - lengths + kept - 1] = tokens[ends - 1]
        return tokens[place < np.repeat(kept, lengths)], kept

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


def describe(meta: dict[str, Any], folder: Path) -> str:
    """Say in a few lines what a token cache holds: counts, lengths, truncation, quarantine."""
    counts, total = meta["length_counts"], max(1, sum(meta["length_counts"]))
    edges = [*meta["length_edges"], None]
    lines = [f"  {'tokens':>11}  reviews"]
    for number, count in enumerate(counts):
        upper = f"{edges[number + 1] - 1:>4}" if edges[number + 1] else "    "
        bar = "#" * round(40 * count / max(counts))
        if count:
            lines.append(f"  {edges[number]:>5}-{upper}  {count:>8} {bar}")
    all_tokens = (
        sum(split["tokens"] for split in meta["splits"].values()) + meta["truncated_tokens"]
    )
    lines.append(
        f"  truncated at {meta['dataset']['max_length']} tokens: {meta['truncated_rows']} reviews "
        f"({meta['truncated_rows'] / total:.2%}), {meta['truncated_tokens'] / max(1, all_tokens):.2%} of the tokens"
    )
    for name, split in meta["splits"].items():
        negative, positive = split["class_counts"]
        lines.append(
            f"  {name:<10} {split['rows']:>8} rows ({negative} {meta['label_names'][0]}, "
            f"{positive} {meta['label_names'][1]}), {split['tokens']} tokens"
        )
    if any(meta["quarantined"].values()):
        set_aside = ", ".join(
            f"{count} of {meta['source_rows'][name]} {name}"
            for name, count in meta["quarantined"].items()
        )
        lines.append(f"  quarantined: {set_aside} rows, listed in {folder / 'quarantine.jsonl'}")
    lines.append(f"  cache: {folder}")
    return "\n".join(lines)
