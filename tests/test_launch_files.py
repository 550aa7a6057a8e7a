"""A launch file that contradicts the run is refused, with both places named, before anything loads."""

import json
import subprocess
import tomllib
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace

import pytest

from tests.programs import ROOT
from toolkit import launcher
from toolkit.config import parse
from toolkit.errors import ConfigError
from toolkit.launcher import Turn, refuse_contradictions


def refused(environment: dict[str, str], *flags: str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        try:
            refuse_contradictions(parse(list(flags)))
        except ConfigError as error:
            return str(error)
    return ""


ZERO = {"ACCELERATE_USE_DEEPSPEED": "true"}


@pytest.mark.parametrize(
    ("environment", "flags", "places"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, [], ["mixed_precision", "'fp16'", "'bf16'"]),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, ["--precision=fp32"], ["--precision"]),
        (ZERO, ["--compile"], ["--compile", "DeepSpeed", "launch/ddp.yaml"]),
        ({"ACCELERATE_USE_DEEPSPEED": "True"}, ["--compile"], ["--compile", "DeepSpeed"]),
        (
            ZERO | {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
            [],
            ["gradient_accumulation_steps", "4", "--grad_accum"],
        ),
        (
            ZERO | {"ACCELERATE_GRADIENT_CLIPPING": "0.5"},
            ["--max_grad_norm=2"],
            ["gradient_clipping", "0.5", "2.0", "--max_grad_norm"],
        ),
    ],
)
def test_the_launchers_own_settings(
    environment: dict[str, str], flags: list[str], places: list[str]
) -> None:
    said = refused(environment, *flags)
    assert all(place in said for place in places), said


@pytest.mark.parametrize(
    ("environment", "flags"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "no"}, []),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, []),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, []),
        (
            ZERO
            | {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4", "ACCELERATE_GRADIENT_CLIPPING": "1"},
            ["--grad_accum=4"],
        ),
        (ZERO | {"ACCELERATE_GRADIENT_CLIPPING": "auto"}, []),
    ],
)
def test_what_agrees_passes(environment: dict[str, str], flags: list[str]) -> None:
    assert refused(environment, *flags) == ""


FITS = {
    "train_batch_size": 16,
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": 1.0,
    "bf16": {"enabled": False},
    "data_types": {"grad_accum_dtype": "fp32"},
    "zero_optimization": {"stage": 2, "overlap_comm": True},
}
CONTRADICTS = {
    "train_batch_size": 32,
    "train_micro_batch_size_per_gpu": 3,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 0.1,
    "bf16": {"enabled": True},
    "fp16": {"enabled": "auto", "loss_scale": 0},
    "torch_autocast": {"enabled": True},
    "data_types": {"grad_accum_dtype": "bf16"},
    "communication_data_type": "bf16",
    "zero_optimization": {"stage": 2, "compute_grad_norm": False},
    "optimizer": {"type": "AdamW"},
    "scheduler": {"type": "WarmupLR"},
}


def test_a_deepspeed_file(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    environment = ZERO | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path), "WORLD_SIZE": "2"}
    path.write_text(json.dumps(FITS))
    assert refused(environment) == ""
    path.write_text(json.dumps(CONTRADICTS))
    said = refused(environment)
    assert said.startswith("11 problems in the configuration"), said
    for key in CONTRADICTS.keys() - {"fp16"}:
        assert f"{key}" in said
    assert said.count(str(path)) == 11
    path.write_text("{")
    assert "cannot be read" in refused(environment)


def turn(rank: int, launcher_started: float) -> Turn:
    """Make the turn of one of two processes."""
    process = SimpleNamespace(create_time=lambda: launcher_started)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launcher.psutil, "Process", lambda _: process)
        for name, value in {"LOCAL_RANK": rank, "RANK": rank, "LOCAL_WORLD_SIZE": 2}.items():
            patch.setenv(name, str(value))
        return Turn()


def test_the_first_process_prepares_and_the_others_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where an earlier launcher of the same process id, killed, has left its sign."""
    monkeypatch.setattr(launcher.tempfile, "gettempdir", lambda: str(tmp_path))
    before = turn(0, launcher_started=1.0)
    with before.in_order():
        pass
    first, other, passed = turn(0, 2.0), turn(1, 2.0), Event()

    def wait() -> None:
        with other.in_order():
            passed.set()

    waiting = Thread(target=wait, daemon=True)
    waiting.start()
    assert not passed.wait(0.5), "the data are not prepared yet"
    with first.in_order():
        assert not passed.is_set()
    assert passed.wait(10)
    other.forget()
    assert first.done.exists(), "the first one's to remove"
    first.forget()
    assert [path for path in tmp_path.iterdir() if path != before.done] == []


def test_a_launcher_may_be_invisible(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's first process has the parent 0."""
    monkeypatch.setattr(launcher.os, "getppid", lambda: 0)
    for processes in ("1", "2"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert "-None-" in Turn().done.name


def install(venv: Path, *extra: str) -> "subprocess.CompletedProcess[str]":
    """Run install.sh with a Python of which `index` says whether pip finds a package index."""
    python = venv / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] || [ -e {venv}/index ]\n')
    python.chmod(0o755)
    settings = {"PATH": "/usr/bin:/bin", "VENV": str(venv), "PYTHON": str(python)}
    command = ["bash", str(ROOT / "launch" / "install.sh"), *extra]
    return subprocess.run(command, env=settings, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("before", "is_there", "is_missing"),
    [
        ([""], [""], ["search", "dev"]),
        (["search"], ["", "search"], ["deepspeed"]),
        (["", "search", "deepspeed"], ["", "search", "deepspeed"], ["dev"]),
        (["dev"], ["", "search", "deepspeed", "dev"], []),
    ],
)
def test_what_is_installed_needs_no_package_index(
    tmp_path: Path, before: list[str], is_there: list[str], is_missing: list[str]
) -> None:
    """Nor does an extra that cannot be had take the others away."""
    (tmp_path / "index").touch()
    for extra in before:
        assert install(tmp_path, *filter(None, [extra])).returncode == 0
    (tmp_path / "index").unlink()
    for extra in is_missing:
        assert install(tmp_path, extra).returncode != 0
    for extra in is_there:
        assert "Installed already" in install(tmp_path, *filter(None, [extra])).stdout
    stamp = tmp_path / ".bert-heads-toolkit"
    stamp.write_text(stamp.read_text().replace(" ", " 1", 1))  # of other pins
    assert install(tmp_path).returncode != 0
    assert not stamp.exists()


def test_dev_has_what_the_other_extras_have() -> None:
    """install.sh relies on it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert len(extras) == 3
    assert all(set(packages) <= set(extras["dev"]) for packages in extras.values())
