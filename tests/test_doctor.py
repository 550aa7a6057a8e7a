"""The doctor finds what is in the way, says what to do, and keeps secrets."""

from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from tests.programs import ROOT
from toolkit import doctor
from toolkit.model import attention
from toolkit.ranks import LAUNCH_FOLDER, RanksError, ask


def report(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, list[str]]:
    code = doctor.main(list(flags))
    return code, capsys.readouterr().out.splitlines()


def test_a_healthy_machine(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    flags = ["--launch", str(ROOT / "launch" / "cpu2.yaml"), "--offline"]
    code, lines = report(capsys, *flags, "--output_dir", str(tmp_path))
    assert code == 0, lines
    assert lines[-1] == "Ready to train."
    assert all(line.split()[0] in ("ok", "warning") for line in lines[:-1])
    assert "cpu2.yaml: 2 x cpu (MULTI_CPU) took a step together" in "\n".join(lines)
    for word in ("Python 3", "torch 2", "bf16", "GB free", "fetched", "deepspeed 0"):
        assert word in "\n".join(lines)
    assert not any(line.split()[1].startswith(("W&B", "hub")) for line in lines)


def test_deepspeed_is_built_and_tried(capsys: pytest.CaptureFixture[str]) -> None:
    found = list(doctor.hello(ROOT / "launch" / "zero2.yaml", None))
    assert found == [
        (
            "warning",
            "zero2.yaml: 2 x cpu (DEEPSPEED) took a step together, but there is no GPU here",
        )
    ]


def test_what_is_missing_or_old(monkeypatch: pytest.MonkeyPatch) -> None:
    def pretend(name: str) -> str:
        if name in ("deepspeed", "wandb"):
            raise PackageNotFoundError(name)
        return "0.1" if name == "torch" else doctor._pins().get(name, "1")

    monkeypatch.setattr(doctor, "version", pretend)
    levels = {finding.text.split()[0]: finding.level for finding in doctor.versions()}
    assert levels["wandb"] == "FAILURE"
    assert levels["deepspeed"] == levels["torch"] == "warning"
    assert levels["accelerate"] == "ok"


def test_a_launch_that_fails_is_quoted(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    text = (ROOT / "launch" / "cpu.yaml").read_text()
    broken.write_text(text + "nonsense: 1\n")
    [finding] = doctor.hello(broken, None)
    assert finding.level == "FAILURE"
    assert "nonsense" in finding.text


def test_ranks_that_say_nothing_are_ended(tmp_path: Path) -> None:
    """The launcher and its ranks, which are in sessions of their own."""
    program = tmp_path / "silent.py"
    program.write_text(
        "import os, pathlib, time\n"
        "pathlib.Path(__file__).with_name(os.environ['RANK']).write_text(str(os.getpid()))\n"
        "time.sleep(300)\n"
    )
    with pytest.raises(RanksError, match="no answer in 15 s"):
        ask(program, LAUNCH_FOLDER / "cpu2.yaml", 2, seconds=15)
    for rank in "01":
        pid = int((tmp_path / rank).read_text())
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("raise ConfigError(['a is bad', 'b is worse'])", "2 problems .*: - a is bad - b is worse"),
        ("import signal; os.kill(os.getpid(), signal.SIGKILL)", "killed: is there enough memory"),
        ("print(ANSWER + '{')", "cannot read the answer"),
        ("", "."),
    ],
)
def test_why_there_is_no_answer(body: str, expected: str, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    imports = "import os\nfrom toolkit.errors import ConfigError\nfrom toolkit.ranks import *\n"
    program.write_text(f"{imports}def main():\n    {body or 'pass'}\nrun(main)\n")
    with pytest.raises(RanksError, match=expected):
        ask(program, LAUNCH_FOLDER / "cpu2.yaml", 2, seconds=60)


def test_a_disk_without_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import collections

    usage = collections.namedtuple("usage", "free")
    for free, level in ((2e7, "FAILURE"), (5e9, "warning"), (5e11, "ok")):
        monkeypatch.setattr("shutil.disk_usage", lambda _, free=free: usage(free))
        [finding] = doctor.disk(tmp_path / "not" / "yet", "--output_dir")
        assert finding.level == level


def test_silent_servers_are_warnings_and_keys_stay_hidden(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "CANARY" * 7)
    monkeypatch.setenv("WANDB_BASE_URL", "http://me:CANARY-pw@127.0.0.1:9")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(doctor, "hello", lambda *_: iter(()))
    code, lines = report(capsys)
    assert code == 0
    assert sum("127.0.0.1 does not answer" in line for line in lines) == 2
    assert "CANARY" not in "\n".join(lines)


def test_a_launch_config_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        doctor.main(["--launch", "launch/nope.yaml"])
    assert caught.value.code == 2
    assert "zero2_offload.yaml" in capsys.readouterr().err


def test_a_gpu_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton has to compile there; no GPU is needed to see that doctor says so."""
    facts = SimpleNamespace(name="A GPU", total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: facts)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: True)
    monkeypatch.setenv("CC", "mycc")
    assert [finding.level for finding in doctor.devices()] == ["ok", "ok"]
    monkeypatch.delenv("CC")
    monkeypatch.setattr(attention, "which", lambda name: None)
    *_, last = doctor.devices()
    assert (last.level, "install gcc" in last.text) == ("warning", True)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\xfe\x00", "can't decode byte 0xff"),
        (b"", "must hold `name: value` lines, got None"),
        (b"- a\n", "got ['a']"),
        (b"a: [", "expected the node content"),
    ],
)
def test_a_launch_config_that_is_none(
    content: bytes, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "launch.yaml"
    path.write_bytes(content)
    with pytest.raises(SystemExit) as left:
        doctor.main(["--launch", str(path)])
    assert left.value.code == 2
    shown = capsys.readouterr().err
    assert f"--launch got {path}, which is no launch config: " in shown
    assert said in shown
