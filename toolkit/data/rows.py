"""What a data set is to the rest: splits that stream rows, each row usable or with its problem."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple


class Row(NamedTuple):
    """One review, or what is wrong with it."""

    text: str
    """The review; where there is a problem, what could be read of the row, for the side file."""
    label: Any
    group: int = -1
    """Rows of one group stay in one split; -1 means that this source has no groups."""
    problem: str | None = None


@dataclass(frozen=True)
class Split:
    """A stream of rows that can be read again from its start, in bounded memory."""

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
    """What the rows call them, in canonical form; None where that has to be recognised."""
    changed: Callable[[], list[Path]] = list
    """Return the files that were written to or replaced since `revision` was worked out."""
    notes: Callable[[], list[str]] = list
    """Return how files were understood where there was a choice; may read them."""


@dataclass(frozen=True)
class SourceSpec:
    """What a user said about where the data is. The fields are those of `RunConfig`."""

    dataset: str
    dataset_path: str | None = None
    dataset_revision: str | None = None
    text_column: str = "text"
    label_column: str = "label"
    label_names: str | None = None
    encoding: str = "utf-8"


UNCLEAR_END = "broken quoting, so that it is unclear where the row ends (mend the file)"
"""The one problem that cannot be set aside: rows behind it may be lost."""


def canonical(label: Any) -> str:
    """Write a label in one way: 1, 1.0, "+1" and " 1 " are one label, and so are "Pos" and "pos"."""
    text = str(label).strip().casefold()
    return re.sub(r"^\+(?=\d)|(?<=\d)\.0+$", "", text)


def make_row(parts: list[Any], label: Any) -> Row:
    """Join the text columns; a title that is null counts as absent when there is other text."""
    present = [part for part in parts if part is not None]
    if label is None or label == "":
        return Row(_raw(present), label, problem="no label")
    if not present:
        return Row("", label, problem="null text")
    if not all(isinstance(part, str) for part in present):
        return Row(_raw(present), label, problem="text that is not a string")
    text = "\n".join(part for part in present if part) if len(present) > 1 else present[0]
    try:
        text.encode()
    except UnicodeEncodeError:  # lone surrogates: see `local.open_text`
        return Row(text, label, problem="text in another encoding (see --encoding)")
    return Row(text, label)


def _raw(parts: list[Any]) -> str:
    return "\n".join(str(part) for part in parts)
