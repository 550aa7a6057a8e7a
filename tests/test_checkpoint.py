"""Which checkpoints are trusted: every byte of them, or none."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.faults.mutations import mutations
from toolkit.config import parse
from toolkit.errors import CheckpointError, ConfigError
from toolkit.record.checkpoints import (
    MANIFEST,
    DamagedError,
    Origin,
    choose,
    describe_file,
    prune,
    read_manifest,
    verify,
    write_manifest,
)
from toolkit.train import main


def checkpoint(folder: Path, step: int, origin: Origin, **facts: object) -> Path:
    """Write a small checkpoint as the engine does."""
    path = folder / f"step-{step:06d}"
    path.mkdir(parents=True)
    for name in ("part-00000-of-00001.safetensors", "progress.json"):
        (path / name).write_bytes(random.Random(f"{step}{name}").randbytes(300))
    files = {child.name: describe_file(child) for child in path.iterdir()}
    content = {"schema": 1, "step": step, "world_size": 1, "files": files}
    content |= {"config": origin.config, "config_hash": origin.config_hash, "data": origin.data}
    content |= {"encoder": origin.encoder}
    write_manifest(path, content | facts)
    return path


@pytest.fixture
def origin() -> Origin:
    config = parse(["--lr=3e-5"])
    return Origin(config.identity(), config.hash(), "data-1", "weights-1")


def test_a_whole_one_verifies(tmp_path: Path, origin: Origin) -> None:
    path = checkpoint(tmp_path, 10, origin)
    assert verify(path)["step"] == 10


def test_every_mutation_is_noticed(tmp_path: Path, origin: Origin) -> None:
    """Truncations, flipped bits, deletions, swaps: of every file, at many places."""
    good, other = checkpoint(tmp_path, 10, origin), checkpoint(tmp_path, 20, origin)
    kinds = set()
    count = 0
    for kind, mutate in mutations(good, other, flips=170):
        copy = tmp_path / "copy" / good.name
        shutil.copytree(good, copy)
        mutate(copy)
        with pytest.raises(DamagedError):
            verify(copy)
        shutil.rmtree(copy)
        kinds.add(kind)
        count += 1
    assert count >= 500
    assert kinds == {"truncate", "flip", "delete", "swap", "empty", "grow", "rename"}
    assert verify(good)


def test_manifest_of_another_version(tmp_path: Path, origin: Origin) -> None:
    path = checkpoint(tmp_path, 10, origin, schema=2)
    with pytest.raises(DamagedError, match="has schema 2, this version reads 1"):
        verify(path)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "sub/file"])
def test_a_manifest_names_files_of_its_own_folder_only(
    tmp_path: Path, origin: Origin, name: str
) -> None:
    path = checkpoint(tmp_path, 10, origin)
    (tmp_path / "outside").write_text("x")
    facts = read_manifest(path)
    facts["files"][name] = {"size": 1, "sha256": "0"}
    write_manifest(path, facts)
    with pytest.raises(DamagedError, match="not a file name"):
        verify(path)


def test_auto_takes_the_newest_that_is_whole(
    tmp_path: Path, origin: Origin, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {step: checkpoint(tmp_path, step, origin) for step in (9, 10, 1000000)}
    assert choose("auto", tmp_path, origin) == paths[1000000]
    (paths[1000000] / "progress.json").write_text("{}")
    assert choose("auto", tmp_path, origin) == paths[10]
    said = capsys.readouterr().err
    assert "step-1000000 is damaged: progress.json has 2 bytes, not 300" in said
    assert str(paths[10]) in said
    with pytest.raises(CheckpointError, match="--resume auto takes the newest that is whole"):
        choose("strict", tmp_path, origin)
    assert choose("none", tmp_path, origin) is None
    for step in (9, 10):
        (paths[step] / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="--resume none starts from the first step"):
        choose("auto", tmp_path, origin)


def test_nothing_there_is_a_fresh_start(tmp_path: Path, origin: Origin) -> None:
    assert choose("auto", tmp_path / "checkpoints", origin) is None
    assert choose("strict", tmp_path / "checkpoints", origin) is None
    with pytest.raises(ConfigError, match="neither a checkpoint nor a folder of a run"):
        choose(str(tmp_path), tmp_path, origin)


def test_a_path_may_be_a_checkpoint_or_a_run(tmp_path: Path, origin: Origin) -> None:
    folder = tmp_path / "run" / "checkpoints"
    first, second = (checkpoint(folder, step, origin) for step in (10, 20))
    elsewhere = tmp_path / "elsewhere"
    assert choose(str(first), elsewhere, origin) == first
    assert choose(str(tmp_path / "run"), elsewhere, origin) == second
    assert choose(str(folder), elsewhere, origin) == second


def test_another_run_is_refused_by_name(tmp_path: Path, origin: Origin) -> None:
    checkpoint(tmp_path, 10, origin)
    config = parse(["--lr=1e-5", "--head=v3"])
    with pytest.raises(ConfigError) as caught:
        choose("auto", tmp_path, Origin(config.identity(), config.hash(), "data-2", "weights-1"))
    with pytest.raises(ConfigError, match="encoder weights is 'weights-2' here, 'weights-1' there"):
        choose("auto", tmp_path, replace(origin, encoder="weights-2"))
    said = str(caught.value)
    assert "choose another --run_id, or --resume none to move it aside" in said
    with pytest.raises(ConfigError, match="name another with --resume, or leave it out"):
        choose(str(tmp_path), tmp_path / "mine", replace(origin, data="data-2"))
    assert "head is 'v3' here, 'v2' there" in said
    assert "lr is 1e-05 here, 3e-05 there" in said
    assert "data is 'data-2' here, 'data-1' there" in said


def test_pruning_keeps_the_newest(tmp_path: Path, origin: Origin) -> None:
    for step in (1, 2, 30):
        checkpoint(tmp_path, step, origin)
    (tmp_path / "aside-1-step-000002").mkdir()
    assert [path.name for path in prune(tmp_path, 2)] == ["step-000030", "step-000002"]
    assert (tmp_path / "aside-1-step-000002").exists()


@pytest.fixture
def stopped(tiny_flags: list[str], fresh_accelerate: Callable[[], None]) -> tuple[list[str], Path]:
    """A run that crashed in step 12, with a checkpoint of every step."""
    flags = [*tiny_flags, "--epochs=3", "--log_every=1", "--save_minutes=0", "--keep_checkpoints=4"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOOLKIT_FAULT", "raise@forward:0:12")
        assert main(flags) == 1
    fresh_accelerate()
    [folder] = [path for path in Path(tiny_flags[3].split("=")[1]).iterdir() if path.is_dir()]
    return flags, folder


def test_resume_skips_a_damaged_one_and_names_it(
    stopped: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    flags, folder = stopped
    newest = folder / "checkpoints" / "step-000011"
    with (newest / "part-00000-of-00001.safetensors").open("r+b") as file:
        file.seek(5000)
        file.write(b"\x00")
        file.seek(9000)
        file.write(b"\x01\x02\x03")
    assert main([*flags, "--resume=strict"]) == 5
    assert "part-00000-of-00001.safetensors was changed" in capsys.readouterr().err
    status = json.loads((folder / "status.json").read_text())
    assert status["status"] == "io_error", "the run that crashed before is not the news"
    assert main(flags) == 0
    said = capsys.readouterr()
    assert "step-000011 is damaged" in said.err
    assert "Going on after step 10" in said.out
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps if row["kind"] == "train"] == [*range(1, 22)]
    assert (folder / "checkpoints" / "aside-1-step-000011").exists(), "kept for whoever asks why"


def test_resume_none_starts_anew_and_keeps_the_old(stopped: tuple[list[str], Path]) -> None:
    flags, folder = stopped
    assert main([*flags, "--resume=none", "--max_steps=2", f"--run_id={folder.name}"]) == 0
    assert (folder.with_name(f"{folder.name}.old-1") / "checkpoints" / "step-000011").exists()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if '"train"' in line] == [1, 2]


def test_resume_from_a_path_into_another_folder(
    stopped: tuple[list[str], Path],
    capsys: pytest.CaptureFixture[str],
    fresh_accelerate: Callable[[], None],
) -> None:
    flags, folder = stopped
    point = folder / "checkpoints" / "step-000009"
    assert main([*flags, "--run_id=moved", f"--resume={point}"]) == 0
    assert "Going on after step 9" in capsys.readouterr().out
    fresh_accelerate()
    assert main(flags) == 0
    moved = folder.with_name("moved")
    texts = [(run / "best" / "model.safetensors").read_bytes() for run in (folder, moved)]
    assert texts[0] == texts[1]
    lines = (moved / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines if '"train"' in line]
    assert steps == [*range(1, 22)]


def test_other_settings_are_refused_and_nothing_is_touched(
    stopped: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    flags, folder = stopped
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert main([*flags, "--lr=0.001", f"--run_id={folder.name}"]) == 2
    assert "lr is 0.001 here, 0.003 there" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_journal_that_lost_lines_is_not_gone_on_from(
    stopped: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    flags, folder = stopped
    (folder / "metrics.jsonl").write_text("")
    assert main(flags) == 5
    assert "lines are lost" in capsys.readouterr().err


def test_the_same_command_with_a_path_goes_on_from_its_own_checkpoints(
    stopped: tuple[list[str], Path],
    capsys: pytest.CaptureFixture[str],
    fresh_accelerate: Callable[[], None],
) -> None:
    flags, folder = stopped
    again = [*flags, "--run_id=moved", f"--resume={folder / 'checkpoints' / 'step-000009'}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOOLKIT_FAULT", "raise@forward:0:16")
        assert main(again) == 1
    fresh_accelerate()
    assert main(again) == 0
    said = capsys.readouterr().out
    assert "has newer checkpoints of its own" in said
    assert "Going on after step 15" in said
    assert not folder.with_name("moved.old-1").exists()


@pytest.mark.parametrize("place", ["beside", "within"])
def test_a_lone_checkpoint_is_refused_before_anything_is_moved(
    place: str, stopped: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    flags, folder = stopped
    backup = (folder if place == "within" else folder.parent) / "backup"
    lone = backup / ("step-000009" if place == "within" else "of_a_run/step-000009")
    shutil.copytree(folder / "checkpoints" / "step-000009", lone)
    assert main([*flags, f"--run_id={folder.name}", f"--resume={lone}"]) == 5
    reason = "lies in the run folder" if place == "within" else "is it the whole run folder?"
    assert reason in capsys.readouterr().err
    assert (folder / "metrics.jsonl").exists()
    assert lone.exists()


def test_a_disk_error_is_damage(
    tmp_path: Path, origin: Origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    older, newer = (checkpoint(tmp_path, step, origin) for step in (1, 2))
    plain = describe_file

    def describe(path: Path) -> dict:
        if path.parent == newer:
            raise OSError(5, "Input/output error")
        return plain(path)

    monkeypatch.setattr("toolkit.record.checkpoints.describe_file", describe)
    assert choose("auto", tmp_path, origin) == older


@pytest.mark.parametrize("accum", [1, 3])
def test_memory_that_runs_out_within_a_backward_pass(
    tiny_flags: list[str],
    capsys: pytest.CaptureFixture[str],
    fresh_accelerate: Callable[[], None],
    accum: int,
) -> None:
    """Some gradients are there already; with one process the step is done again all the same."""
    import torch

    from toolkit.engine.replicas import Replicas

    flags = [*tiny_flags, "--max_steps=4", "--precision=fp32"]
    assert main([*flags, f"--grad_accum={2 * accum}", "--run_id=small"]) == 0
    plain, calls = Replicas.backward, []

    def backward(self: Replicas, loss: torch.Tensor) -> None:
        calls.append(1)
        if len(calls) != 2:
            return plain(self, loss)
        middle = self.plain.get_parameter("bert.encoder.layer.0.output.dense.weight")

        def fail(_: torch.Tensor) -> None:
            handle.remove()
            raise torch.OutOfMemoryError("in the middle")

        handle = middle.register_hook(fail)
        return plain(self, loss)

    fresh_accelerate()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Replicas, "backward", backward)
        assert main([*flags, f"--grad_accum={accum}", "--run_id=large"]) == 0
    assert "Out of memory in step 1" in capsys.readouterr().out
    runs = Path(tiny_flags[3].split("=")[1])
    files = [runs / name / "best" / "model.safetensors" for name in ("small", "large")]
    weights = [file.read_bytes() for file in files]
    assert weights[0] == weights[1]
