"""Checkpoints: two phases to write, whole or absent; the same files for every distribution.

First all ranks write their parts into a hidden folder. Only when all say that they succeeded, the
main process adds the manifest and publishes the folder by one rename. `record.checkpoints` says
what is in it and which one to go on from.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from toolkit.engine.replicas import MOMENTS
from toolkit.engine.runtime import Runtime
from toolkit.files import share_like_its_folder, sync, write_json
from toolkit.record.checkpoints import (
    PROGRESS,
    SCHEMA,
    Origin,
    describe_file,
    folder_name,
    read_manifest,
    write_manifest,
)


@dataclass(frozen=True)
class Checkpoints:
    """Where and how a run saves."""

    runtime: Runtime
    folder: Path
    """`checkpoints` of the run folder, on a file system that all ranks share."""
    origin: Origin

    def save(self, step: int, notes: dict[str, Any]) -> list[str]:
        """Write a checkpoint; all ranks take part.

        Args:
            step: steps that are done.
            notes: what else it takes to go on, as JSON; only the main process's counts.

        Returns:
            What went wrong, the same on all ranks. If anything did, nothing is published, and
            what was before is as it was.
        """
        aside = self.folder / f".{folder_name(step)}.tmp"
        reports = self.runtime.gather(self._write_part(aside, dict(self._my_tensors())))
        problems = [report["problem"] for report in reports if "problem" in report]
        if not self.runtime.is_main:
            return self.runtime.from_main(None)
        if not problems:
            files = {report.pop("name"): report for report in reports}
            problems = self._publish(aside, step, notes, files)
        if problems:
            shutil.rmtree(aside, ignore_errors=True)  # if this fails too, the next start does it
        return self.runtime.from_main(problems)

    def _my_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield this rank's share of the state; every rank runs through all of it."""
        for number, (name, state) in enumerate(self.runtime.state()):
            if number % self.runtime.world_size == self.runtime.rank:
                yield f"weight/{name}", state.weight.cpu().contiguous()
                for key, moment in state.moments.items():
                    yield f"{key}/{name}", moment.cpu().contiguous()

    def _write_part(self, aside: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Write this rank's file; return what the manifest says of it, or the problem."""
        rank, world_size = self.runtime.rank, self.runtime.world_size
        path = aside / f"part-{rank:05d}-of-{world_size:05d}.safetensors"
        try:
            self.runtime.phases.enter("save")
            aside.mkdir(parents=True, exist_ok=True)
            save_file(tensors, path)
            share_like_its_folder(path)
            sync(path)
            return {"name": path.name} | describe_file(path)
        except (OSError, SafetensorError) as error:
            return {"problem": f"rank {rank} cannot write {path}: {error}"}

    def _publish(
        self, aside: Path, step: int, notes: dict[str, Any], files: dict[str, Any]
    ) -> list[str]:
        """Make the checkpoint exist; return problems."""
        target = self.folder / folder_name(step)
        try:
            absent = [name for name in files if not (aside / name).exists()]
            if absent:
                return [f"{aside} lacks {', '.join(absent)}: do all machines share the run folder?"]
            write_json(aside / PROGRESS, notes)
            files[PROGRESS] = describe_file(aside / PROGRESS)
            write_manifest(aside, self._facts(step, files))
            sync(aside)
            self.runtime.phases.enter("before_rename")
            aside.rename(target)
            sync(self.folder)
        except OSError as error:
            return [f"rank 0 cannot write {target}: {error}"]
        self.runtime.phases.enter("after_rename")
        return []

    def _facts(self, step: int, files: dict[str, Any]) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "step": step,
            "world_size": self.runtime.world_size,
            "config": self.origin.config,
            "config_hash": self.origin.config_hash,
            "data": self.origin.data,
            "encoder": self.origin.encoder,
            "files": files,
        }


def read_progress(checkpoint: Path) -> dict[str, Any]:
    """Return the notes that `save` was given."""
    return json.loads((checkpoint / PROGRESS).read_text(encoding="utf-8"))


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Return all weights by name."""
    return {name: tensor for _, name, tensor in _tensors(checkpoint, {"weight"})}


def read_moments(checkpoint: Path) -> dict[str, dict[str, Tensor]]:
    """Return AdamW's moments by parameter name."""
    moments: dict[str, dict[str, Tensor]] = {}
    for kind, name, tensor in _tensors(checkpoint, set(MOMENTS)):
        moments.setdefault(name, {})[kind] = tensor
    return moments


def _tensors(checkpoint: Path, wanted: set[str]) -> Iterator[tuple[str, str, Tensor]]:
    """Read these kinds of tensors, and no others: all three are the size of the model."""
    for name in sorted(read_manifest(checkpoint)["files"]):
        if name.endswith(".safetensors"):
            with safe_open(checkpoint / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - not a dictionary
                    kind, _, parameter = key.partition("/")
                    if kind in wanted:
                        yield kind, parameter, file.get_tensor(key)
