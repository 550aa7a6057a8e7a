"""The most memory that this process has had in use: the device's, or on a CPU its own."""

import ctypes
import gc
import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")


def peak_bytes(device: torch.device) -> int:
    """Return the most that was in use, since the start or since `forget_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if STATUS.exists():  # not ru_maxrss: a process inherits that of the one which started it
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM"):
                return 1024 * int(line.split()[1])
    unit = 1024 if sys.platform == "linux" else 1
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # is never forgotten


def forget_peak(device: torch.device) -> None:
    """Give freed memory back and begin to look for the peak anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        with suppress(AttributeError):  # not every C library has it
            ctypes.CDLL(None).malloc_trim(0)
        with suppress(OSError):  # some sandboxes have neither this nor VmHWM
            Path("/proc/self/clear_refs").write_text("5")
