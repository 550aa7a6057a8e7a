"""Read, check, select, tokenise once: from a data set to a published token cache."""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from toolkit.assets import TOKENIZER_FILES
from toolkit.console import say
from toolkit.data.cache import FORMAT_VERSION, SPLITS, TokenCache, open_cache
from toolkit.data.rows import Source, SourceSpec
from toolkit.data.selection import Selection, select, texts_in_train
from toolkit.data.sources import DATASETS
from toolkit.data.tokenise import MAX_CHARS, Chosen, TokenWriter, encode, in_chunks, load_tokenizer
from toolkit.data.validate import CheckedSplit, check
from toolkit.errors import DataError
from toolkit.files import lock, publish_folder, write_json


@dataclass(frozen=True)
class DataSpec(SourceSpec):
    """All that decides what the token cache holds. The fields are those of `RunConfig`."""

    bad_rows: str = "error"
    train_rows: int | None = None
    validation_rows: int | None = None
    test_rows: int | None = None
    split_seed: int = 0
    max_length: int = 256


def prepare(spec: DataSpec, source: Source, tokenizer_folder: Path, cache: Path) -> TokenCache:
    """Open the token cache of a data set, building it if nobody has yet.

    Any number of processes may call this at once: one builds, the others wait for it.

    Raises:
        DataError: when rows cannot be used.
    """
    inputs = _inputs(spec, source, tokenizer_folder)
    fingerprint = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    folder = cache / "tokens" / fingerprint[:16]
    if not folder.exists():
        with lock(folder):
            if not folder.exists():  # another process may have finished while we waited
                _build(folder, spec, source, tokenizer_folder, inputs)
    return open_cache(folder)


def described(spec: DataSpec) -> dict[str, Any]:
    """Return what a user said about the data, a path as it is from anywhere."""
    if spec.dataset in DATASETS:
        return asdict(spec)
    return asdict(spec) | {"dataset": str(Path(spec.dataset).expanduser().absolute())}


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
    tokenizer = load_tokenizer(tokenizer_folder)  # before all rows are read
    say(f"Preparing {spec.dataset}: reading and checking ...")
    checked = check(source, spec.bad_rows)
    selection = select(
        checked,
        seed=spec.split_seed,
        train_rows=spec.train_rows,
        validation_rows=spec.validation_rows,
        test_rows=spec.test_rows,
    )
    with publish_folder(folder) as aside:
        writer = TokenWriter(aside, tokenizer, spec.max_length)
        for name, split in checked.items():
            _tokenise_split(split, name, selection, writer, aside)
        if changed := source.changed():  # labels and texts may be of other rows
            raise DataError(
                [f"{path} was written to while it was read: start again" for path in changed]
            )
        meta = {
            "inputs": inputs,
            "dataset": described(spec),
            "label_names": source.label_names,
            "notes": source.notes(),
            **writer.close(),
        }
        meta["texts_in_train"] = texts_in_train(checked, selection)
        meta["source_rows"] = {name: len(split.usable) for name, split in checked.items()}
        meta["quarantined"] = {name: int((~split.usable).sum()) for name, split in checked.items()}
        write_json(aside / "meta.json", meta)


def _tokenise_split(
    split: CheckedSplit,
    source_split: str,
    selection: Selection,
    writer: TokenWriter,
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
        for chunk in in_chunks(_chosen(split, targets, writer, quarantine)):
            encoded = tokeniser.submit(encode, writer.tokenizer, [row.text for row in chunk])
            if before:
                writer.write(before[0], before[1].result(), split.labels)
            before = (chunk, encoded)
        if before:
            writer.write(before[0], before[1].result(), split.labels)


def _chosen(
    split: CheckedSplit, targets: np.ndarray, writer: TokenWriter, quarantine: TextIO
) -> Iterator[Chosen]:
    """Yield the chosen rows; write the unusable ones aside."""
    # a file that has grown since it was checked is refused once all is read
    for row_id, (usable, row) in enumerate(zip(split.usable, split.split.read(), strict=False)):
        if not usable:
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
            yield Chosen(row.text[:MAX_CHARS], row_id, targets[row_id])
