"""What comes from outside cannot run code, leave its folder, or carry secrets out."""

import os
import pickle
import random
import shutil
import string
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.programs import TRAIN, launch, run_python
from toolkit.config import RUN_ID, head_names, parse
from toolkit.errors import ConfigError
from toolkit.experiments import sweep as sweeps
from toolkit.redact import redact
from toolkit.train import main

PICKLES = (
    "pytorch_model.bin",
    "model.bin",
    "model.pt",
    "best_bert_model_v2.pth",
    "optimizer.bin",
    "scheduler.bin",
    "scaler.pt",
    "sampler.bin",
    "dl_state_dict.bin",
    "random_states_0.pkl",
    "custom_checkpoint_0.pkl",
    "training_args.bin",
    "rng_state.pth",
    ".metadata",
    "__0_0.distcp",
    "latest",
    "mp_rank_00_model_states.pt",
    "zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "tokenizer.pkl",
    "data.npy",
    "train.pkl",
)
"""Names under which torch, transformers, accelerate, DeepSpeed and numpy look for pickles."""


class Evil:
    """Unpickling this makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


def plant(folder: Path, marker: Path) -> int:
    """Put evil pickles into a folder and its folders, under every name; count them."""
    count = 0
    for place in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        for name in PICKLES:
            if not (place / name).exists():
                (place / name).write_bytes(pickle.dumps(Evil(marker)))
                count += 1
    return count


def test_the_pickle_is_evil(tmp_path: Path) -> None:
    """The other tests can fail."""
    with pytest.raises(TypeError):
        pickle.loads(pickle.dumps(Evil(tmp_path / "marker")) + b"") + 1  # noqa: S301
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize(("config", "processes"), [("cpu", 1), ("zero2", 2)])
def test_pickles_beside_a_checkpoint_are_never_opened(
    tiny_flags: list[str],
    tiny_encoder: Path,
    tiny_data: Path,
    tmp_path: Path,
    config: str,
    processes: int,
) -> None:
    """And the run that they lie in goes on from its legitimate state."""
    encoder, data = tmp_path / "encoder", tmp_path / "data"
    shutil.copytree(tiny_encoder, encoder)
    shutil.copytree(tiny_data, data)
    flags = [flag for flag in tiny_flags if not flag.startswith(("--encoder", "--dataset"))]
    flags += [f"--encoder={encoder}", f"--dataset={data}", "--max_steps=8", "--save_minutes=0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOOLKIT_FAULT", "kill@data:0:5")
        assert launch(processes, TRAIN, *flags, config=config).returncode != 0
    marker = tmp_path / "marker"
    planted = sum(
        plant(place, marker) for place in (tmp_path / "runs", encoder, tmp_path / "cache")
    )
    assert planted >= 6 * len(PICKLES)
    done = launch(processes, TRAIN, *flags, config=config)
    assert done.returncode == 0, done.stderr
    assert "Going on after step 4" in done.stdout
    assert not marker.exists()


def test_pickles_in_the_place_of_real_files(
    tiny_flags: list[str], tmp_path: Path, fresh_accelerate: Callable[[], None]
) -> None:
    """Every file that is read on resume, replaced in turn: refused, never executed."""
    flags = [*tiny_flags, "--max_steps=8", "--save_minutes=0", "--run_id=x"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOOLKIT_FAULT", "raise@data:0:5")
        assert main(flags) == 1
    runs, kept = tmp_path / "runs", tmp_path / "kept"
    runs.rename(kept)
    marker = tmp_path / "marker"
    names = sorted(path.relative_to(kept) for path in (kept / "x" / "checkpoints").rglob("*.*"))
    names = [name for name in names if (kept / name).is_file()]
    assert len(names) == 6
    for name in names:
        shutil.copytree(kept, runs)
        (runs / name).write_bytes(pickle.dumps(Evil(marker)))
        fresh_accelerate()
        assert main([*flags, "--resume=strict"]) == (5 if "000004" in str(name) else 0)
        shutil.rmtree(runs)
    assert not marker.exists()


def test_an_encoder_that_is_only_a_pickle(
    tiny_flags: list[str], tiny_encoder: Path, tmp_path: Path
) -> None:
    encoder, marker = tmp_path / "encoder", tmp_path / "marker"
    shutil.copytree(tiny_encoder, encoder)
    (encoder / "model.safetensors").unlink()
    (encoder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(marker)))
    assert main([*tiny_flags, f"--encoder={encoder}"]) != 0
    assert not marker.exists()


def names(count: int) -> list[str]:
    """Make names that people, sweeps and attackers come up with."""
    dice = random.Random(0)
    parts = [
        "..",
        "/",
        "\\",
        "~",
        "$(touch x)",
        "`id`",
        ";rm -rf .",
        "|",
        "&",
        "\n",
        "\0",
        " ",
        "*",
    ]
    parts += [
        "%s",
        "{0}",
        "${HOME}",
        "run",
        "é",
        "\u202e",
        "-",
        "--",
        ".",
        "'",
        '"',
        "a" * 70,
        "C:",
    ]
    parts += list(string.ascii_letters + string.digits)
    fixed = ["", ".", "..", "/etc/passwd", "../x", "x/../../y", "-rf", "--lr=1", "a" * 65, "nul\0"]
    return fixed + ["".join(dice.choices(parts, k=dice.randint(1, 5))) for _ in range(count)]


def test_names_cannot_leave_the_runs_folder(tmp_path: Path) -> None:
    """Through the command line, through YAML and through a sweep."""
    refused = accepted = 0
    for number, name in enumerate(names(1000)):
        way = ("flag", "yaml", "sweep")[number % 3]
        try:
            config = _parse_name(name, way, tmp_path)
        except ConfigError:
            refused += 1
            continue
        accepted += 1
        assert RUN_ID.fullmatch(str(config.run_id))
        folder = (tmp_path / "runs" / str(config.run_id)).resolve()
        assert folder.parent == (tmp_path / "runs").resolve()
    assert refused + accepted == 1010
    assert min(refused, accepted) > 100


COMMAND = ["${program}", "${args}"]


def _parse_name(name: str, way: str, tmp_path: Path):
    if way == "flag":
        return parse([f"--run_id={name}"])
    if way == "yaml":
        (tmp_path / "c.yaml").write_text(yaml.safe_dump({"run_id": name}))
        return parse([f"--config={tmp_path / 'c.yaml'}"])
    path = tmp_path / "sweep.yaml"
    parameters = {"run_id": {"value": name}}
    path.write_text(
        yaml.safe_dump({"method": "grid", "command": COMMAND, "parameters": parameters})
    )
    [run] = sweeps.runs(sweeps.load(path), [])
    return run.config


def test_heads_are_those_of_the_table_only() -> None:
    wrong = [name for name in names(200) if name not in head_names()]
    assert len(wrong) >= 200
    for name in wrong:
        with pytest.raises(ConfigError):
            parse([f"--head={name}"])


def test_a_run_folder_that_is_a_link_elsewhere_is_refused(
    tiny_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "x").symlink_to(tmp_path / "elsewhere")
    assert main([*tiny_flags, "--run_id=x"]) == 2
    assert "is not a run folder" in capsys.readouterr().err
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize(
    "text",
    [
        "https://me:CANARY-7@host/simple",
        "https://CANARY-7@host/simple",
        "{'api_key': 'CANARY-7'}",
        "wandb_api_key=CANARY-7",
        'password: "CANARY-7"',
        "HF_TOKEN: CANARY-7",
        "Bearer CANARY-IN-ENV",
        "Authorization: Bearer CANARY-8",
        "{'authorization': 'Basic CANARY'}",
        "got Bearer hf_CANARYcanaryCANARY",
        "Bearer eyJhbGciOi.CANARY-9.x_y",
        "Basic CANARY8wYXNzd29yZA==",
        "https://me:CAN/ARY@CANARY-7@host/simple",
    ],
)
def test_redaction(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "CANARY-IN-ENV")
    assert "CANARY" not in redact(text)


@pytest.mark.parametrize(
    "text",
    [
        "max_tokens: 64, see https://example.org/a?b=1 and mail@example.org; 300 tokens/s",
        "Basic head",
        "/data/Basic reviews.csv",
        "/data/Basic Reviews2023/reviews_2023.csv",
        "Basic transformer-encoder v2",
        "Bearer of bad news",
    ],
)
def test_redaction_leaves_the_rest(text: str) -> None:
    assert redact(text) == text


CANARIES = {
    "WANDB_API_KEY": "c" * 32 + "a7" * 4,
    "HF_TOKEN": "hf_canaryCANARYcanary",
    "MY_PASSWORD": "CANARY-password-1",
    "PIP_INDEX_URL": "http://canary-user:CANARY-url@127.0.0.1:9/simple",
    "HF_ENDPOINT": "http://canary-user:CANARY-url@127.0.0.1:9",
}
SECRETS = (*(CANARIES[name] for name in ("WANDB_API_KEY", "HF_TOKEN", "MY_PASSWORD")), "CANARY-url")


def test_secrets_are_nowhere(tiny_flags: list[str], tmp_path: Path) -> None:
    """In success, in a crash, in mistakes: no output and no byte under the run folder has them."""
    flags = [flag for flag in tiny_flags if flag != "--track=none"]
    settings = tmp_path / "c.yaml"
    settings.write_text(f"wandb: {{api_key: {CANARIES['WANDB_API_KEY']}}}\nmy_key: CANARY-url\n")
    starts = {
        "success": ["--max_steps=3", "--save_minutes=0"],
        "crash": ["--max_steps=4", "--save_minutes=0"],
        "wrong": [f"--config={settings}", "--wandb.api_key=CANARY-url"],
        "no pip": ["--dataset=snippets"],
        "no hub": ["--dataset=amazon_polarity"],
        "url": ["--encoder=https://u:CANARY-url@host/bert"],
    }
    outputs = []
    for name, extra in starts.items():
        fault = {"TOOLKIT_FAULT": "raise@data:0:3"} if name == "crash" else {}
        done = run_python(TRAIN, *flags, *extra, WANDB_MODE="offline", **CANARIES, **fault)
        assert (done.returncode == 0) == (name == "success"), done.stderr
        outputs.append(done.stdout + done.stderr)
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path != settings]
    assert len(files) > 30
    assert any(path.suffix == ".wandb" for path in files)
    for secret in SECRETS:
        for name, text in zip(starts, outputs, strict=True):
            assert secret not in text, name
        for path in files:
            assert secret.encode() not in path.read_bytes(), f"{secret[:6]} in {path}"
