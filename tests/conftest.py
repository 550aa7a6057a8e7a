"""Fixtures: a tiny BERT, tiny reviews, and an environment without the developer's own settings."""

import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.kernels import interpret_triton
from tests.tiny import build_cache, make_data, make_encoder
from toolkit.data.cache import TokenSplit
from toolkit.data.prepare import DataSpec

LONGEST = (
    "test_faults",
    "test_slurm",
    "test_zero",
    "test_wandb",
    "test_quality",
    "test_distributed",
)
"""Files of minutes; begun last, one of them would run alone at the end."""


def pytest_configure() -> None:
    """Let Triton be interpreted in this process where there is no GPU, and nowhere else."""
    interpret_triton()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the developer's own settings out of the tests, and W&B off the network."""
    for name in list(os.environ):
        if name.startswith(("WANDB_", "ACCELERATE_")):
            monkeypatch.delenv(name)
    # most users do not set it, and with it no text is ever left in a buffer that cannot be written
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Callable[[], None]:
    """Accelerate keeps its state in singletons; each test starts without, or resets it itself."""
    _reset_accelerate()
    return _reset_accelerate


def _reset_accelerate() -> None:
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


@pytest.fixture(scope="session")
def shared_cache() -> Path:
    """The user's own cache: the embedded encoder and reviews are fetched once, not for each run."""
    from toolkit.config import RunConfig, cache_dir

    return cache_dir(RunConfig())


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT with random weights: 2 layers, 32 units, a vocabulary of some 40 words."""
    return make_encoder(tmp_path_factory.mktemp("tiny_encoder"))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.csv (120 rows) and test.csv (41 rows)."""
    return make_data(tmp_path_factory.mktemp("tiny_data"))


@pytest.fixture(scope="session")
def split(
    tiny_data: Path, tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory
) -> TokenSplit:
    """The tokens of train.csv."""
    folder = tmp_path_factory.mktemp("split")
    return build_cache(DataSpec(str(tiny_data)), tiny_encoder, folder).splits["train"]


@pytest.fixture
def tiny_flags(tiny_encoder: Path, tiny_data: Path, tmp_path: Path) -> list[str]:
    """Flags of a run that takes a second."""
    return [
        f"--encoder={tiny_encoder}",
        f"--dataset={tiny_data}",
        f"--cache_dir={tmp_path / 'cache'}",
        f"--output_dir={tmp_path / 'runs'}",
        "--track=none",
        "--max_length=32",
        "--batch_size=16",
        "--lr=0.003",
        "--cpu_threads=1",
    ]


@pytest.fixture(scope="session")
def worker_flags(
    tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path, tiny_data: Path
) -> list[str]:
    """Flags for the scripts in `workers`."""
    return [
        f"--encoder={tiny_encoder}",
        f"--dataset={tiny_data}",
        f"--cache_dir={tmp_path_factory.mktemp('worker_cache')}",
        "--max_length=32",
        "--batch_size=16",
        "--lr=0.001",
        "--dropout=0.2",
        "--track=none",
    ]


@pytest.fixture
def silent_server() -> Iterator[str]:
    """A server on the loopback interface that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
