"""What this machine lets a process use."""

import os


def usable_cores() -> list[int]:
    """Return the numbers of the cores that this process may use; of all, where nobody says (macOS)."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
