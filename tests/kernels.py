"""The GPU's kernels where there is no GPU: Triton's interpreter runs them, program after program."""

from importlib.util import find_spec

import pytest
import torch


def interpret_triton() -> None:
    """Make the interpreter run what is defined from now on: Triton's own functions, and the kernels.

    Programs that a test starts know nothing of it.
    """
    if torch.cuda.is_available() or not find_spec("triton"):
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")  # read where Triton's functions are defined
        import triton
    triton.knobs.propagate_env = False  # to programs that a test starts
    triton.knobs.runtime.interpret = True  # and where others are


def use_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let packed attention take the kernels on this machine's device."""
    pytest.importorskip("triton")
    from toolkit.model import attention, kernels

    monkeypatch.setattr(attention, "has_kernel", lambda x: True)
    if not torch.cuda.is_available():  # the interpreter takes its time for each turn of a loop
        monkeypatch.setitem(kernels.TILES, "STEP", 64)
