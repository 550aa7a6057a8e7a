"""Named data sets and local files, as streams of rows.

A source has splits; a split can be read from its start any number of times, row by row, in bounded
memory. What is wrong with a row travels with it as `Row.problem`, so that one pass finds every
problem. Adding a data set is one function and one line in `DATASETS`.
"""

import csv
import difflib
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from toolkit.assets import SNIPPETS, SNIPPETS_FILE, fetch, hub_folder
from toolkit.data.hub import batches, load
from toolkit.errors import DataError

FORMATS = (".csv", ".tsv", ".jsonl", ".parquet")
SPLIT_NAMES = ("train", "validation", "test")


class Row(NamedTuple):
    """One review, or what is wrong with it."""

    text: str
    label: Any
    group: int = -1
    """Rows of one group stay in one split; -1 means a group of its own."""
    problem: str | None = None


@dataclass(frozen=True)
class Split:
    """A stream of rows that can be read again from its start."""

    name: str
    origin: str
    read: Callable[[], Iterator[Row]]


@dataclass(frozen=True)
class Source:
    """A data set before any row of it was read."""

    splits: dict[str, Split]
    """By name: train, and where published validation and test."""
    revision: str
    """What tells two versions of the data apart: a commit, or a hash of the files."""
    label_names: tuple[str, str] = ("negative", "positive")
    """What the model and the reports call the two classes."""
    label_values: tuple[str, str] | None = ("0", "1")
    """What the rows call them; None where that has to be recognised."""


@dataclass(frozen=True)
class SourceSpec:
    """What a user said about where the data is. The fields are those of `RunConfig`."""

    dataset: str
    dataset_path: str | None = None
    dataset_revision: str | None = None
    text_column: str = "text"
    label_column: str = "label"
    label_names: list[str] | None = field(default=None)
    encoding: str = "utf-8"


