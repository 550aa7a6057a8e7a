"""A file's hash is worked out once, and never taken for that of another content."""

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from toolkit import files
from toolkit.files import file_hash


@pytest.fixture
def settled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that counts as large, and as not written to just now."""
    monkeypatch.setattr(files, "LARGE_BYTES", 0)
    monkeypatch.setattr(files, "SETTLED_SECONDS", 0.05)
    path = tmp_path / "data.csv"
    path.write_text("one")
    time.sleep(0.1)
    return path


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Each time that a file is read for its hash, the file."""
    read: list[str] = []
    plain = hashlib.file_digest

    def digest(file: object, name: str) -> object:
        read.append(Path(file.name).name)  # type: ignore[attr-defined]
        return plain(file, name)

    monkeypatch.setattr(hashlib, "file_digest", digest)
    return read


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_a_hash_is_worked_out_once(settled: Path, tmp_path: Path, hashed: list[str]) -> None:
    cache = tmp_path / "cache"
    assert [file_hash(settled, cache) for _ in range(3)] == [sha("one")] * 3
    assert len(hashed) == 1
    [note] = (cache / "hashes").iterdir()
    kept = json.loads(note.read_text())
    for damaged in ("{", "[" * 100_000, json.dumps({"stamp": kept["stamp"]})):
        hashed.clear()
        note.write_text(damaged)
        assert file_hash(settled, cache) == sha("one")
        assert len(hashed) == 1, "a damaged note is none"
    assert json.loads(note.read_text()) == kept


def in_place(path: Path) -> None:
    path.write_text("two")


def by_rename(path: Path) -> None:
    other = path.with_name("other")
    other.write_text("two")
    other.rename(path)


@pytest.mark.parametrize("change", [in_place, by_rename])
def test_another_content_of_the_same_size_and_time(
    settled: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    """As `rsync -t` and `cp -p` leave it."""
    before = settled.stat()
    assert file_hash(settled, tmp_path) == sha("one")
    change(settled)
    os.utime(settled, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert settled.stat().st_mtime_ns == before.st_mtime_ns
    assert file_hash(settled, tmp_path) == sha("two")


def test_what_may_be_written_to_again_is_not_kept(
    settled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "SETTLED_SECONDS", 1000)
    settled.write_text("two")
    assert file_hash(settled, tmp_path) == sha("two")
    assert not (tmp_path / "hashes").exists()


def test_a_cache_that_cannot_be_written_to(settled: Path, hashed: list[str]) -> None:
    cache = settled  # a file where the folder should be
    assert [file_hash(settled, cache) for _ in range(2)] == [sha("one")] * 2
    assert len(hashed) == 2
