"""Journal and tracking: whole files, offline W&B, and a mirror that cannot hurt."""

import json
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import pytest

from toolkit.files import publish_folder, write_json
from toolkit.network import why_unreachable
from toolkit.record import provenance
from toolkit.record.journal import RunFolder
from toolkit.record.tracking import Tracker, has_wandb_key, wandb_arguments, wandb_mode, wandb_url

OPTIONS = {"project": "p", "entity": None, "group": "g", "tags": ["t"]}


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    with suppress(RuntimeError), publish_folder(tmp_path / "folder") as aside:
        (aside / "half").write_text("...")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_a_reader_never_sees_a_half_written_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Invariant 7: what is visible under the final name is whole at every moment of a write."""
    path = tmp_path / "status.json"
    write_json(path, {"status": "running"})
    seen = []
    plain = Path.write_text

    def watched(self: Path, text: str, **options: object) -> int:
        plain(self, text[: len(text) // 2])
        seen.append(json.loads(path.read_text())["status"])
        return plain(self, text, **options)

    monkeypatch.setattr(Path, "write_text", watched)
    write_json(path, {"status": "completed"})
    assert seen == ["running"]
    assert json.loads(path.read_text())["status"] == "completed"


def test_best_model_is_replaced_in_one_step(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in (10, 20):
        with folder.best_model(step) as aside:
            (aside / "weights").write_text(str(step))
            if step == 20:
                assert (tmp_path / "best" / "weights").read_text() == "10"
    assert (tmp_path / "best" / "weights").read_text() == "20"
    folder.prune_best({20})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "best-step-000020"]


def test_summary_is_there_when_the_status_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = []
    monkeypatch.setattr(
        "toolkit.record.journal.write_json", lambda path, _: order.append(path.name)
    )
    RunFolder(tmp_path).finish({})
    assert order == ["summary.json", "status.json"]


@pytest.mark.parametrize(
    ("environment", "mode"),
    [
        ({}, "offline"),
        ({"WANDB_API_KEY": "secret"}, "online"),
        ({"WANDB_API_KEY": "secret", "WANDB_MODE": "disabled"}, "disabled"),
        ({"NETRC": "machine api.wandb.ai login user password secret\n"}, "online"),
        ({"NETRC": "machine elsewhere login user password secret\n"}, "offline"),
    ],
)
def test_online_with_a_key_else_offline(
    environment: dict[str, str], mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in environment.items():
        if name == "NETRC":
            (tmp_path / "netrc").write_text(value)
            (tmp_path / "netrc").chmod(0o600)
            value = str(tmp_path / "netrc")
        monkeypatch.setenv(name, value)
    assert wandb_mode() == mode


def test_the_server_that_login_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_BASE_URL", "")
    assert wandb_url() == "https://api.wandb.ai"
    (tmp_path / "settings").write_text("[default]\nbase_url = https://wandb.corp\n")
    assert wandb_url() == "https://wandb.corp"
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine wandb.corp login user password key\n")
    netrc.chmod(0o644)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert has_wandb_key()
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert wandb_url() == "http://127.0.0.1:9"
    assert not has_wandb_key()


def test_who_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert "does not answer" in str(why_unreachable("http://127.0.0.1:9"))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:3128")
    assert why_unreachable("http://wandb.invalid") is None, "the proxy knows"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert why_unreachable("http://127.0.0.1:9")


def test_settings_come_from_our_config_and_wandb_variables_win(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = wandb_arguments(OPTIONS, "v2-abc", tmp_path)
    assert (settings["id"], settings["group"], settings["tags"]) == ("v2-abc", "g", ["t"])
    monkeypatch.setenv("WANDB_RUN_GROUP", "other")
    assert wandb_arguments(OPTIONS, "v2-abc", tmp_path)["group"] == "other"
    monkeypatch.setenv("WANDB_RUN_ID", "agents")
    assert wandb_arguments(OPTIONS, "v2-abc", tmp_path)["id"] == "v2-abc", "no sweep"
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    settings = wandb_arguments(OPTIONS, "v2-abc", tmp_path)
    assert (settings["id"], settings["name"]) == ("agents", "v2-abc")


class Broken:
    """A backend that fails at the second row."""

    rows: ClassVar[list[dict]] = []

    def log(self, values: dict, step: int | None = None) -> None:
        if self.rows:
            raise ConnectionError("gone")
        self.rows.append(values)

    @property
    def run(self) -> None:
        raise AssertionError("a tracker that is off is not finished")


def test_a_broken_tracker_is_reported_once_and_never_raises(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tracker = Tracker(Broken)
    for step in (1, 2, 3):
        tracker.log(step, {"train/loss": 0.5})
    tracker.finish()
    assert Broken.rows == [{"train/loss": 0.5, "global_step": 1}]
    assert capsys.readouterr().err.count("W&B failed and is off") == 1
    Tracker().log(1, {})
    Tracker().finish()


def test_real_wandb_offline(tmp_path: Path) -> None:
    """The real client, through Accelerate's tracker, writes an offline run with our id."""
    from toolkit.engine.runtime import Runtime

    runtime = Runtime("fp32", 1)
    settings = wandb_arguments(OPTIONS, "v2-abc", tmp_path)
    tracker = Tracker(lambda: runtime.start_wandb(settings, {"lr": 0.1}))
    assert tracker.backend is not None
    tracker.log(1, {"train/loss": 0.5})
    tracker.finish()
    [folder] = (tmp_path / "wandb").glob("offline-run-*")
    assert folder.name.endswith("v2-abc")
    assert next(folder.glob("*.wandb")).stat().st_size > 0


