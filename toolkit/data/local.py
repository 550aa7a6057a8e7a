"""Local files: CSV, TSV, JSONL and Parquet, one file or a folder with a file for each split."""

import codecs
import csv
import difflib
import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from toolkit.assets import missing_parts
from toolkit.data.rows import UNCLEAR_END, Row, Source, SourceSpec, Split, canonical, make_row
from toolkit.errors import DataError
from toolkit.files import file_hash, stamp

if TYPE_CHECKING:
    from _csv import Reader as CsvReader

SPLIT_WORDS = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
SPLIT_NAME = re.compile(rf"({'|'.join(SPLIT_WORDS)})([-_.].*)?", re.IGNORECASE)
"""Names of a split's files and folders: train.csv, train-00000-of-00004.parquet, test_2.csv, dev."""
DATA_LIKE = {
    *(".json", ".ndjson", ".txt", ".xlsx", ".xls", ".arrow", ".feather"),
    *(".gz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".tar", ".tgz"),
}
"""Formats that we do not read, and whose files should not be passed over in silence."""
DELIMITERS = ",;\t|"
MAX_CELL = 2**27
"""Characters, half a GiB while they are read. A quote left open would take the rest of the file."""


def open_local(spec: SourceSpec, path: Path, cache: Path) -> Source:
    """Find the files of a path and check that they have the named columns.

    Each start does so: for their hash alone it reads large files through, and that once.

    Raises:
        DataError: listing the problems of all files.
    """
    files, problems = ({"train": [path]}, []) if path.is_file() else _files_by_split(path)
    all_files = [(name, file) for name, paths in files.items() for file in paths]
    problems += [
        f"{file}: format is not one of {', '.join(READERS)}"
        for _, file in all_files
        if file.suffix.lower() not in READERS
    ]
    problems = problems or [p for _, file in all_files for p in _column_problems(file, spec)]
    problems += _setting_problems(spec, [file for _, file in all_files])
    if problems:
        raise DataError(problems)
    splits = {
        name: Split(name, _origin(path, name, paths), partial(_read_files, paths, spec))
        for name, paths in files.items()
    }
    changed = watch(file for _, file in all_files)  # before they are read
    revision = hash_files(all_files, cache)
    names, values = _labels(spec)
    notes = partial(_notes, [file for _, file in all_files], spec)
    return Source(splits, revision, names, values if spec.label_names else None, changed, notes)


def _notes(files: list[Path], spec: SourceSpec) -> list[str]:
    return [f"{file.name}: quotes are text" for file in files if _quotes_are_text(file, spec)]


def _labels(spec: SourceSpec) -> tuple[tuple[str, str], tuple[str, str]]:
    """Return what the two classes are called, and their labels in canonical form."""
    negative, positive = map(str.strip, (spec.label_names or "negative,positive").split(","))
    return (negative, positive), (canonical(negative), canonical(positive))


def _setting_problems(spec: SourceSpec, files: list[Path]) -> list[str]:
    """Complain about settings that these files leave without effect, or that mean one label twice."""
    problems = []
    is_parquet = all(file.suffix.lower() == ".parquet" for file in files)
    if is_parquet and spec.encoding != SourceSpec.encoding:
        problems.append("encoding has no effect on Parquet files: leave it out")
    twice = [name for name, count in Counter(_columns(spec)).items() if count > 1]
    if twice:
        problems.append(
            f"text_column and label_column name {', '.join(twice)} twice: once is enough"
        )
    _, (negative, positive) = _labels(spec)
    if negative == positive:
        problems.append(f"label_names got {spec.label_names!r}, which is one label twice")
    return problems


def hash_files(files: list[tuple[str, Path]], cache: Path) -> str:
    """Hash splits, names and contents."""
    digest = hashlib.sha256()
    for split, path in files:
        digest.update(f"{split}\0{path.name}\0{file_hash(path, cache)}\0".encode())
    return digest.hexdigest()


def watch(paths: Iterable[Path]) -> Callable[[], list[Path]]:
    """Return what tells which of these files were written to or replaced since now."""
    before = {path: _stamp(path) for path in paths}
    return lambda: [path for path, found in before.items() if _stamp(path) != found]


def _stamp(path: Path) -> list[int] | None:
    return stamp(path.stat()) if path.exists() else None


def _files_by_split(folder: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """Sort a folder's files by split, and complain about those that fit nowhere."""
    files: dict[str, list[Path]] = {}
    problems = []
    for path in sorted(folder.rglob("*")):
        suffix, parts = path.suffix.lower(), path.relative_to(folder).parts
        hidden = any(part.startswith(".") for part in parts)
        if path.is_symlink() and path.is_dir() and not hidden:
            problems.append(
                f"{path}: a link to a folder is not followed; link to its files instead"
            )
        if not path.is_file() or hidden or suffix not in {*READERS, *DATA_LIKE}:
            continue
        match = SPLIT_NAME.fullmatch(parts[0]) or SPLIT_NAME.fullmatch(path.name)
        if match:
            files.setdefault(SPLIT_WORDS[match[1].lower()], []).append(path)
        else:
            problems.append(f"{path}: name it train, validation or test, or take it out")
    for name, paths in files.items():
        problems += _doubts(folder, name, paths)
        if len({file.suffix.lower() for file in paths}) > 1:
            found = ", ".join(file.name for file in paths[:5])
            problems.append(f"{folder}: {name} is there in several formats ({found}); keep one")
    if "train" not in files:
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:10]) or "nothing"
        problems.append(
            f"{folder}: found no train file; a folder holds train{' or train'.join(READERS)} and, "
            f"if you have them, validation.* and test.*; it has {found}"
        )
    return files, problems


