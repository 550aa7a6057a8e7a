"""Data sets in the layout of the hub, in a local folder, read through `datasets`."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from toolkit.errors import DataError


@functools.cache
def load(folder: Path) -> Any:
    """Load a folder in the hub's layout: its splits as Arrow tables on disk, by name.

    Raises:
        DataError: when `datasets` cannot make sense of it, or rows of a split are missing.
    """
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(str(folder))
    except Exception as error:  # of many types; the user needs the folder and the reason
        raise DataError([f"{folder}: {type(error).__name__}: {error}"]) from error


def batches(splits: Any, name: str, columns: list[str]) -> Iterator[dict[str, list[Any]]]:
    """Yield columns of a split as lists, batch by batch, in row order.

    The Arrow files are read through ordinary file reads. `datasets` would map them into memory,
    where a pass over 3.6 M reviews counts as 1.8 GB of resident pages.

    Raises:
        DataError: when the split or a column is not there.
    """
    import pyarrow

    found = splits[name].column_names if name in splits else []
    missing = [column for column in columns if column not in found]
    if missing:
        raise DataError([f"split {name} has no column {', '.join(missing)}; it has {found}"])
    for cached in splits[name].cache_files:
        with pyarrow.OSFile(cached["filename"]) as file, pyarrow.ipc.open_stream(file) as reader:
            for batch in reader:
                yield {column: batch[column].to_pylist() for column in columns}
