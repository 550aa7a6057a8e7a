"""Which data set: a name or a path -> splits that stream rows.

Adding a data set is one function and one line in `DATASETS`.
"""

import difflib
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from toolkit.assets import SNIPPETS, SNIPPETS_FILE, fetch, hub_folder, missing_parts
from toolkit.data.hub import batches, load
from toolkit.data.local import hash_files, open_local, watch
from toolkit.data.rows import Row, Source, SourceSpec, Split, make_row
from toolkit.errors import DataError

LOCAL_OPTIONS = ("text_column", "label_column", "label_names", "encoding")
HUB_OPTIONS = ("dataset_path", "dataset_revision")


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
    return open_local(spec, path, cache)


def _refuse_ignored(spec: SourceSpec) -> None:
    """Refuse settings that would have no effect on this kind of data set."""
    ignored = list(LOCAL_OPTIONS) if spec.dataset in DATASETS else []
    ignored += [] if spec.dataset in HUB_DATASETS else HUB_OPTIONS
    usual = SourceSpec(spec.dataset)
    given = [name for name in ignored if getattr(spec, name) != getattr(usual, name)]
    if spec.dataset_path and spec.dataset_revision:
        given.append("dataset_revision, given dataset_path,")
    if given:
        raise DataError([f"{name} has no effect on the data set {spec.dataset}" for name in given])


def _snippets(spec: SourceSpec, cache: Path) -> Source:
    """Sentences of Amazon product reviews with a human sentiment (Hutto and Gilbert, ICWSM 2014)."""
    path = fetch(SNIPPETS, cache) / SNIPPETS_FILE
    split = Split("train", "snippets", partial(_read_snippets, path))
    return Source({"train": split}, SNIPPETS.sha256)


def _read_snippets(path: Path) -> Iterator[Row]:
    """Keep the sentences whose mean sentiment is clear; the group is the review."""
    for line in path.read_text(encoding="utf-8").splitlines():
        identifier, sentiment, text = line.split("\t")
        if abs(float(sentiment)) >= 0.5:
            yield Row(text, int(float(sentiment) > 0), int(identifier.split("_")[0]))


AMAZON_POLARITY = "fancyzhx/amazon_polarity"
AMAZON_POLARITY_COMMIT = "9d9c45c18f8c3cf1b23a3c27917b60cbf28f3289"


def _amazon_polarity(spec: SourceSpec, cache: Path) -> Source:
    """3.6 M training and 400 k test reviews (Zhang, Zhao and LeCun, NeurIPS 2015)."""
    changed: Callable[[], list[Path]] = list  # a commit never does
    if spec.dataset_path:
        revision, locate, changed = _local_copy(spec.dataset_path, cache)
    else:
        revision, locate = _commit(spec)
    splits = {
        name: Split(name, f"amazon_polarity {name}", partial(_read_amazon_polarity, locate, name))
        for name in ("train", "test")
    }
    return Source(splits, revision, changed=changed)


def _local_copy(
    dataset_path: str, cache: Path
) -> tuple[str, Callable[[], Path], Callable[[], list[Path]]]:
    folder = Path(dataset_path).expanduser().absolute()
    files = [("", path) for path in sorted(folder.rglob("*.parquet"))]
    if not files:
        raise DataError([f"dataset_path {folder} is not a folder with Parquet files"])
    if missing := missing_parts([path.name for _, path in files]):
        raise DataError([f"dataset_path {folder}: {', '.join(missing[:5])} is missing"])
    changed = watch(path for _, path in files)
    return hash_files(files, cache), partial(Path, folder), changed


def _commit(spec: SourceSpec) -> tuple[str, Callable[[], Path]]:
    """Return the hub's commit, and a way to get it, which is taken only if there is no token cache.

    Not through `datasets.load_dataset(name)`: when the hub does not answer, that takes whatever
    revision its cache holds (5.2.0, `dataset_module_factory`).
    """
    revision = spec.dataset_revision or AMAZON_POLARITY_COMMIT
    if not re.fullmatch("[0-9a-f]{40}", revision):
        raise DataError(
            [f"dataset_revision {revision!r} is not a commit (40 digits); branches move"]
        )
    hint = (
        "--dataset snippets, --dataset PATH with your own files, or --dataset_path FOLDER with a "
    )
    patterns = ["README.md", "amazon_polarity/*.parquet"]
    locate = partial(
        hub_folder,
        AMAZON_POLARITY,
        "dataset",
        revision,
        patterns,
        required=["amazon_polarity/train-*.parquet", "amazon_polarity/test-*.parquet"],
        hint=f"{hint}copy of the repository",
    )
    return revision, locate


def _read_amazon_polarity(locate: Callable[[], Path], split: str) -> Iterator[Row]:
    columns = ["title", "content", "label"]
    for batch in batches(load(locate()), split, columns):
        for title, content, label in zip(*(batch[name] for name in columns), strict=True):
            yield make_row([title, content], label)


DATASETS: dict[str, Callable[[SourceSpec, Path], Source]] = {
    "snippets": _snippets,
    "amazon_polarity": _amazon_polarity,
}
HUB_DATASETS = ("amazon_polarity",)
"""Those that have a revision, and a layout that a local copy can have."""