def _doubts(folder: Path, name: str, paths: list[Path]) -> list[str]:
    """Complain about files that may be copies of a split or of a part of it, and about absent parts."""
    problems = []
    whole = [path for path in paths if path.parent == folder and path.stem.lower() in SPLIT_WORDS]
    if whole and len(paths) > 1:
        others = ", ".join(path.name for path in paths if path != whole[0])
        problems.append(
            f"{folder}: is {name} {whole[0].name}, or that and {others}? Take out what does not belong "
            f"to it; call parts {name}-1{whole[0].suffix}, {name}-2{whole[0].suffix} ..."
        )
    for place in sorted({path.parent for path in paths}):
        missing = missing_parts(path.name for path in paths if path.parent == place)
        problems += [f"{place / missing[0]} is missing"] if missing else []
    return problems


def _origin(path: Path, name: str, paths: list[Path]) -> str:
    """Say where rows come from, the way that messages name it."""
    return paths[0].name if len(paths) == 1 else f"{path.name}/{name}* ({len(paths)} files)"


def _columns(spec: SourceSpec) -> list[str]:
    return [name.strip() for name in (*spec.text_column.split(","), spec.label_column)]


def _column_problems(path: Path, spec: SourceSpec) -> list[str]:
    """Check that a file can be opened, has rows, and has the named columns."""
    if path.stat().st_size == 0:
        return [f"{path}: the file is empty"]
    try:
        found = _column_names(path, spec)
    except UNREADABLE as error:
        return [_unreadable(path, spec, error)]
    if found is None:
        return [f"{path}: has no rows"]
    problems = []
    for name in dict.fromkeys(_columns(spec)):
        if found.count(name) > 1:
            problems.append(f"{path}: has {found.count(name)} columns {name!r}; rename all but one")
        if name not in found:
            close = difflib.get_close_matches(name, found, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            flag = "--label_column" if name == spec.label_column.strip() else "--text_column"
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
    with open_text(path, spec) as lines:
        if path.suffix.lower() == ".jsonl":
            return _json_columns(lines)
        header = _header(_reader(lines, _delimiter(path, spec)))
        return header if next(lines, None) is not None else None


def _json_columns(lines: TextIO) -> list[str] | None:
    """Return the keys of the first objects, which may lack optional ones; None without any line."""
    first = list(itertools.islice((line for line in lines if line.strip()), 100))
    found: dict[str, None] = {}
    for line in first:
        row = _json_object(line)
        found |= dict.fromkeys(row or {})
    return list(found) if first else None


def _unreadable(path: Path, spec: SourceSpec, error: Exception) -> str:
    return f"{path}: cannot be read as {path.suffix[1:]} in {spec.encoding}: {error}"


def open_text(path: Path, spec: SourceSpec) -> TextIO:
    """Open a text file so that bytes which do not decode survive as lone surrogates, row by row."""
    with path.open("rb") as file:
        start = file.read(2)
    if start == b"\x1f\x8b":
        raise ValueError("it is compressed (gzip); unpack it first")
    is_utf8 = codecs.lookup(spec.encoding).name == "utf-8"
    if is_utf8 and start in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError("it starts with a UTF-16 mark; add --encoding utf-16")
    encoding = "utf-8-sig" if is_utf8 else spec.encoding
    return path.open(encoding=encoding, errors="surrogateescape", newline="")


def _delimiter(path: Path, spec: SourceSpec) -> str:
    """Return the delimiter under which the header has the named columns, else most columns."""
    usual = "\t" if path.suffix.lower() == ".tsv" else ","
    with open_text(path, spec) as lines:
        first = next(lines, "")
    headers = {mark: _header(csv.reader([first], delimiter=mark)) for mark in usual + DELIMITERS}
    fitting = [mark for mark, header in headers.items() if set(_columns(spec)) <= set(header)]
    return fitting[0] if fitting else max(headers, key=lambda mark: len(headers[mark]))


def _read_files(paths: list[Path], spec: SourceSpec) -> Iterator[Row]:
    for path in paths:
        try:
            yield from READERS[path.suffix.lower()](path, spec)
        except UNREADABLE as error:
            raise DataError([_unreadable(path, spec, error)]) from error


def _csv_rows(lines: TextIO, path: Path, spec: SourceSpec) -> tuple[list[str], "CsvReader"]:
    """Return a file's columns, and what reads the rows behind them; quotes may enclose columns alone."""
    delimiter = _delimiter(path, spec)
    header = _header(_reader(lines, delimiter))
    return header, _reader(lines, delimiter, quotes_are_text=_quotes_are_text(path, spec))


def _reader(lines: TextIO, delimiter: str, *, quotes_are_text: bool = False) -> "CsvReader":
    csv.field_size_limit(MAX_CELL)  # it holds for the whole process
    quoting: Literal[0, 3] = csv.QUOTE_NONE if quotes_are_text else csv.QUOTE_MINIMAL
    # strict: a stray quote is an error instead of swallowing the rows up to the next quote
    return csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)


