"""Ways in which a disk, a copy or a person damages a checkpoint folder."""

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

Mutation = tuple[str, Callable[[Path], None]]


def mutations(good: Path, other: Path, flips: int) -> Iterator[Mutation]:
    """Yield (kind, function that damages a copy of `good`).

    Args:
        good: the checkpoint that will be copied; only its files' names and sizes are read.
        other: another checkpoint of the same run, to swap files with.
        flips: bits to flip in each file.
    """
    dice = random.Random(0)
    files = sorted(path.relative_to(good) for path in good.rglob("*") if path.is_file())
    for name in files:
        size = (good / name).stat().st_size
        for _ in range(flips):
            yield "flip", _change(name, _flip(dice.randrange(size), dice.randrange(8)))
        for length in sorted({size // 2, size - 1, 1, size // 10}):
            yield "truncate", _change(name, lambda content, length=length: content[:length])
        yield "empty", _change(name, lambda content: b"")
        yield "grow", _change(name, lambda content: content + b"\0")
        yield "delete", _delete(name)
        if (other / name).exists():
            yield "swap", _swap(name, other)
    yield "rename", _pass_off(other)


def _change(name: Path, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def mutate(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return mutate


def _flip(place: int, bit: int) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        changed = bytearray(content)
        changed[place] ^= 1 << bit
        return bytes(changed)

    return change


def _delete(name: Path) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _swap(name: Path, other: Path) -> Callable[[Path], None]:
    def mutate(folder: Path) -> None:
        shutil.copyfile(other / name, folder / name)

    return mutate


def _pass_off(other: Path) -> Callable[[Path], None]:
    """Put another checkpoint in this one's place, under its name."""

    def mutate(folder: Path) -> None:
        shutil.rmtree(folder)
        shutil.copytree(other, folder)

    return mutate
