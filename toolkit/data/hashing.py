"""Seeded choices as pure integer functions, the same on every machine and library version."""

import hashlib

import numpy as np


def mix64(values: np.ndarray) -> np.ndarray:
    """Scramble 64-bit integers, one to one.

    The finaliser of SplitMix64 (Steele, Lea and Flood, 2014: Fast Splittable Pseudorandom Number
    Generators).
    """
    mixed = values.astype(np.uint64)  # a copy; the arithmetic below wraps on purpose
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def key64(*parts: int | str) -> np.uint64:
    """Make one 64-bit key of a purpose and its seeds."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return np.frombuffer(digest[:8], dtype="<u8")[0]


def hash64(key: np.uint64, values: np.ndarray) -> np.ndarray:
    """Return one random-looking 64-bit integer for each value, as a function of key and value."""
    return mix64(mix64(np.asarray(values).astype(np.uint64)) ^ key)


def shuffled(key: np.uint64, count: int) -> np.ndarray:
    """Return a permutation of `range(count)` that depends on the key alone.

    Each number goes into the low bits of its hash: sorting values takes half the time of sorting places
    by them, and what is equal above those bits is still in one order on every machine.
    """
    numbers = np.arange(count, dtype=np.uint64)
    low = np.uint64((1 << max(count - 1, 0).bit_length()) - 1)
    mixed = (hash64(key, numbers) & ~low) | numbers
    mixed.sort()
    return (mixed & low).astype(np.int64)
