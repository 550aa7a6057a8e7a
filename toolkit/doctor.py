"""Is this machine ready to train?

    python -m toolkit doctor                                this machine, with one process
    python -m toolkit doctor --launch launch/zero2.yaml     and do these ranks find each other?

One line for each finding: ok, warning or FAILURE, and what to do. Exit code 1 if there is a failure.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlparse

from toolkit import strict_yaml
from toolkit.config import RunConfig, cache_dir
from toolkit.console import complain, say
from toolkit.machine import usable_cores
from toolkit.network import why_unreachable
from toolkit.ranks import LAUNCH_FOLDER, PROGRAMS, RanksError, ask
from toolkit.record.tracking import wandb_mode, wandb_url

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("torch", "transformers", "accelerate", "datasets", "safetensors", "wandb", "numpy")
LOW_DISK_GB, NO_DISK_GB = 10, 1
HELLO_SECONDS = 300
"""The first start under DeepSpeed on a CPU compiles its communication, which takes half a minute."""


class Finding(NamedTuple):
    """One line of the report."""

    level: str
    """ok, warning or FAILURE."""
    text: str


def main(argv: list[str]) -> int:
    """Report; return the exit code."""
    options = _options(argv)
    checks: list[Callable[[], Iterator[Finding]]] = [
        versions,
        devices,
        lambda: hello(options.launch or _default_launch(), options.num_processes),
        lambda: disk(Path(options.output_dir).expanduser(), "--output_dir"),
        lambda: disk(cache_dir(RunConfig()), "TOOLKIT_CACHE_DIR"),
        caches,
    ]
    if not options.offline:
        checks += [weights_and_biases, hub]
    failed = False
    for check in checks:
        for finding in check():
            failed = failed or finding.level == "FAILURE"
            say(f"{finding.level:<8} {finding.text}")
    say("Something is in the way of training." if failed else "Ready to train.")
    return int(failed)


def _options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="toolkit doctor", description="Is this machine ready?")
    parser.add_argument("--launch", type=Path, help="launch config to try; default: one process")
    parser.add_argument("--num_processes", type=int, help="instead of the launch config's")
    parser.add_argument("--output_dir", default="runs", help="where runs will be written")
    parser.add_argument("--offline", action="store_true", help="ask nothing of the network")
    options = parser.parse_args(argv)
    if options.launch is not None and not options.launch.is_file():
        known = ", ".join(sorted(path.name for path in LAUNCH_FOLDER.glob("*.yaml")))
        complain(f"error: --launch got {options.launch}, which is no file; there are {known}")
        raise SystemExit(2)
    if options.launch is not None:
        try:
            strict_yaml.read(options.launch)
        except ValueError as error:
            complain(f"error: --launch got {options.launch}, which is no launch config: it {error}")
            raise SystemExit(2) from error
    return options


def versions() -> Iterator[Finding]:
    """Compare what is installed with the pins."""
    level = "ok" if sys.version_info >= (3, 11) else "FAILURE"
    yield Finding(level, f"Python {sys.version.split()[0]} (3.11 or newer is needed)")
    pins = _pins()
    for name in (*NEEDED, "deepspeed"):
        try:
            found = version(name)
        except PackageNotFoundError:
            level = "warning" if name == "deepspeed" else "FAILURE"
            yield Finding(level, f"{name} is missing: launch/install.sh {_extra(name)}")
            continue
        pin = pins.get(name, found)
        if found.split("+")[0] == pin:
            yield Finding("ok", f"{name} {found}")
        else:
            yield Finding("warning", f"{name} {found}, tested is {pin}: launch/install.sh")


def _extra(name: str) -> str:
    return "deepspeed (only launch/zero*.yaml need it)" if name == "deepspeed" else ""


def _pins() -> dict[str, str]:
    path = ROOT / "constraints.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    return dict(line.split("==", 1) for line in lines if "==" in line)


def devices() -> Iterator[Finding]:
    """Name the devices and whether they compute in bf16."""
    import torch

    cores = len(usable_cores())
    if not torch.cuda.is_available():
        flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        fast = "avx512_bf16" in flags or "amx_bf16" in flags
        yield Finding("ok", f"no GPU; {cores} cores, torch {torch.__version__}")
        speed = "in hardware" if fast else "emulated: --precision fp32 may be faster"
        yield Finding("ok" if fast else "warning", f"bf16 {speed}")
        return
    from toolkit.model.attention import c_compiler

    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        yield Finding("ok", f"GPU {number}: {facts.name}, {facts.total_memory / 2**30:.0f} GiB")
    if torch.cuda.is_bf16_supported(including_emulation=False):
        yield Finding("ok", "bf16 in hardware")
    else:
        yield Finding("warning", "no bf16 in hardware: use --precision fp32")
    if not c_compiler():
        yield Finding("warning", "no C compiler for Triton: install gcc, or reviews are padded")


def _default_launch() -> Path:
    import torch

    return LAUNCH_FOLDER / ("gpu.yaml" if torch.cuda.is_available() else "cpu.yaml")


def hello(launch: Path, num_processes: int | None) -> Iterator[Finding]:
    """Start the ranks, let them add up and take one step; builds what DeepSpeed has to build."""
    if "DEEPSPEED" in launch.read_text():
        for tool in ("g++", "ninja"):
            if not _found(tool):
                yield Finding(
                    "warning", f"no {tool}, with which DeepSpeed compiles: install {tool}"
                )
    try:
        facts = ask(PROGRAMS / "hello.py", launch, num_processes, seconds=HELLO_SECONDS)
    except RanksError as error:
        yield Finding("FAILURE", f"{launch.name}: {error}")
        return
    size = facts["world_size"]
    text = f"{launch.name}: {size} x {facts['device']} ({facts['distributed_type']})"
    if facts["sum_of_ranks"] != size * (size - 1) / 2:
        yield Finding("FAILURE", f"{text} added up to something else")
    elif facts["device"] == "cpu" and not launch.name.startswith("cpu"):
        yield Finding("warning", f"{text} took a step together, but there is no GPU here")
    else:
        yield Finding("ok", f"{text} took a step together")


def _found(tool: str) -> bool:
    beside = Path(sys.executable).with_name(tool)
    return beside.exists() or shutil.which(tool) is not None


def disk(folder: Path, option: str) -> Iterator[Finding]:
    """Tell whether a folder can be written and has room."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / 1e9
    level = "ok" if free > LOW_DISK_GB else "warning" if free > NO_DISK_GB else "FAILURE"
    if not os.access(place, os.W_OK):
        yield Finding("FAILURE", f"{folder} cannot be written: name another with {option}")
    else:
        hint = (
            "" if level == "ok" else f"; a checkpoint of BERT takes 1.3 GB: free some, or {option}"
        )
        yield Finding(level, f"{folder}: {free:.0f} GB free{hint}")