def open_source(spec: SourceSpec, cache: Path) -> Source:
    """Find the data set.

    Raises:
        DataError: when it is not there, with what to type instead.
    """
    _refuse_ignored(spec)
    if spec.dataset in DATASETS:
        return DATASETS[spec.dataset](spec, cache)
    path = Path(spec.dataset).expanduser()
    if not path.exists():
        close = difflib.get_close_matches(spec.dataset, DATASETS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"named ones are {', '.join(DATASETS)}"
        raise DataError([f"dataset {spec.dataset!r} is neither a known name nor a path; {hint}"])
    return _local(spec, path)


LOCAL_OPTIONS = ("text_column", "label_column", "label_names", "encoding")
HUB_OPTIONS = ("dataset_path", "dataset_revision")


def _refuse_ignored(spec: SourceSpec) -> None:
    """Refuse settings that would have no effect on this kind of data set."""
    ignored = list(LOCAL_OPTIONS) if spec.dataset in DATASETS else []
    ignored += [] if spec.dataset in HUB_DATASETS else HUB_OPTIONS
    usual = SourceSpec(spec.dataset)
    given = [name for name in ignored if getattr(spec, name) != getattr(usual, name)]
    if given:
        raise DataError([f"{name} has no effect on the data set {spec.dataset}" for name in given])


def _snippets(spec: SourceSpec, cache: Path) -> Source:
    """Sentences of Amazon product reviews with a human sentiment (Hutto and Gilbert, ICWSM 2014)."""
    path = fetch(SNIPPETS, cache) / SNIPPETS_FILE
    split = Split("train", "snippets", partial(_read_snippets, path))
    return Source({"train": split}, SNIPPETS.sha256)


def _read_snippets(path: Path, clear: float = 0.5) -> Iterator[Row]:
    """Keep the sentences whose mean sentiment is `clear`; the group is the review."""
    for line in path.read_text(encoding="utf-8").splitlines():
        identifier, sentiment, text = line.split("\t")
        if abs(float(sentiment)) >= clear:
            yield Row(text, int(float(sentiment) > 0), int(identifier.split("_")[0]))


def _amazon_polarity(spec: SourceSpec, cache: Path) -> Source:
    """3.6 M training and 400 k test reviews (Zhang, Zhao and LeCun, NeurIPS 2015)."""
    if spec.dataset_path:
        folder = Path(spec.dataset_path).expanduser().absolute()
        if not folder.is_dir():
            raise DataError([f"dataset_path {folder} is not a folder"])
        revision = _hash_files(sorted(folder.rglob("*.parquet")))
        locate = partial(Path, folder)
    else:
        revision = spec.dataset_revision or AMAZON_POLARITY_COMMIT
        locate = partial(
            # not `datasets.load_dataset(name)`: when the hub does not answer, that takes whatever
            # revision its cache holds (5.2.0, `dataset_module_factory`)
            hub_folder,
            "fancyzhx/amazon_polarity",
            "dataset",
            revision,
            ["README.md", "amazon_polarity/*.parquet"],
            hint="--dataset snippets, --dataset PATH with your own files, or --dataset_path FOLDER "
            "with a copy of the hub's repository",
        )
    splits = {
        name: Split(name, f"amazon_polarity {name}", partial(_read_hub, locate, name))
        for name in ("train", "test")
    }
    return Source(splits, revision)


AMAZON_POLARITY_COMMIT = "9d9c45c18f8c3cf1b23a3c27917b60cbf28f3289"


def _read_hub(locate: Callable[[], Path], split: str) -> Iterator[Row]:
    """Read a split; the hub is asked only now, so that a finished token cache needs no network."""
    splits = load(locate())
    missing = {"title", "content", "label"} - set(
        splits[split].column_names if split in splits else []
    )
    if missing:
        raise DataError(
            [f"amazon_polarity: split {split} has no column {', '.join(sorted(missing))}"]
        )
    for batch in batches(splits[split], ["title", "content", "label"]):
        for title, content, label in zip(
            batch["title"], batch["content"], batch["label"], strict=True
        ):
            yield _row([title, content], label)


DATASETS: dict[str, Callable[[SourceSpec, Path], Source]] = {
    "snippets": _snippets,
    "amazon_polarity": _amazon_polarity,
}
HUB_DATASETS = ("amazon_polarity",)
"""Those that have a revision, and a layout that a local copy can have."""


# Local files


def _local(spec: SourceSpec, path: Path) -> Source:
    """Find the files of a path: one file, or a folder with train and, if there, validation and test."""
    files = {"train": [path]} if path.is_file() else _split_files(path)
    problems = [
        f"{file}: format is not one of {' '.join(FORMATS)}"
        for files_ in files.values()
        for file in files_
        if file.suffix.lower() not in FORMATS
    ]
    if "train" not in files:
        problems.append(
            f"{path}: found no train file; a folder holds train.csv (or .tsv .jsonl .parquet) and, "
            "if you have them, validation.* and test.*; "
            f"here are {sorted(p.name for p in path.iterdir())[:10]}"
        )
    problems = problems or [
        p for files_ in files.values() for file in files_ for p in _column_problems(file, spec)
    ]
    if problems:
        raise DataError(problems)
    splits = {
        name: Split(
            name,
            files_[0].name if len(files_) == 1 else f"{path.name}/{name}",
            partial(_read_files, files_, spec),
        )
        for name, files_ in files.items()
    }
    revision = _hash_files([f for files_ in files.values() for f in files_])
    if not spec.label_names:
        return Source(splits, revision, label_values=None)
    negative, positive = spec.label_names
    return Source(
        splits, revision, (negative, positive), (canonical(negative), canonical(positive))
    )


def canonical(label: Any) -> str:
    """Write a label in one way: 1, 1.0, "1" and " 1 " are one label, and so are "Pos" and "pos"."""
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    return str(label).strip().casefold()


def _split_files(folder: Path) -> dict[str, list[Path]]:
    """Sort the files of a folder by split: `train.csv`, `train-00000-of-00004.parquet`, `train/x.csv`."""
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix.lower() in FORMATS:
            for name in SPLIT_NAMES:
                if path.relative_to(folder).parts[0].startswith(name) or path.name.startswith(name):
                    files.setdefault(name, []).append(path)
                    break
    return files


def _hash_files(paths: list[Path]) -> str:
    """Hash names and contents; about a second for each gigabyte."""
    if not paths:
        raise DataError(["the data set's folder holds no data files"])
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(
                f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\0".encode()
            )
    return digest.hexdigest()


def _columns(spec: SourceSpec) -> list[str]:
    return [name.strip() for name in spec.text_column.split(",")] + [spec.label_column]


def _column_problems(path: Path, spec: SourceSpec) -> list[str]:
    """Check that a file can be opened, has rows, and has the named columns."""
    if path.stat().st_size == 0:
        return [f"{path}: the file is empty"]
    try:
        found = _column_names(path, spec)
    except (UnicodeError, LookupError, csv.Error, ValueError, OSError) as error:
        return [f"{path}: cannot be read as {path.suffix[1:]} in {spec.encoding}: {error}"]
    if found is None:
        return [f"{path}: has no rows"]
    problems = []
    for name in _columns(spec):
        if name not in found:
            close = difflib.get_close_matches(name, found, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            flag = "--label_column" if name == spec.label_column else "--text_column"
            problems.append(
                f"{path}: has no column {name!r}, it has {found}; name it with {flag}{hint}"
            )
    return problems


def _column_names(path: Path, spec: SourceSpec) -> list[str] | None:
    """Return a file's columns, or None when it has no row."""
    if path.suffix.lower() == ".parquet":
        import pyarrow.parquet

        file = pyarrow.parquet.ParquetFile(path)
        return file.schema_arrow.names if file.metadata.num_rows else None
    with _open_text(path, spec) as lines:
        if path.suffix.lower() == ".jsonl":
            first = next((line for line in lines if line.strip()), None)
            row = json.loads(first) if first else None
            return list(row) if isinstance(row, dict) else None
        header = next(csv.reader(lines, delimiter=_delimiter(path)), None)
        return header if next(lines, None) is not None else None


def _read_files(paths: list[Path], spec: SourceSpec) -> Iterator[Row]:
    for path in paths:
        yield from READERS[path.suffix.lower()](path, spec)


def _open_text(path: Path, spec: SourceSpec) -> Any:
    """Open a text file so that bytes which do not decode survive as lone surrogates, row by row."""
    with path.open("rb") as file:
        start = file.read(2)
    if start in (b"\xff\xfe", b"\xfe\xff") and spec.encoding.lower().replace("-", "") == "utf8":
        raise ValueError("it starts with a UTF-16 mark; add --encoding utf-16")
    encoding = "utf-8-sig" if spec.encoding.lower() in ("utf-8", "utf8") else spec.encoding
    return path.open(encoding=encoding, errors="surrogateescape", newline="")


def _delimiter(path: Path) -> str:
    return "\t" if path.suffix.lower() == ".tsv" else ","


def _read_csv(path: Path, spec: SourceSpec) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # a review may be longer than the default of 128 KiB
    columns = _columns(spec)
    with _open_text(path, spec) as lines:
        # strict: a stray quote is an error instead of swallowing the rows up to the next quote
        rows = csv.reader(lines, delimiter=_delimiter(path), strict=True)
        header = next(rows)
        places = [header.index(name) for name in columns]
        while True:
            try:
                cells = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield Row("", None, problem=f"broken quoting near line {rows.line_num} ({error})")
                continue
            if not cells:
                continue  # a blank line
            if len(cells) != len(header):
                yield Row(
                    "", None, problem=f"{len(cells)} fields where the header has {len(header)}"
                )
            else:
                *parts, label = (cells[place] for place in places)
                yield _row(parts, label)


def _read_jsonl(path: Path, spec: SourceSpec) -> Iterator[Row]:
    columns = _columns(spec)
    with _open_text(path, spec) as lines:
        for line in lines:
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict):
                *parts, label = (row.get(name) for name in columns)
                yield _row(parts, label)
            else:
                yield Row("", None, problem="not a JSON object")


def _read_parquet(path: Path, spec: SourceSpec) -> Iterator[Row]:
    import pyarrow.parquet

    columns = _columns(spec)
    for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1024, columns=columns):
        for *parts, label in zip(*(batch[name].to_pylist() for name in columns), strict=True):
            yield _row(parts, label)


READERS: dict[str, Callable[[Path, SourceSpec], Iterator[Row]]] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def _row(parts: list[Any], label: Any) -> Row:
    """Join the text columns; a title that is null counts as absent when there is other text."""
    present = [part for part in parts if part is not None]
    if not present:
        return Row("", label, problem="null text")
    if not all(isinstance(part, str) for part in present):
        return Row("", label, problem="text that is not a string")
    text = "\n".join(part for part in present if part) if len(present) > 1 else present[0]
    try:
        text.encode()
    except UnicodeEncodeError:
        return Row("", label, problem="text in another encoding (see --encoding)")
    return Row(text, label)
