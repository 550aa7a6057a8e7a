"""End to end on a tiny real configuration: files, lines, outcomes, and what people do wrong."""

import csv
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoTokenizer

from tests.programs import TRAIN, launch, run_python
from toolkit import build
from toolkit.assets import encoder_fingerprint
from toolkit.build import about_compiling
from toolkit.config import RunConfig
from toolkit.errors import ConfigError, DataError
from toolkit.predict import Classifier
from toolkit.train import main


def only_run(flags: list[str]) -> Path:
    runs = Path(next(flag for flag in flags if flag.startswith("--output_dir=")).split("=")[1])
    [folder] = [path for path in runs.iterdir() if path.is_dir()]
    return folder


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def lines(folder: Path, kind: str) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


@pytest.fixture
def umask() -> Iterator[int]:
    """Files are readable by everybody, as is usual."""
    before = os.umask(0o022)
    yield 0o022
    os.umask(before)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_from_start_to_end(tiny_flags: list[str], processes: int, umask: int) -> None:
    flags = [*tiny_flags, "--epochs=6", "--log_every=5", "--eval_every=10", "--head=v3"]
    done = launch(processes, TRAIN, *flags)
    assert done.returncode == 0, done.stderr
    folder = only_run(flags)
    names = {path.name for path in folder.iterdir()}
    best = (folder / "best").readlink()
    assert names == {
        "config.yaml", "run.json", "metrics.jsonl", "best", str(best), "predictions.parquet",
        "summary.json", "status.json", "checkpoints",
    }  # fmt: skip
    assert read(folder / "status.json")["status"] == "completed"
    modes = {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}
    assert modes == {0o666 & ~umask}, "who may read one file may read them all"
    steps = -(-108 * 6 // 16)
    assert steps == 41
    assert [row["step"] for row in lines(folder, "train")] == [*range(5, 41, 5), 41]
    ends_of_epochs = [-(-108 * epoch // 16) for epoch in range(1, 7)]
    assert [row["step"] for row in lines(folder, "eval")] == sorted(
        {*ends_of_epochs, 10, 20, 30, 40}
    )
    assert {row["eval/n"] for row in lines(folder, "eval")} == {12}, "validation picks the best"
    [test] = lines(folder, "test")
    assert test["test/n"] == 41
    assert test["test/reviews_per_s"] > 0
    last = lines(folder, "train")[-1]
    assert {"train/loss", "train/lr", "train/grad_norm_preclip", "train/reviews_per_s"} < set(last)
    assert last["train/padding"] < 0.2, "packs are filled up, no more"
    facts = read(folder / "run.json")
    assert facts["world_size"] == processes
    assert facts["versions"]["torch"]
    summary = read(folder / "summary.json")
    assert summary["test"]["accuracy"]["value"] > 0.95, "the reviews are separable"
    assert summary["config"]["lr"] == 0.003
    table = pyarrow.parquet.read_table(folder / "predictions.parquet").to_pydict()
    assert table["row_id"] == list(range(41))
    right = np.mean((np.array(table["score"]) > 0.5) == (np.array(table["label"]) == 1))
    assert right == pytest.approx(summary["test"]["accuracy"]["value"])
    for part in ("accuracy", "95 % interval", "run folder", "confusion"):
        assert part in done.stdout
    assert done.stdout.count("95 % interval") == 1, "only the main process prints"


def test_a_compiled_run_is_the_same(tiny_flags: list[str], tmp_path: Path) -> None:
    """Two processes under DDP, two micro-batches each in a step; only rounding differs."""
    flags = [*tiny_flags, "--epochs=2", "--log_every=1", "--grad_accum=2", "--precision=fp32"]
    losses, folders = [], []
    for more in ([], ["--compile", f"--output_dir={tmp_path / 'compiled'}"]):
        done = launch(2, TRAIN, *flags, *more)
        assert done.returncode == 0, done.stderr
        folders.append(only_run(more or flags))
        losses.append([row["train/loss"] for row in lines(folders[-1], "train")])
    assert folders[0].name == folders[1].name
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[1] != losses[0], "it was compiled: its kernels round in another way"


@pytest.fixture
def finished(tiny_flags: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[list[str], Path]:
    flags = [*tiny_flags, "--epochs=2", "--log_every=1"]
    assert main(flags) == 0
    capsys.readouterr()
    return flags, only_run(flags)


def test_the_best_model_loads_like_any_other_and_gave_the_predictions(
    tiny_flags: list[str], tiny_data: Path
) -> None:
    """The rate is so high at the end that the last model is not the best one."""
    from toolkit.model.classifier import HeadClassifier

    flags = ["--epochs=4", "--schedule=constant", "--lr=0.01", "--eval_every=2", "--precision=fp32"]
    assert main([*tiny_flags, *flags]) == 0
    folder = only_run(tiny_flags)
    model = HeadClassifier.from_pretrained(folder / "best").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "best")
    with (tiny_data / "test.csv").open(newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    texts[-1] *= 20
    inputs = tokenizer(texts, return_tensors="pt", padding=True, truncation=True)
    assert inputs["input_ids"].shape[1] == 32, "cut as in training"
    scores = model(**inputs).logits.softmax(-1)[:, 1].tolist()
    table = pyarrow.parquet.read_table(folder / "predictions.parquet").to_pydict()
    assert table["score"][:-1] == pytest.approx(scores[:-1], abs=1e-5)
    classifier = Classifier(folder / "best")
    assert classifier.scores(texts).tolist() == pytest.approx(scores, abs=1e-5)
    texts[-1] = texts[-1][: len(texts[-1]) // 20]
    assert classifier.scores(texts).tolist() == table["score"], "bit for bit"
    run_the_card(folder / "best", classifier)
    assert model.config.id2label == {0: "negative", 1: "positive"}
    best = read(folder / "summary.json")["validation"]["step"]
    assert (folder / "best").readlink().name == f"best-step-{best:06d}"
    assert best < max(row["step"] for row in lines(folder, "train")), (
        "the last is not the best here"
    )
    card = ModelCard.load(folder / "best" / "README.md")
    assert card.data.eval_results[0].dataset_name.endswith("(validation)")


def run_the_card(folder: Path, classifier: Classifier) -> None:
    """Both pieces of code, as they stand there, with texts of unequal length."""
    scored, plain = re.findall("```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    found: dict[str, Any] = {}
    exec(plain, found)
    exec(scored.replace("classifier.scores", "scores = classifier.scores"), found)
    assert found["scores"] == pytest.approx(found["logits"].softmax(-1)[:, 1], abs=1e-5)
    assert found["scores"].tolist() == classifier.scores(found["texts"]).tolist()


def test_a_classifier_refuses_what_it_cannot_score(
    finished: tuple[list[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = finished
    best = folder / "best"
    classifier = Classifier(best)
    assert classifier.labels == ("negative", "positive")
    assert (classifier.config.precision, classifier.config.max_length) == ("bf16", 32)
    assert classifier.scores([]).shape == (0,)
    assert classifier.scores([""]).shape == (1,)
    texts = [f"great sound {'good ' * number}" for number in range(5)]
    scores = classifier.scores(text for text in texts).tolist()
    for limits in ((2, 10**6), (10**6, 5)):
        for name, limit in zip(("CHUNK_ROWS", "CHUNK_CHARS"), limits, strict=True):
            monkeypatch.setattr(f"toolkit.data.tokenise.{name}", limit)
        assert classifier.scores(texts).tolist() == scores
    for texts, error, message in (
        (
            "Great sound.",
            TypeError,
            r"got one text, allowed is a list of texts: scores\(\[text\]\)",
        ),
        (["Great sound.", None], TypeError, r"texts\[1\] is None, allowed is a list of texts"),
        (["\ud800"], ValueError, r"texts\[0\] was read in another encoding"),
    ):
        with pytest.raises(error, match=message):
            classifier.scores(texts)
    with pytest.raises(DataError, match=r"holds no model; a run leaves one in runs/<run_id>/best"):
        Classifier(tmp_path)
    for wrong in ({"precision": "fp16"}, {"max_length": 65}):
        with pytest.raises(ValueError, match="allowed are bf16 and fp32, and 2 to 64 tokens"):
            Classifier(best, **wrong)
    settings = read(best / "config.json")
    before = {name: value for name, value in settings.items() if not name.startswith("trained_")}
    (best / "config.json").write_text(json.dumps(before))
    with pytest.raises(DataError, match=r"does not say its max_length: Classifier\(folder, max_le"):
        Classifier(best, precision="fp32")
    assert Classifier(best, precision="fp32", max_length=16).config.max_length == 16
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="a launcher has started several"):
        Classifier(best)


def test_the_written_config_reproduces_the_run(
    finished: tuple[list[str], Path], tmp_path: Path
) -> None:
    _, folder = finished
    again = tmp_path / "again"
    assert main([f"--config={folder / 'config.yaml'}", f"--output_dir={again}"]) == 0
    first, second = lines(folder, "train"), lines(again / folder.name, "train")
    assert [row["train/loss"] for row in first] == [row["train/loss"] for row in second]
    weights = [path / "best" / "model.safetensors" for path in (folder, again / folder.name)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert set(yaml.safe_load((folder / "config.yaml").read_text())) == set(
        RunConfig.__dataclass_fields__
    )


def test_a_second_run_shows_the_first(
    finished: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    flags, folder = finished
    before = (folder / "metrics.jsonl").read_bytes()
    assert main(flags) == 0
    assert "This run is complete" in capsys.readouterr().out
    assert (folder / "metrics.jsonl").read_bytes() == before
    assert main([*flags, "--overwrite"]) == 0
    kept = folder.with_name(f"{folder.name}.old-1")
    assert (kept / "metrics.jsonl").read_bytes() == before
    written = folder / "config.yaml"
    assert yaml.safe_load(written.read_text())["overwrite"] is False, "it would hold for each start"
    after = (folder / "metrics.jsonl").read_bytes()
    assert main([f"--config={written}"]) == 0
    assert (folder / "metrics.jsonl").read_bytes() == after


def test_other_weights_in_the_same_folder_are_another_encoder(
    finished: tuple[list[str], Path], tiny_encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its result is no result of theirs."""
    flags, folder = finished
    weights = tiny_encoder / "model.safetensors"
    assert read(folder / "summary.json")["encoder_fingerprint"] == encoder_fingerprint(
        tiny_encoder, folder
    )
    before = weights.read_bytes()
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    try:
        assert main(flags) == 2
    finally:
        weights.write_bytes(before)
    said = capsys.readouterr().err
    assert "holds a completed run that is another (encoder weights is" in said


def test_a_job_that_is_queued_again_before_it_began_does_what_it_was_told(
    finished: tuple[list[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    fresh_accelerate: Callable[[], None],
) -> None:
    """What is in the folder is not its own."""
    flags, folder = finished
    fresh_accelerate()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert main([*flags, "--overwrite"]) == 0
    assert read(folder / "run.json")["slurm_job"] == "7"
    assert read(folder.with_name(f"{folder.name}.old-1") / "run.json")["slurm_job"] is None
    assert main([*flags, "--overwrite"]) == 0, "now it is: the result is shown"
    assert not folder.with_name(f"{folder.name}.old-2").exists()


def test_to_overwrite_and_to_resume_contradict_each_other(
    finished: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    flags, folder = finished
    assert main([*flags, "--overwrite", f"--resume={folder}"]) == 2
    assert f"leave out --resume {folder}" in capsys.readouterr().err
    assert read(folder / "status.json")["status"] == "completed"


@pytest.mark.parametrize("flag", ["--overwrite", "--resume=none"])
def test_a_job_that_is_queued_again_goes_on(
    flag: str,
    tiny_flags: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    fresh_accelerate: Callable[[], None],
) -> None:
    """SLURM starts the same command again: it must not start anew each time, for ever."""
    flags = [*tiny_flags, "--max_steps=8", "--save_minutes=0", "--run_id=x"]
    assert main(flags) == 0
    fresh_accelerate()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOOLKIT_FAULT", "raise@data:0:5")
        assert main([*flags, "--resume=none", "--overwrite"]) == 1
    fresh_accelerate()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert main([*flags, flag]) == 0
    assert "Going on after step 4" in capsys.readouterr().out
    assert main([*flags, flag]) == 0, "complete: its result is shown"
    assert [p.name for p in sorted((tmp_path / "runs").glob("x*"))] == ["x", "x.old-1"]


def test_a_folder_of_another_run_is_not_taken_for_this_one(
    finished: tuple[list[str], Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    flags, folder = finished
    other = [*flags, f"--run_id={folder.name}"]
    assert main([*other, "--lr=0.5", "--head=v1"]) == 2
    error = capsys.readouterr().err
    assert "head is 'v1' here, 'v2' there" in error
    assert "lr is 0.5 here, 0.003 there" in error
    data = tmp_path / "changed"
    shutil.copytree(flags[1].split("=")[1], data)
    (data / "test.csv").write_text("text,label\ngreat,pos\nawful,neg\n")
    assert main([*other, f"--dataset={data}"]) == 2
    assert "data is" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["precious.csv", "config.yaml"])
def test_a_folder_of_the_users_is_left_alone(
    name: str, tiny_flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    precious = Path(tiny_flags[3].split("=")[1]) / "mine" / name
    precious.parent.mkdir(parents=True)
    precious.write_text("irreplaceable")
    assert main([*tiny_flags, "--run_id=mine"]) == 2
    assert "is not a run folder" in capsys.readouterr().err
    assert precious.read_text() == "irreplaceable"


def test_a_file_in_the_place_of_a_run_folder(
    tiny_flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    file = Path(tiny_flags[3].split("=")[1]) / "mine"
    file.parent.mkdir(parents=True)
    file.write_text("irreplaceable")
    assert main([*tiny_flags, "--run_id=mine"]) == 2
    assert "is not a run folder; choose another --run_id" in capsys.readouterr().err
    assert file.read_text() == "irreplaceable"


def test_bad_data_is_explained_whoever_finds_it(tiny_flags: list[str], tmp_path: Path) -> None:
    """Under the launcher the first rank says why, although another might have failed first."""
    bad = tmp_path / "bad.csv"
    bad.write_text("text,label\nx,maybe\ny,neg\nz,pos\n")
    done = launch(2, TRAIN, *tiny_flags, f"--dataset={bad}")
    assert done.returncode == 1
    assert done.stderr.count("'maybe', which is neither 'neg' nor 'pos': 1") == 1
    assert read(only_run(tiny_flags) / "status.json")["status"] == "data_error"
    done = launch(2, TRAIN, *tiny_flags, "--lr=-1")
    assert done.stderr.count("lr got -1") == 1


def test_no_step_at_all_is_an_error(
    tiny_flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*tiny_flags, "--epochs=0.001"]) == 3
    assert "not one step" in capsys.readouterr().err


def test_dry_run_trains_nothing(tiny_flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*tiny_flags, "--dry_run"]) == 0
    assert "21 steps of 16 reviews" in capsys.readouterr().out
    assert main([*tiny_flags, "--dry_run", "--label_column=verdict"]) == 3
    assert not Path(tiny_flags[3].split("=")[1]).exists(), "nor is a failure of it one of the run"


def test_bad_data_is_recorded_before_any_model_is_loaded(
    tiny_flags: list[str], tmp_path: Path
) -> None:
    bad = tmp_path / "bad.csv"
    bad.write_text("text,label\nx,maybe\ny,neg\nz,pos\n")
    code = """
import sys
from toolkit.train import main
code = main(sys.argv[1:])
assert "torch" not in sys.modules
sys.exit(code)
"""
    done = run_python("-c", code, *tiny_flags, f"--dataset={bad}")
    assert done.returncode == 3, done.stderr
    assert "'maybe', which is neither 'neg' nor 'pos': 1" in done.stderr
    status = read(only_run(tiny_flags) / "status.json")
    assert status["status"] == "data_error"


def test_divergence_is_an_outcome_and_such_weights_are_never_saved(
    tiny_flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Finite for four steps, evaluated at each, then never again."""
    from toolkit.engine.runtime import Runtime

    plain, calls = Runtime.backward, []

    def poisoned(self: Runtime, loss: torch.Tensor, rows: int) -> None:
        calls.append(rows)
        plain(self, loss * float("nan") if len(calls) > 4 else loss, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runtime, "backward", poisoned)
        code = main([*tiny_flags, "--max_skipped=2", "--eval_every=1"])
    assert code == 4
    assert len(calls) == 7
    folder = only_run(tiny_flags)
    assert read(folder / "status.json")["status"] == "diverged"
    assert "not finite" in capsys.readouterr().err
    weights = load_file(folder / "best" / "model.safetensors")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())
    assert [row["step"] for row in lines(folder, "eval")] == [1, 2, 3, 4, 5, 6]


def test_a_crash_is_recorded_with_its_message(
    tiny_flags: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOOLKIT_FAULT", "raise@optimizer:0:3")
    assert main(tiny_flags) == 1
    status = read(only_run(tiny_flags) / "status.json")
    assert status["status"] == "crashed"
    assert "rank 0, phase optimizer of step 3: RuntimeError: injected" in status["message"]
    assert "Traceback" in capsys.readouterr().err


def test_ranks_that_do_not_come_together_are_no_running_run(
    tiny_flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("connection refused")

    monkeypatch.setattr("toolkit.engine.runtime._accelerator", refuse)
    assert main(tiny_flags) == 1
    status = read(only_run(tiny_flags) / "status.json")
    assert status["status"] == "crashed"
    assert "could not start together: connection refused" in status["message"]


@pytest.mark.parametrize(
    ("place", "advice"),
    [
        ("evaluate:0:7", "Evaluate in smaller pieces: --eval_tokens 32"),
        ("optimizer:0:2", "Smaller micro-batches do not help here"),
    ],
)
def test_advice_on_memory_depends_on_where_it_ran_out(
    tiny_flags: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    advice: str,
) -> None:
    monkeypatch.setenv("TOOLKIT_FAULT", f"oom@{place}")
    assert main(tiny_flags) == 1
    assert advice in capsys.readouterr().err
    status = read(only_run(tiny_flags) / "status.json")
    assert (status["status"], status["split"]) == ("oom", 1)


def test_a_best_model_that_cannot_be_written(
    tiny_flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    from toolkit import run as wiring

    def explode(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wiring, "save_model", explode)
        assert main(tiny_flags) == 5
    status = read(only_run(tiny_flags) / "status.json")
    assert status["status"] == "io_error"
    assert "no best model could be kept" in status["message"]
    said = capsys.readouterr().err
    assert "the best model so far, of step 7, was not kept: [Errno 28] No space left" in said
    assert "Training goes on" in said


def test_folders_that_cannot_be_written(
    tiny_flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*tiny_flags, "--output_dir=/proc/nowhere"]) == 2
    assert "--output_dir" in capsys.readouterr().err
    assert main([*tiny_flags, "--cache_dir=/proc/nowhere"]) == 2
    assert "--cache_dir" in capsys.readouterr().err


def test_two_runs_do_not_share_a_folder(
    tiny_flags: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from toolkit.record.journal import RunFolder

    monkeypatch.setattr("toolkit.train.CLAIM_SECONDS", 0.2)
    folder = RunFolder(Path(tiny_flags[3].split("=")[1]) / "mine")
    with folder.claim():
        assert main([*tiny_flags, "--run_id=mine"]) == 2
    said = capsys.readouterr()
    assert "another process is writing" in said.err
    assert "waiting 0 s for it to end" in said.out


def test_a_plain_run_needs_no_wandb_and_starts_fast(tiny_flags: list[str]) -> None:
    code = """
import gc, sys
sys.modules["wandb"] = None
from toolkit.train import main
code = main(sys.argv[1:])
assert "torch._inductor.cudagraph_trees" not in sys.modules, "takes 0.9 s of every start"
assert gc.get_freeze_count() > 300_000, "the collector takes a second of every start"
assert not {"deepspeed", "pandas"} & set(sys.modules), "they take half a second of every run"
sys.exit(code)
"""
    done = run_python("-c", code, *tiny_flags, "--max_steps=2")
    assert done.returncode == 0, done.stderr
    missing = run_python("-c", code, *tiny_flags, "--max_steps=3", "--track=wandb")
    assert missing.returncode == 0, missing.stderr
    assert "W&B failed and is off" in missing.stderr


def test_bf16_is_close_to_fp32_over_fp32_weights(
    tiny_flags: list[str], fresh_accelerate: Callable[[], None]
) -> None:
    losses = {}
    for precision in ("bf16", "fp32"):
        fresh_accelerate()
        flags = [*tiny_flags, f"--precision={precision}", f"--run_id={precision}", "--log_every=1"]
        assert main(flags) == 0
        folder = Path(flags[3].split("=")[1]) / precision
        losses[precision] = [row["train/loss"] for row in lines(folder, "train")]
        weights = load_file(folder / "best" / "model.safetensors")
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    difference = np.abs(np.array(losses["bf16"]) - losses["fp32"])
    assert 0 < difference.max() < 0.05


@pytest.mark.parametrize(
    ("device", "settings", "padded", "steps", "expected"),
    [
        ("cuda", {}, False, 10_000, "would take a minute"),
        ("cpu", {}, False, 10_000, None),
        ("cuda", {"compile": True}, False, 10_000, None),
        ("cpu", {"compile": True}, False, 300, "is for GPUs"),
        ("cuda", {}, True, 10_000, None),
        ("cuda", {}, False, 300, None),
    ],
)
def test_who_is_told_of_compile(
    device: str, settings: dict[str, Any], padded: bool, steps: int, expected: str | None
) -> None:
    runtime: Any = SimpleNamespace(device=torch.device(device), is_zero=False)
    config = replace(RunConfig(), **settings)
    hint = about_compiling(config, runtime, padded, steps)
    assert (hint is None) if expected is None else (expected in (hint or ""))
    if device == "cuda":
        runtime.is_zero = True  # with which nothing can be compiled
        assert about_compiling(config, runtime, padded, steps) is None


@pytest.mark.parametrize(("precision", "advised"), [("fp32", True), ("bf16", False)])
def test_compile_where_packs_have_no_fast_back_end(precision: Any, advised: bool) -> None:
    """What is already so is not advised."""
    config = RunConfig(precision=precision)
    runtime: Any = SimpleNamespace(device=torch.device("cuda"))
    with pytest.raises(ConfigError, match="leave out compile") as caught:
        build._refuse_to_compile(config, runtime, padded=True)
    assert ("set precision to bf16" in str(caught.value)) == advised