def caches() -> Iterator[Finding]:
    """Say what is there already and needs no network."""
    folder = cache_dir(RunConfig())
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    prepared = len([path for path in (folder / "tokens").glob("*") if path.is_dir()])
    fetched = [name for name in found if name not in ("tokens",) and not name.startswith(".")]
    text = (
        f"{folder}: {prepared} prepared data sets; fetched: {', '.join(fetched) or 'nothing yet'}"
    )
    yield Finding("ok", text)


def weights_and_biases() -> Iterator[Finding]:
    """Tell in which mode runs will be mirrored, and whether the server answers."""
    mode = wandb_mode()
    if mode != "online":
        hint = (
            "" if os.environ.get("WANDB_MODE") else "; `wandb login` or WANDB_API_KEY to go online"
        )
        yield Finding("ok", f"W&B: {mode}{hint}")
        return
    yield _reach("W&B", wandb_url(), "runs train on; WANDB_MODE=offline says so at once")


def hub() -> Iterator[Finding]:
    """Tell whether encoders and data sets can be fetched."""
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", ""):
        yield Finding("ok", "hub: offline by HF_HUB_OFFLINE; what is cached will be used")
        return
    url = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    yield _reach(
        "hub", url, "minilm and snippets come through pip; HF_HUB_OFFLINE=1 waits for nothing"
    )


def _reach(name: str, url: str, hint: str) -> Finding:
    reason = why_unreachable(url)
    if reason:
        return Finding("warning", f"{name}: {reason}; {hint}")
    return Finding("ok", f"{name}: {urlparse(url).hostname} answers")
