"""Where ranks find each other when they start again under a launcher that lives on.

The launcher's store outlives them, and in it the addresses they left: a rank that reads an old one
waits for a dead process until its timeout. Torch 2.13 has no guard against that (`_create_c10d_store`
counts on a new store for each attempt), so each attempt gets a part of the store for itself.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any
from urllib.parse import urlsplit

from torch.distributed import PrefixStore, Store
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

from toolkit.restart import attempt

SCHEME = "attempt"


def init_method() -> str:
    """Return the URL by which torch's process group is to be made."""
    _register()
    return f"{SCHEME}://"


@cache  # torch refuses a second time
def _register() -> None:
    register_rendezvous_handler(SCHEME, _meet)


def _meet(url: str, **options: Any) -> Iterator[tuple[Store, int, int]]:
    """Meet as `env://` does, under a prefix."""
    place = f"env://?{urlsplit(url).query}"  # rank and world_size, where the caller knew them
    for store, rank, world_size in rendezvous(place, **options):
        yield PrefixStore(f"attempt-{attempt()}", store), rank, world_size
