"""Importing torch and transformers, which takes seconds."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Keep the garbage collector out of the imports of the block, and them out of its way afterwards.

    They make 600,000 objects that stay. Looking through them again and again is a fifth of the time
    of these imports, and each full collection, at the end of a run for one, would do so once more.
    """
    gc.collect()  # what is garbage now would be kept for good
    was_on, known = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > known:
            gc.freeze()
        if was_on:
            gc.enable()
