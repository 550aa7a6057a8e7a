"""Which rows go into which split: seeded, stratified, and never a group on two sides."""

from collections.abc import Mapping

import numpy as np

from toolkit.data.hashing import hash64, key64
from toolkit.data.validate import CheckedSplit
from toolkit.errors import DataError

TEST_SHARE = 0.2
"""Share of the rows that becomes the test split of a source that has none."""
VALIDATION_SHARE = 0.1
MAX_VALIDATION_ROWS = 10_000
"""Size of the default validation split, in relation to the training rows and at most."""

Selection = dict[str, tuple[str, np.ndarray]]
"""Our split -> (split of the source, sorted row numbers in it)."""


def select(
    splits: Mapping[str, CheckedSplit],
    *,
    seed: int,
    train_rows: int | None,
    validation_rows: int | None,
    test_rows: int | None,
) -> Selection:
    """Choose the rows of train, validation and test as a function of the data and the seed.

    Raises:
        DataError: when a split cannot be made as large, or as balanced, as was asked for.
    """
    train = np.flatnonzero(splits["train"].usable)
    if train_rows:
        # before others take theirs
        shared = not {"validation", "test"} <= splits.keys()
        _refuse_shortage(splits["train"], train, train_rows, "train", shared=shared)
    selection: Selection = {}
    if "test" in splits:
        test_source, test = "test", np.flatnonzero(splits["test"].usable)
    else:
        test_source, test = (
            "train",
            _carve(splits["train"], train, int(len(train) * TEST_SHARE), seed, "test"),
        )
        train = np.setdiff1d(train, test, assume_unique=True)
    if "validation" in splits:
        validation = np.flatnonzero(splits["validation"].usable)
        if validation_rows:
            validation = _balanced(
                splits["validation"], validation, validation_rows, seed, "validation"
            )
        selection["validation"] = ("validation", validation)
    else:
        count = validation_rows or default_validation_rows(train_rows or len(train))
        validation = _carve(splits["train"], train, count, seed, "validation")
        train = np.setdiff1d(train, validation, assume_unique=True)
        selection["validation"] = ("train", validation)
    if train_rows:
        train = _balanced(splits["train"], train, train_rows, seed, "train")
    if test_rows:
        test = _balanced(splits[test_source], test, test_rows, seed, "test")
    selection |= {"train": ("train", train), "test": (test_source, test)}
    _refuse_one_sided(splits, selection)
    return selection


def texts_in_train(splits: Mapping[str, CheckedSplit], selection: Selection) -> dict[str, int]:
    """Return how many rows of validation and test have a text that a training row has, too."""
    texts = {name: splits[source].texts[rows] for name, (source, rows) in selection.items()}
    return {
        name: int(np.isin(texts[name], texts["train"]).sum()) for name in ("validation", "test")
    }


def default_validation_rows(train_rows: int) -> int:
    """Return the size of a validation split that nobody stated, for so many rows in all."""
    return max(2, min(int(train_rows * VALIDATION_SHARE), MAX_VALIDATION_ROWS))


def _carve(
    split: CheckedSplit, rows: np.ndarray, count: int, seed: int, purpose: str
) -> np.ndarray:
    """Take about `count` rows with the classes in their proportions; by whole groups if there are any."""
    if count >= len(rows):
        few = f"{split.split.origin} has {len(rows)} rows left"
        raise DataError(
            [f"{few}, too few to take {count} for {purpose} and keep some for training"]
        )
    if (split.groups[rows] >= 0).any():
        return _carve_groups(split, rows, count, seed, purpose)
    order = _seeded_order(rows, seed, purpose)
    classes = split.labels[order]
    positives = round(count * float(classes.mean()))
    if np.bincount(classes, minlength=2).min() > 1:  # of rare ones too, a row for each side
        positives = min(max(1, positives), count - 1)
    chosen = [order[classes == 0][: count - positives], order[classes == 1][:positives]]
    return np.sort(np.concatenate(chosen))


def _carve_groups(
    split: CheckedSplit, rows: np.ndarray, count: int, seed: int, purpose: str
) -> np.ndarray:
    """Take whole groups in seeded order, as many as come nearest to `count` rows."""
    groups, sizes = np.unique(split.groups[rows], return_counts=True)
    order = np.argsort(hash64(key64("split", purpose, seed), groups))
    taken = int(np.argmin(np.abs(np.cumsum(sizes[order]) - count))) + 1
    return rows[np.isin(split.groups[rows], groups[order[:taken]])]


def _balanced(
    split: CheckedSplit, rows: np.ndarray, count: int, seed: int, purpose: str
) -> np.ndarray:
    """Take `count` rows, as many of one class as of the other (one more of class 1 if odd)."""
    wanted = _refuse_shortage(split, rows, count, purpose)
    order = _seeded_order(rows, seed, purpose)
    classes = split.labels[order]
    chosen = [order[classes == number][: wanted[number]] for number in (0, 1)]
    return np.sort(np.concatenate(chosen))


def _refuse_shortage(
    split: CheckedSplit, rows: np.ndarray, count: int, purpose: str, *, shared: bool = False
) -> tuple[int, int]:
    """Return how many rows of each class `_balanced` takes, if they are there.

    `shared` means that other splits will take some of them.
    """
    wanted = (count // 2, count - count // 2)
    have = np.bincount(split.labels[rows], minlength=2).tolist()
    if have[0] < wanted[0] or have[1] < wanted[1]:
        most = f"{2 * min(have)} at most"
        if shared:
            most = f"less than {2 * min(have)}, of which validation or test take their part"
        raise DataError(
            [
                f"--{purpose}_rows {count}: needs {wanted[0]} + {wanted[1]} rows of the two classes, "
                f"{split.split.origin} has {have[0]} + {have[1]} to give; "
                f"ask for {most}"
            ]
        )
    return wanted


def _seeded_order(rows: np.ndarray, seed: int, purpose: str) -> np.ndarray:
    return rows[np.argsort(hash64(key64("subset", purpose, seed), rows))]


def _refuse_one_sided(splits: Mapping[str, CheckedSplit], selection: Selection) -> None:
    """Refuse splits without a row of each class, whose scores would mean nothing."""
    problems = []
    for name, (source, rows) in selection.items():
        counts = np.bincount(splits[source].labels[rows], minlength=2).tolist()
        if min(counts) == 0:
            problems.append(
                f"{name} has {counts[0]} negative and {counts[1]} positive rows, and needs one of each "
                "at least: more rows, or another --split_seed"
            )
    if problems:
        raise DataError(problems)
