"""Memory that this process has had in use: the device's, or on a CPU its own; and what is kept of it."""

import ctypes
import gc
import os
import resource
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import torch

STATUS, OWN_GROUP = Path("/proc/self/status"), Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""As in glibc's malloc.h."""
LIMITS = "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"
"""How a user sets them."""


def keep_freed_memory() -> None:
    """Let malloc keep what tensors on a CPU have left for the next ones, unless the user set its limits.

    By itself glibc gives the free top of its heap back, of which the kernel then clears each page anew:
    a tenth to a quarter of an evaluation's time, as the heap happens to lie (tests/bench/NOTES.md).
    """
    if sys.platform != "linux" or any(name in os.environ for name in LIMITS):
        return
    with suppress(AttributeError):  # not every C library has it
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        # which stops glibc from raising this one, to these 32 MB at most; larger blocks come and go
        mallopt(M_MMAP_THRESHOLD, 32 * 2**20)


def usable_bytes() -> int:
    """Return the memory of this machine or, if it is less, of the container or batch job around us."""
    found = [psutil.virtual_memory().total]
    own = OWN_GROUP.read_text().splitlines() if OWN_GROUP.exists() else []
    for line in own:
        number, _, path = line.split(":", 2)
        group = GROUPS / path.lstrip("/")
        for place in (group, *group.parents) if number == "0" else ():
            with suppress(OSError, ValueError):  # the outermost has no limit; "max" is none
                found.append(int((place / "memory.max").read_text()))
    return min(found)


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
    """Begin to look for the peak anew; a CPU's freed memory is given back before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        with suppress(AttributeError):  # not every C library has it
            ctypes.CDLL(None).malloc_trim(0)
        with suppress(OSError):  # some sandboxes have neither this nor VmHWM
            Path("/proc/self/clear_refs").write_text("5")