def test_lines_that_a_full_disk_did_not_take_are_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(tmp_path)
    folder.log("train", 1, {})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("toolkit.record.journal.os.fsync", full)
        folder.log("train", 2, {})
        folder.log("train", 3, {})
        assert "Its lines are kept back" in capsys.readouterr().err
        with pytest.raises(OSError, match="No space"):
            folder.flush()
    length = folder.length()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").open()] == [1]
    folder.log("train", 4, {})
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").open()]
    assert steps == [1, 2, 3, 4]
    assert folder.length() > length


def test_a_rank_of_an_earlier_start_cannot_write_the_status(tmp_path: Path) -> None:
    old, new = RunFolder(tmp_path / "x"), RunFolder(tmp_path / "x")
    old.open(None)
    new.open(None)
    old.record_crash("crashed", message="late")
    assert new.status == "running"
    new.record_crash("oom", split=2)
    assert new.status == "oom"
    new.record_crash("crashed", message="the first to notice knows best")
    assert new.status == "oom"
    new.open(None)
    assert new.split == 2
    new.open(None, anew=True)
    assert new.split == 1, "--resume none knows nothing of it"


def test_a_best_model_of_the_future_is_not_shown(tmp_path: Path) -> None:
    """Of steps that are done again: it would be deleted while somebody reads it."""
    folder = RunFolder(tmp_path)
    for step in (7, 9):
        with folder.best_model(step) as aside:
            (aside / "model.safetensors").write_bytes(b"x")
    folder.rewind(0, 7)
    assert (tmp_path / "best").resolve().name == "best-step-000007"
    folder.rewind(0, None)
    assert not (tmp_path / "best").is_symlink()


@pytest.mark.parametrize(
    ("answers", "is_checkout", "expected"),
    [
        ({"rev-parse": "abc", "status": " M x"}, True, ("abc", True)),
        ({"rev-parse": "abc", "status": ""}, True, ("abc", False)),
        ({"rev-parse": "abc"}, True, ("abc", None)),
        ({"rev-parse": "abc", "status": " M x"}, False, (None, None)),
    ],
)
def test_what_git_does_not_say_is_not_recorded(
    answers: dict[str, str],
    is_checkout: bool,
    expected: tuple[str | None, bool | None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It takes too long on a slow disk, or the checkout around an environment is another project's."""

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        if command[3] not in answers:
            raise subprocess.TimeoutExpired(command, 10)
        return subprocess.CompletedProcess(command, 0, answers[command[3]] + "\n")

    monkeypatch.setattr(provenance.toolkit, "__file__", str(tmp_path / "toolkit" / "__init__.py"))
    monkeypatch.setattr(subprocess, "run", run)
    if is_checkout:
        (tmp_path / ".git").mkdir()
    found = provenance.provenance()
    assert (found["commit"], found["uncommitted_changes"]) == expected


def test_a_start_killed_at_once_leaves_a_folder_that_can_be_used(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / ".status.json.tmp-12345678").write_text("{")
    folder = RunFolder(tmp_path / "x")
    with folder.claim():
        folder.open(None)
    assert folder.status == "running"


def test_a_start_begun_again_from_a_foreign_checkpoint_keeps_its_folder(tmp_path: Path) -> None:
    """It has written nothing of its own yet: there is nothing to move aside."""
    other, point = tmp_path / "other", tmp_path / "other" / "checkpoints" / "step-000002"
    point.mkdir(parents=True)
    (other / "best-step-000002").mkdir()
    (other / "metrics.jsonl").write_text("{}\n")
    folder = RunFolder(tmp_path / "mine")
    for is_own in (False, True):
        folder.open(point, is_own=is_own)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "other"]
    assert folder.length() == 3
    folder.open(point, is_own=False)
    assert (tmp_path / "mine.old-1" / "metrics.jsonl").exists()
