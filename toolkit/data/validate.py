"""One pass over a source that finds every row which cannot be used, before anything is built on it."""

from array import array
from dataclasses import dataclass

import numpy as np

from toolkit.data.sources import Source, Split, canonical
from toolkit.errors import DataError

SHOWN_ROWS = 20
MAX_KINDS = 200
"""Distinct labels and problems that are told apart; further ones share the last number."""

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


@dataclass
class Scan:
    """What one pass over a split found; the arrays have one entry for each row."""

    split: Split
    label_codes: np.ndarray
    label_kinds: list[str]
    problem_codes: np.ndarray
    problem_kinds: list[str]
    groups: np.ndarray

    def __len__(self) -> int:
        return len(self.label_codes)


@dataclass(frozen=True)
class CheckedSplit:
    """A split whose usable rows are known."""

    split: Split
    labels: np.ndarray
    """0 or 1; meaningless where `usable` is False."""
    usable: np.ndarray
    groups: np.ndarray
    problem_codes: np.ndarray
    problem_kinds: list[str]

    def problem(self, row: int) -> str:
        """Say why a row cannot be used."""
        return self.problem_kinds[self.problem_codes[row]]


def check(source: Source, bad_rows: str) -> dict[str, CheckedSplit]:
    """Read every split once and sort its rows into usable and not.

    Args:
        source: the data set.
        bad_rows: "error" to refuse rows that cannot be used, "quarantine" to set them aside.

    Raises:
        DataError: listing all problems of all splits.
    """
    scans = {name: _scan(split) for name, split in source.splits.items()}
    kinds = sorted({kind for scan in scans.values() for kind in scan.label_kinds} - {""})
    values = source.label_values or _usual_pair(kinds)
    checked = {name: _apply_labels(scan, values) for name, scan in scans.items()}
    problems = [] if bad_rows == "quarantine" else _all_row_problems(checked)
    if values is None:
        problems.append(
            f"cannot tell which two labels are meant, the rows have {kinds[:10]}; name them, the "
            "negative one first: --label_names '[NEGATIVE, POSITIVE]' (a wrong --label_column looks "
            "like this too)"
        )
    if problems:
        raise DataError(problems)
    assert values is not None
    missing = [text for split in checked.values() for text in _missing_classes(split, values)]
    if missing:
        raise DataError(missing)
    return checked


def _scan(split: Split) -> Scan:
    labels, problems, groups = array("B"), array("B"), array("q")
    label_codes: dict[str, int] = {}
    problem_codes: dict[str, int] = {"": 0}
    for row in split.read():
        labels.append(0 if row.problem else _code(label_codes, canonical(row.label)))
        problems.append(_code(problem_codes, row.problem) if row.problem else 0)
        groups.append(row.group)
    if not labels:
        raise DataError([f"{split.origin}: has no rows"])
    return Scan(
        split,
        np.frombuffer(labels, np.uint8),
        list(label_codes) or [""],
        np.frombuffer(problems, np.uint8),
        list(problem_codes),
        np.frombuffer(groups, np.int64),
    )


def _code(codes: dict[str, int], kind: str) -> int:
    if kind not in codes and len(codes) >= MAX_KINDS:
        kind = "of yet another kind"
    return codes.setdefault(kind, len(codes))


def _usual_pair(kinds: list[str]) -> tuple[str, str] | None:
    """Find the usual pair of label values that occurs in the rows; None if there is not just one."""
    found = [pair for pair in USUAL_PAIRS if pair[0] in kinds and pair[1] in kinds]
    return found[0] if len(found) == 1 else None  # 0, 1 and 2 together hold two pairs


def _apply_labels(scan: Scan, values: tuple[str, str] | None) -> CheckedSplit:
    """Turn label codes into classes, and unknown labels into problems, if the classes are known."""
    kinds = list(scan.problem_kinds)
    class_of_code = np.zeros(len(scan.label_kinds), np.uint8)
    problem_of_code = np.zeros(len(scan.label_kinds), np.uint16)
    for code, kind in enumerate(scan.label_kinds):
        if values and kind in values:
            class_of_code[code] = values.index(kind)
        elif values:
            problem_of_code[code] = len(kinds)
            kinds.append(f"label {kind[:40]!r}, which is neither {values[0]!r} nor {values[1]!r}")
    problems = scan.problem_codes.astype(np.uint16)
    problems = np.where(problems, problems, problem_of_code[scan.label_codes])
    return CheckedSplit(
        scan.split, class_of_code[scan.label_codes], problems == 0, scan.groups, problems, kinds
    )


def _all_row_problems(checked: dict[str, CheckedSplit]) -> list[str]:
    problems = [text for split in checked.values() for text in _row_problems(split)]
    if problems:
        problems.append("to go on without these rows: --bad_rows quarantine")
    return problems


def _row_problems(split: CheckedSplit) -> list[str]:
    texts = []
    for code in np.unique(split.problem_codes[~split.usable]):
        rows = np.flatnonzero(split.problem_codes == code) + 1
        shown = ", ".join(map(str, rows[:SHOWN_ROWS]))
        more = f" and {len(rows) - SHOWN_ROWS} more" if len(rows) > SHOWN_ROWS else ""
        noun = "row" if len(rows) == 1 else "rows"
        texts.append(
            f"{split.split.origin}: {len(rows)} {noun} with {split.problem_kinds[code]}: {shown}{more}"
        )
    return texts


def _missing_classes(split: CheckedSplit, values: tuple[str, str]) -> list[str]:
    present = np.unique(split.labels[split.usable])
    absent = [value for number, value in enumerate(values) if number not in present]
    return [f"{split.split.origin}: no usable row has the label {value!r}" for value in absent]
