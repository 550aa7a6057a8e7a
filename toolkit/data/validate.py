"""One pass over a source that finds every row which cannot be used, before anything is built on it."""

from array import array
from collections import Counter
from dataclasses import dataclass

import numpy as np

from toolkit.data.rows import UNCLEAR_END, Source, Split, canonical
from toolkit.errors import DataError

SHOWN_ROWS, SHOWN_KINDS = 20, 10
"""How many row numbers a message lists, and how many kinds of problems a split's report."""
SHOWN_CHARS = 40
"""Of a label that is none of the two."""
MAX_KINDS = 10_000
"""Distinct labels that are told apart; further ones share the last number."""

USUAL_PAIRS = (
    ("0", "1"),
    ("1", "2"),
    ("-1", "1"),
    ("neg", "pos"),
    ("negative", "positive"),
    ("false", "true"),
    ("no", "yes"),
    ("bad", "good"),
)
"""Label values that need no --label_names, the negative one first."""


@dataclass(frozen=True)
class CheckedSplit:
    """A split whose usable rows are known; the arrays have one entry for each row."""

    split: Split
    labels: np.ndarray
    """0 or 1; meaningless where `usable` is False."""
    usable: np.ndarray
    groups: np.ndarray
    texts: np.ndarray
    """Hashes, of this process alone."""
    problem_codes: np.ndarray
    problem_kinds: list[str]

    def problem(self, row: int) -> str:
        """Say why a row cannot be used."""
        return self.problem_kinds[self.problem_codes[row]]

    @property
    def can_be_set_aside(self) -> bool:
        """Tell whether there are rows that cannot be used, and it is clear where they all end."""
        kinds = {self.problem_kinds[code] for code in np.unique(self.problem_codes)} - {""}
        return bool(kinds) and UNCLEAR_END not in kinds


def check(source: Source, bad_rows: str) -> dict[str, CheckedSplit]:
    """Read every split once and sort its rows into usable and not.

    Args:
        source: the data set.
        bad_rows: "error" to refuse rows that cannot be used, "quarantine" to set them aside.

    Raises:
        DataError: listing all problems of all splits.
    """
    known = source.label_values or sum(USUAL_PAIRS, ())
    scans = {name: _scan(split, known) for name, split in source.splits.items()}
    labels = sum((scan.labels() for scan in scans.values()), Counter())
    values = source.label_values or _usual_pair(labels)
    checked = {name: _apply_labels(scan, values) for name, scan in scans.items()}
    problems = [] if values else [_no_pair(labels)]
    for split in checked.values():
        problems += _row_problems(split, only_unclear=bad_rows == "quarantine")
    missing = [text for split in checked.values() for text in _missing_classes(split, values)]
    can_go_on = any(split.can_be_set_aside for split in checked.values())
    if problems and bad_rows == "error" and values and can_go_on and not missing:
        problems[-1] += "\n    To go on without these rows: --bad_rows quarantine"
    if problems + missing:
        raise DataError(problems + missing)
    return checked


@dataclass(frozen=True)
class _Scan:
    """What one pass over a split found; the arrays have one entry for each row."""

    split: Split
    label_codes: np.ndarray
    label_kinds: list[str]
    problem_codes: np.ndarray
    problem_kinds: list[str]
    groups: np.ndarray
    texts: np.ndarray

    def labels(self) -> Counter[str]:
        """Count the labels of the rows that have no other problem."""
        counts = np.bincount(self.label_codes[self.problem_codes == 0])
        return Counter(
            {self.label_kinds[code]: int(counts[code]) for code in np.flatnonzero(counts)}
        )


def _scan(split: Split, known: tuple[str, ...]) -> _Scan:
    labels, problems, groups, texts = array("H"), array("H"), array("q"), array("q")
    # known labels have their numbers from the start, so that no flood of others displaces them
    label_codes = {value: code for code, value in enumerate(sorted(set(known)))}
    problem_codes = {"": 0}
    for row in split.read():
        label = canonical(row.label)
        labels.append(_code(label_codes, label if label in label_codes else _shortened(label)))
        problems.append(_code(problem_codes, row.problem or ""))
        groups.append(row.group)
        texts.append(hash(row.text))
    if not labels:
        raise DataError([f"{split.origin}: has no rows"])
    return _Scan(
        split,
        np.frombuffer(labels, np.uint16),
        list(label_codes),
        np.frombuffer(problems, np.uint16),
        list(problem_codes),
        np.frombuffer(groups, np.int64),
        np.frombuffer(texts, np.int64),
    )


