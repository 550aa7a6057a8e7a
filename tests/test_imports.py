import gc
import importlib
import sys
from collections.abc import Iterator

import pytest

from toolkit.imports import uncollected

SMALL = "this"
"""A module that nothing else imports."""


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    gc.unfreeze()
    gc.enable()
    sys.modules.pop(SMALL, None)


def test_imports_are_out_of_the_collectors_way() -> None:
    gc.unfreeze()
    with uncollected():
        assert not gc.isenabled()
        importlib.import_module(SMALL)
    assert gc.isenabled()
    assert gc.get_freeze_count() > 0


def test_what_imports_nothing_keeps_nothing() -> None:
    importlib.import_module(SMALL)
    gc.unfreeze()
    with uncollected():
        importlib.import_module(SMALL)
    assert gc.get_freeze_count() == 0


def test_an_import_that_fails_and_a_collector_that_was_off() -> None:
    with pytest.raises(ModuleNotFoundError), uncollected():
        importlib.import_module("no_such_module")
    assert gc.isenabled()
    gc.disable()
    with uncollected():
        importlib.import_module(SMALL)
    assert not gc.isenabled()
