"""Where a run came from: commit, versions, hardware."""

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import toolkit
from toolkit.machine import usable_cores

PACKAGES = (
    "torch", "transformers", "accelerate", "datasets", "tokenizers", "deepspeed", "wandb",
    "numpy", "scikit-learn", "safetensors",
)  # fmt: skip


def provenance() -> dict[str, Any]:
    """Return what does not depend on the configuration. Holds no environment dump: keys live there."""
    changes = _git("status", "--porcelain")
    return {
        "toolkit": toolkit.__version__,
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": None if changes is None else bool(changes),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": len(usable_cores()),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "host": platform.node(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "program": Path(sys.argv[0]).name,
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """Ask git about the toolkit's own checkout; None where it is not one, or git does not say."""
    folder = Path(toolkit.__file__).resolve().parents[1]
    if not (
        folder / ".git"
    ).exists():  # installed in an environment, which may lie in another checkout
        return None
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), "")
