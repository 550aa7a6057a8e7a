"""Files that a reader never sees half of: written aside, synced, published by one rename. And hashes."""

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

LARGE_BYTES = 2**24
"""To hash as many takes 15 ms."""
SETTLED_SECONDS = 60
"""Later a write does move a file's times: memory that is mapped to it has gone to disk, two moments are
told apart, and two machines' clocks differ by less."""


@contextmanager
def lock(target: Path) -> Iterator[None]:
    """Hold the only builder's place for `target`; the kernel frees it when the process dies."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with lock_file(target):
        yield


def lock_file(target: Path) -> FileLock:
    """Return the lock next to `target`; on a file system without locks it is an `OSError` to take it.

    Otherwise filelock 4.2 would take the file's existence for the lock, which outlives a killed process.
    """
    return FileLock(lock_path(target), fallback_to_soft=False)


def lock_path(target: Path) -> Path:
    """Return where the lock of `target` is."""
    return target.with_name(f".{target.name}.lock")


@contextmanager
def publish_folder(target: Path) -> Iterator[Path]:
    """Yield a hidden folder next to `target` and rename it into place when the block succeeds.

    What killed builders left is removed; so call it with `lock(target)` held.
    """
    for left in target.parent.glob(f".{target.name}.tmp-*"):
        shutil.rmtree(left)
    aside = target.with_name(f".{target.name}.tmp-{uuid.uuid4().hex[:8]}")
    aside.mkdir(parents=True)
    try:
        yield aside
        for path in sorted(aside.rglob("*")):
            sync(path)
        sync(aside)
        aside.rename(target)
        sync(target.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


@contextmanager
def publish_file(target: Path) -> Iterator[Path]:
    """Yield a hidden place for a file and rename it to `target` when the block succeeds."""
    aside = target.with_name(f".{target.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        yield aside
        sync(aside)
        aside.replace(target)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync(target.parent)


def write_text(path: Path, text: str) -> None:
    """Write a file whole: a reader sees the old content or the new one."""
    with publish_file(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def facts_in(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file; nothing of one that is absent, or not ours to read."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def file_hash(path: Path, cache: Path) -> str:
    """Return the SHA-256 of a file: a second for each gigabyte, and none if the cache knows it.

    A large file's is kept together with its size, inode and times. Whoever writes to it moves its
    `ctime`, which on disks and NFS no program can set; that of a file which has just been written to is
    not kept, much as git does it.
    """
    name = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:16]
    note = cache / "hashes" / f"{name}.json"
    with path.open("rb") as file:  # opened first: then a network file system has looked again
        before = os.fstat(file.fileno())
        is_large = before.st_size >= LARGE_BYTES
        known = facts_in(note) if is_large else {}
        if known.get("stamp") == stamp(before) and "sha256" in known:
            return str(known["sha256"])
        found = hashlib.file_digest(file, "sha256").hexdigest()
        is_unchanged = stamp(os.fstat(file.fileno())) == stamp(before)
    if is_large and is_unchanged and time.time() - before.st_ctime > SETTLED_SECONDS:
        with suppress(OSError):  # a cache that is only read: hashed again by the next start
            note.parent.mkdir(parents=True, exist_ok=True)
            facts = {"path": str(path.absolute()), "stamp": stamp(before), "sha256": found}
            write_json(note, facts)
    return found


def stamp(status: os.stat_result) -> list[int]:
    """Return what tells that a file was written to or replaced."""
    return [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]


def share_like_its_folder(path: Path) -> None:
    """Let those read a file that may read its folder: safetensors (0.8) makes it its owner's alone."""
    path.chmod(path.parent.stat().st_mode & 0o666)


def sync(path: Path) -> None:
    """Flush a file or a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