def _shortened(label: str) -> str:
    return label if len(label) <= SHOWN_CHARS else label[:SHOWN_CHARS] + "…"


def _code(codes: dict[str, int], kind: str) -> int:
    if kind not in codes and len(codes) >= MAX_KINDS:
        kind = "of yet another kind"
    return codes.setdefault(kind, len(codes))


def _usual_pair(labels: Counter[str]) -> tuple[str, str] | None:
    """Find the usual pair of values among the labels; None if there is not just one.

    1 and 2 among 1 to 5 are no pair: a pair of numbers has to be nine in ten of the numbers.
    """
    numbers = {label for label in labels if label.lstrip("+-").replace(".", "", 1).isdigit()}
    all_numbers = sum(labels[label] for label in numbers)
    pairs = [
        pair
        for pair in USUAL_PAIRS
        if set(pair) <= set(labels)
        and (not set(pair) & numbers or labels[pair[0]] + labels[pair[1]] >= 0.9 * all_numbers)
    ]
    return pairs[0] if len(pairs) == 1 else None


def _no_pair(labels: Counter[str]) -> str:
    found = sorted(labels)
    if len(found) == 1:
        return f"all rows have the label {found[0]!r}; two are needed"
    return (
        f"cannot tell which two labels are meant, the rows have {found[:SHOWN_KINDS]}; name them, the "
        "negative one first: --label_names NEGATIVE,POSITIVE (a wrong --label_column looks like this "
        "too)"
    )


def _apply_labels(scan: _Scan, values: tuple[str, str] | None) -> CheckedSplit:
    """Turn label codes into classes, and unknown labels into problems, if the classes are known."""
    kinds = list(scan.problem_kinds)
    class_of_code = np.zeros(len(scan.label_kinds), np.uint8)
    problem_of_code = np.zeros(len(scan.label_kinds), np.uint16)
    for code, kind in enumerate(scan.label_kinds):
        if values and kind in values:
            class_of_code[code] = values.index(kind)
        elif values:
            problem_of_code[code] = len(kinds)
            kinds.append(f"label {kind!r}, which is neither {values[0]!r} nor {values[1]!r}")
    problems = np.where(scan.problem_codes, scan.problem_codes, problem_of_code[scan.label_codes])
    labels = class_of_code[scan.label_codes]
    usable = problems == 0
    return CheckedSplit(scan.split, labels, usable, scan.groups, scan.texts, problems, kinds)


def _row_problems(split: CheckedSplit, *, only_unclear: bool) -> list[str]:
    """Describe the rows that cannot be used, kind by kind."""
    codes = np.unique(split.problem_codes[~split.usable]).tolist()
    if only_unclear:
        codes = [code for code in codes if split.problem_kinds[code] == UNCLEAR_END]
    texts = []
    for code in codes[:SHOWN_KINDS]:
        rows = np.flatnonzero(split.problem_codes == code) + 1
        shown = ", ".join(map(str, rows[:SHOWN_ROWS]))
        more = f" and {len(rows) - SHOWN_ROWS} more" if len(rows) > SHOWN_ROWS else ""
        noun = "row" if len(rows) == 1 else "rows"
        kind = split.problem_kinds[code]
        texts.append(f"{split.split.origin}: {len(rows)} {noun} with {kind}: {shown}{more}")
    if len(codes) > SHOWN_KINDS:
        rest = np.isin(split.problem_codes, codes[SHOWN_KINDS:]).sum()
        kinds = len(codes) - SHOWN_KINDS
        texts.append(f"{split.split.origin}: {rest} rows with {kinds} further kinds of problems")
    return texts


def _missing_classes(split: CheckedSplit, values: tuple[str, str] | None) -> list[str]:
    present = np.unique(split.labels[split.usable])
    absent = [value for number, value in enumerate(values or ()) if number not in present]
    return [f"{split.split.origin}: no usable row has the label {value!r}" for value in absent]