def _header(rows: "CsvReader") -> list[str]:
    return [name.strip() for name in next(rows, [])]


def _quotes_are_text(path: Path, spec: SourceSpec) -> bool:
    """Tell whether no quote of a file encloses a cell, as in the TSV files of Amazon and of GLUE.

    That is so if all lines have the header's tabs, and are not all rows if quotes enclose cells.
    """
    if path.suffix.lower() not in (".csv", ".tsv") or _delimiter(path, spec) != "\t":
        return False
    with open_text(path, spec) as lines:
        lines_by_tabs = Counter(line.count("\t") for line in lines if line.strip("\r\n"))
    return len(lines_by_tabs) == 1 and lines_by_tabs.total() != _count_quoted(path, spec)


def _count_quoted(path: Path, spec: SourceSpec) -> int | None:
    """Return the rows of a TSV file if quotes enclose cells; None if they cannot."""
    with open_text(path, spec) as lines, suppress(csv.Error):
        return sum(1 for cells in _reader(lines, "\t") if cells)
    return None


def _read_csv(path: Path, spec: SourceSpec) -> Iterator[Row]:
    with open_text(path, spec) as lines:
        header, rows = _csv_rows(lines, path, spec)
        places = [header.index(name) for name in _columns(spec)]
        while True:
            try:
                cells = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield Row(str(error), None, problem=UNCLEAR_END)
                continue
            if cells:  # else a blank line
                yield _csv_row(cells, len(header), places)


def _csv_row(cells: list[str], width: int, places: list[int]) -> Row:
    if len(cells) != width:
        problem = f"{len(cells)} fields where the header has {width}"
        return Row(" | ".join(cells), None, problem=problem)
    *parts, label = (cells[place] for place in places)
    return make_row(parts, label)


def _read_jsonl(path: Path, spec: SourceSpec) -> Iterator[Row]:
    columns = _columns(spec)
    with open_text(path, spec) as lines:
        for line in lines:
            if line.strip():
                yield _json_row(line, columns)


def _json_row(line: str, columns: list[str]) -> Row:
    row = _json_object(line)
    if row is None:
        return Row(line.strip(), None, problem="not a JSON object")
    *parts, label = (row.get(name) for name in columns)
    return make_row(parts, label)


def _json_object(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _read_parquet(path: Path, spec: SourceSpec) -> Iterator[Row]:
    import pyarrow.parquet

    columns = _columns(spec)
    for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1024, columns=columns):
        for *parts, label in zip(*(_values(batch[name]) for name in columns), strict=True):
            yield make_row(parts, label)


def _values(column: Any) -> list[Any]:
    """Return a column as a list; text that is not UTF-8 keeps its bytes as lone surrogates."""
    import pyarrow

    kind = column.type.value_type if pyarrow.types.is_dictionary(column.type) else column.type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        return column.to_pylist()
    cells = column.cast(kind).cast(pyarrow.large_binary()).to_pylist()
    return [None if cell is None else cell.decode(errors="surrogateescape") for cell in cells]


UNREADABLE = (UnicodeError, LookupError, csv.Error, ValueError, OSError)
"""What readers raise on a file that is not what its name says; pyarrow's errors are ValueErrors."""

Reader = Callable[[Path, SourceSpec], Iterator[Row]]
READERS: dict[str, Reader] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
