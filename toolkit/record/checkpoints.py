"""Which checkpoint to go on from: one that verifies, of this configuration, on this data.

    checkpoints/step-000120/
        part-00000-of-00002.safetensors   parameters and AdamW's moments by name, dealt over the ranks
        progress.json                     how far the run was
        manifest.json                     what it belongs to; size and sha256 of every file

Nothing here is a pickle, under DeepSpeed neither. A folder whose manifest does not verify is not a
checkpoint.
"""

import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.console import complain
from toolkit.errors import CheckpointError, ConfigError
from toolkit.files import sync

SCHEMA = 1
MANIFEST = "manifest.json"
PROGRESS = "progress.json"
NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class Origin:
    """What a checkpoint belongs to."""

    config: dict[str, Any]
    """The settings that define the run."""
    config_hash: str
    data: str
    """Fingerprint of the token cache."""
    encoder: str
    """Hash of the pretrained weights."""

    def facts(self) -> dict[str, Any]:
        """Return all that tells two runs apart, by name."""
        return self.config | {"data": self.data, "encoder weights": self.encoder}


class DamagedError(Exception):
    """A checkpoint that does not verify, and why."""


def folder_name(step: int) -> str:
    """Return the name of a step's checkpoint."""
    return f"step-{step:06d}"


def steps_in(folder: Path) -> list[Path]:
    """List the published checkpoints, newest first, whether they verify or not."""
    found = [path for path in folder.glob("step-*") if NAME.fullmatch(path.name)]
    return sorted(found, key=_step, reverse=True)


def newest_step(folder: Path) -> int:
    """Return the step of the newest published checkpoint, 0 if there is none."""
    return max(map(_step, steps_in(folder)), default=0)


def _step(path: Path) -> int:
    found = NAME.fullmatch(path.name)
    assert found
    return int(found[1])


def describe_file(path: Path) -> dict[str, Any]:
    """Return a file's size and sha256."""
    with path.open("rb") as file:
        return {
            "size": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """Write the manifest, its own hash included, and put it on disk."""
    path = folder / MANIFEST
    path.write_text(_with_hash(facts), encoding="utf-8")
    sync(path)


def _with_hash(facts: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return json.dumps(facts | {"manifest_sha256": digest}, indent=2, sort_keys=True) + "\n"


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return a manifest that is as it was written.

    Raises:
        DamagedError: when it is not, down to the last blank.
    """
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
        facts = json.loads(text)
        facts.pop("manifest_sha256")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{MANIFEST} cannot be read ({error})") from error
    if text != _with_hash(facts):
        raise DamagedError(f"{MANIFEST} was changed")
    if facts["schema"] != SCHEMA:
        raise DamagedError(f"{MANIFEST} has schema {facts['schema']}, this version reads {SCHEMA}")
    return facts


def verify(folder: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint, every byte of which is as it was written.

    Raises:
        DamagedError: saying what is wrong.
    """
    manifest = read_manifest(folder)
    if folder.name != folder_name(manifest["step"]):
        raise DamagedError(f"it is of step {manifest['step']}, its name says otherwise")
    for name, expected in manifest["files"].items():
        try:
            _verify_file(folder, name, expected)
        except OSError as error:
            raise DamagedError(f"{name} cannot be read ({error.strerror})") from error
    return manifest


def _verify_file(folder: Path, name: str, expected: dict[str, Any]) -> None:
    path = folder / name
    if path.name != name or path.parent != folder:
        raise DamagedError(f"{name!r} is not a file name")
    if path.is_symlink() or not path.is_file():
        raise DamagedError(f"{name} is missing")
    if path.stat().st_size != expected["size"]:
        raise DamagedError(f"{name} has {path.stat().st_size} bytes, not {expected['size']}")
    if describe_file(path) != expected:
        raise DamagedError(f"{name} was changed")


def choose(resume: str, folder: Path, origin: Origin) -> Path | None:
    """Return the checkpoint to go on from, verified; None to start from the first step.

    Args:
        resume: auto, strict, none, or the path of a checkpoint or a run folder.
        folder: the run's own checkpoints.
        origin: what this run is.

    Raises:
        CheckpointError: when there are checkpoints and none may be used.
        ConfigError: when the checkpoint is of another configuration or other data.
    """
    if resume == "none":
        return None
    candidates = (
        steps_in(folder) if resume in ("auto", "strict") else _at(Path(resume).expanduser())
    )
    damaged = []
    for path in candidates:
        try:
            manifest = verify(path)
        except DamagedError as error:
            damaged.append(f"checkpoint {path} is damaged: {error}")
            if resume == "strict":
                break
            continue
        _refuse_other_origin(path, manifest, origin, is_own=path.parent == folder)
        for problem in damaged:
            complain(f"WARNING: {problem}. The one before it is taken: {path}")
        return path
    if damaged:
        hint = "--resume none starts from the first step and keeps the old folder"
        if resume == "strict":
            hint = f"--resume auto takes the newest that is whole; {hint}"
        raise CheckpointError("\n".join([*damaged, hint]))
    return None


def _at(place: Path) -> list[Path]:
    """List the checkpoints that a path of the user's means."""
    if NAME.fullmatch(place.name) and place.is_dir():
        return [place]
    for folder in (place / "checkpoints", place):
        if found := steps_in(folder):
            return found
    raise ConfigError(
        [f"resume got {str(place)!r}, which is neither a checkpoint nor a folder of a run with one"]
    )


def _refuse_other_origin(
    path: Path, manifest: dict[str, Any], origin: Origin, *, is_own: bool
) -> None:
    made = (manifest.get(name, "") for name in ("config_hash", "data", "encoder"))
    if differ := differences(origin, Origin(manifest["config"], *made)):
        hint = "name another with --resume, or leave it out"
        if is_own:
            hint = "choose another --run_id, or --resume none to move it aside and start anew"
        raise ConfigError([f"{path} is of another run ({'; '.join(differ)}); {hint}"])


def differences(here: Origin, there: Origin) -> list[str]:
    """Name what differs: settings, data, weights."""
    ours, theirs = here.facts(), there.facts()
    return [
        f"{name} is {ours.get(name)!r} here, {theirs.get(name)!r} there"
        for name in ours | theirs
        if name not in ours or name not in theirs or ours[name] != theirs[name]
    ]


def set_newer_aside(folder: Path, chosen: Path) -> None:
    """Move checkpoints of later steps than the chosen one, which are damaged or given up, aside."""
    for path in steps_in(folder):
        if _step(path) > _step(chosen):
            number = 1
            while (aside := path.with_name(f"aside-{number}-{path.name}")).exists():
                number += 1
            path.rename(aside)


def clear_unfinished(folder: Path) -> None:
    """Remove what killed processes had begun."""
    for left in folder.glob(".step-*"):
        shutil.rmtree(left, ignore_errors=True)  # a rank that is about to die may still write there


def prune(folder: Path, keep: int) -> list[Path]:
    """Delete all but the newest checkpoints; return those that are left."""
    found = steps_in(folder)
    for path in found[keep:]:
        shutil.rmtree(path)
    return found[:keep]
