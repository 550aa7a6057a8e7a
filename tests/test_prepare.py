"""Splits, truncation and the token cache: seeded, whole, built once, never half read."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

import toolkit.prepare
from tests.programs import run_python
from tests.tiny import build_cache, reviews
from toolkit.data import prepare
from toolkit.data.cache import open_cache
from toolkit.data.prepare import DataSpec
from toolkit.data.report import describe
from toolkit.data.rows import Split
from toolkit.data.selection import select
from toolkit.data.validate import CheckedSplit, check
from toolkit.errors import DataError


def checked(labels: np.ndarray, groups: np.ndarray | None = None) -> CheckedSplit:
    groups = np.full(len(labels), -1) if groups is None else groups
    split = Split("train", "rows", lambda: iter(()))
    usable = np.ones(len(labels), bool)
    texts = np.arange(len(labels))
    return CheckedSplit(split, labels, usable, groups, texts, np.zeros(len(labels), int), [""])


SIZES = {"seed": 0, "train_rows": None, "validation_rows": None, "test_rows": None}


def test_one_file_is_carved_into_three_disjoint_stratified_splits() -> None:
    labels = (np.arange(1000) % 4 == 0).astype(np.uint8)  # a quarter is positive
    chosen = select({"train": checked(labels)}, **SIZES)
    rows = {name: rows for name, (_, rows) in chosen.items()}
    assert {name: len(r) for name, r in rows.items()} == {
        "train": 720,
        "validation": 80,
        "test": 200,
    }
    assert sorted(np.concatenate(list(rows.values()))) == list(range(1000))
    for part in rows.values():
        assert labels[part].mean() == pytest.approx(0.25, abs=0.01)


def test_rare_classes_are_on_all_sides() -> None:
    labels = np.zeros(40, np.uint8)
    labels[[3, 17, 30]] = 1
    chosen = select({"train": checked(labels)}, **SIZES)
    assert {name: int(labels[rows].sum()) for name, (_, rows) in chosen.items()} == {
        "train": 1,
        "validation": 1,
        "test": 1,
    }
    assert len(chosen["validation"][1]) == 3


def test_splits_of_one_class_are_refused() -> None:
    labels = np.zeros(40, np.uint8)
    labels[:2] = 1
    with pytest.raises(DataError, match="validation has 3 negative and 0 positive rows"):
        select({"train": checked(labels)}, **SIZES)


def test_too_many_training_rows_are_named_first() -> None:
    labels = (np.arange(1000) % 2).astype(np.uint8)
    with pytest.raises(
        DataError, match=r"--train_rows 10000: needs 5000 .* ask for less than 1000"
    ):
        select({"train": checked(labels)}, **SIZES | {"train_rows": 10_000})


def test_groups_stay_on_one_side() -> None:
    groups = np.repeat(np.arange(100), 10)
    labels = (np.arange(1000) % 2).astype(np.uint8)
    chosen = select({"train": checked(labels, groups)}, **SIZES)
    seen = [set(groups[rows]) for _, rows in chosen.values()]
    assert sum(map(len, seen)) == 100
    assert set.union(*seen) == set(range(100))
    assert len(chosen["test"][1]) == 200


def test_subsets_are_balanced_seeded_and_nested() -> None:
    labels = (np.arange(1000) % 4 == 0).astype(np.uint8)
    splits = {"train": checked(labels), "test": checked(labels[:100])}

    def rows(seed: int, count: int) -> np.ndarray:
        return select(splits, **(SIZES | {"seed": seed, "train_rows": count, "test_rows": 5}))[
            "train"
        ][1]

    assert labels[rows(0, 100)].sum() == 50
    assert (rows(0, 100) == rows(0, 100)).all()
    assert set(rows(0, 100)) != set(rows(1, 100))
    assert len(select(splits, **(SIZES | {"test_rows": 5}))["test"][1]) == 5
    with pytest.raises(DataError, match="--train_rows 900"):
        rows(0, 900)


def test_the_default_validation_split_is_a_tenth_and_at_most_10000() -> None:
    labels = (np.arange(200_000) % 2).astype(np.uint8)
    splits = {"train": checked(labels), "test": checked(labels[:10])}
    assert len(select(splits, **SIZES)["validation"][1]) == 10_000
    assert len(select(splits, **(SIZES | {"train_rows": 500}))["validation"][1]) == 50


def test_tokens_are_those_of_the_tokenizer(
    tiny_data: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    cache = build_cache(DataSpec(str(tiny_data), max_length=10), tiny_encoder, tmp_path)
    tokenizer = Tokenizer.from_file(str(tiny_encoder / "tokenizer.json"))
    tokenizer.enable_truncation(10)
    rows = list((tiny_data / "train.csv").read_text().splitlines())[1:]
    split = cache.splits["train"]
    assert split.tokens.dtype == np.uint16
    truncated = 0
    for number, row_id in enumerate(split.row_ids):
        text, label = rows[row_id].rsplit(",", 1)
        expected = tokenizer.encode(text).ids
        truncated += len(expected) == 10
        assert split.tokens[split.offsets[number] : split.offsets[number + 1]].tolist() == expected
        assert split.labels[number] == (label == "pos")
    assert truncated > 20
    assert 0 < cache.meta["truncated_rows"] < len(rows) + 41
    text = describe(cache)
    assert "longer than 10 tokens" in text
    assert "train           108 rows" in text


def test_texts_on_both_sides_are_counted(tmp_path: Path, tiny_encoder: Path) -> None:
    """A review dump has many twice; those of test that train has, too, make figures look better."""
    (tmp_path / "data").mkdir()
    for name, first in (("train", 0), ("validation", 45), ("test", 58)):
        rows = [f"a story of {n},{('neg', 'pos')[n % 2]}" for n in range(first, first + 60)]
        (tmp_path / "data" / f"{name}.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    cache = build_cache(DataSpec(str(tmp_path / "data")), tiny_encoder, tmp_path / "cache")
    assert cache.meta["texts_in_train"] == {"validation": 15, "test": 2}
    said = "with a text that is in train, too: 15 of 60 validation rows, 2 of 60 test rows"
    assert said in describe(cache)


@pytest.mark.parametrize("more", [0, 30])
def test_a_file_that_changes_while_it_is_read_makes_no_cache(
    more: int, tmp_path: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels are read in a first pass, texts in a second one: they would be of other rows."""
    path = tmp_path / "reviews.csv"

    def write(rows: list[tuple[str, str]]) -> None:
        path.write_text("\n".join(["text,label", *(f"{x},{y}" for x, y in rows)]) + "\n")

    rows = reviews(60)
    write(rows)

    def check_and_sort(*inputs: Any) -> Any:
        found = check(*inputs)
        write(rows[::-1] + rows[:more])
        return found

    monkeypatch.setattr(prepare, "check", check_and_sort)
    with pytest.raises(DataError, match=r"reviews.csv was written to while it was read"):
        build_cache(DataSpec(str(path)), tiny_encoder, tmp_path / "cache")
    assert [p.name for p in (tmp_path / "cache" / "tokens").iterdir() if p.is_dir()] == []


def test_a_tokenizer_without_a_first_token_is_refused(
    tiny_data: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    """An empty text would be no sequence, and any other be judged by its first word."""
    encoder = Path(shutil.copytree(tiny_encoder, tmp_path / "encoder"))
    whole = json.loads((encoder / "tokenizer.json").read_text())
    (encoder / "tokenizer.json").write_text(json.dumps(whole | {"post_processor": None}))
    with pytest.raises(DataError, match=r"puts no \[CLS\]"):
        build_cache(DataSpec(str(tiny_data)), encoder, tmp_path / "cache")


def test_the_fingerprint_covers_what_matters(
    tiny_data: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    spec = DataSpec(str(tiny_data))
    first = build_cache(spec, tiny_encoder, tmp_path).folder
    assert build_cache(spec, tiny_encoder, tmp_path).folder == first
    other_rows = tmp_path / "other"
    other_rows.mkdir()
    for file in tiny_data.iterdir():
        (other_rows / file.name).write_bytes(file.read_bytes())
    moved = replace(spec, dataset=str(other_rows))
    assert build_cache(moved, tiny_encoder, tmp_path).folder == first  # same content elsewhere
    with (other_rows / "train.csv").open("a") as handle:
        handle.write("one more,pos\n")
    other_encoder = tmp_path / "encoder"
    other_encoder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (tiny_encoder / name).read_text()
        (other_encoder / name).write_text(text + " ")
    folders = {
        build_cache(moved, tiny_encoder, tmp_path).folder,
        build_cache(spec, other_encoder, tmp_path).folder,
        build_cache(replace(spec, max_length=8), tiny_encoder, tmp_path).folder,
        build_cache(replace(spec, train_rows=10), tiny_encoder, tmp_path).folder,
        build_cache(replace(spec, split_seed=1), tiny_encoder, tmp_path).folder,
    }
    assert len(folders | {first}) == 6


def test_a_file_moved_to_another_split_makes_another_cache(
    tiny_data: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    content = (tiny_data / "train.csv").read_bytes()
    for name in ("test/a.csv", "train/b.csv", "train/c.csv"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_bytes(content)
    spec = DataSpec(str(tmp_path / "data"))
    before = build_cache(spec, tiny_encoder, tmp_path)
    (tmp_path / "data" / "train" / "b.csv").rename(tmp_path / "data" / "test" / "b.csv")
    after = build_cache(spec, tiny_encoder, tmp_path)
    assert (len(before.splits["test"]), len(after.splits["test"])) == (120, 240)


def test_a_damaged_cache_is_refused(tiny_data: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    folder = build_cache(DataSpec(str(tiny_data)), tiny_encoder, tmp_path).folder
    tokens = folder / "train.tokens.bin"
    tokens.write_bytes(tokens.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"damaged .*train.tokens.bin has"):
        open_cache(folder)
    (folder / "meta.json").unlink()
    with pytest.raises(DataError, match="delete the folder"):
        open_cache(folder)


BUILDER = """
import sys, time
from pathlib import Path
from toolkit.data import prepare as module
from toolkit.data.sources import open_source
data, encoder, cache, pause = sys.argv[1:]
write = module.TokenWriter.write
def slow(*arguments):
    write(*arguments)
    print("writing", flush=True)
    time.sleep(float(pause))
module.TokenWriter.write = slow
spec = module.DataSpec(data)
folder = module.prepare(spec, open_source(spec, Path(cache)), Path(encoder), Path(cache)).folder
print("done", folder, flush=True)
"""


def builder(data: Path, encoder: Path, cache: Path, pause: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", BUILDER, str(data), str(encoder), str(cache), str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_killed_builder_leaves_nothing_that_is_read(
    tiny_data: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    victim = builder(tiny_data, tiny_encoder, tmp_path, 60)
    assert victim.stdout is not None
    while victim.stdout.readline().strip() != "writing":
        pass
    halves = [path for path in (tmp_path / "tokens").iterdir() if path.is_dir()]
    assert len(halves) == 1
    assert halves[0].name.startswith(".")
    waiting = builder(tiny_data, tiny_encoder, tmp_path, 0)
    time.sleep(2)
    assert waiting.poll() is None, "the second builder has to wait for the first"
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    assert waiting.wait(timeout=60) == 0
    [folder] = [path for path in (tmp_path / "tokens").iterdir() if path.is_dir()]
    assert not folder.name.startswith(".")
    assert len(open_cache(folder).splits["train"]) == 108


def test_many_builders_at_once_build_once(
    tiny_data: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    crowd = [builder(tiny_data, tiny_encoder, tmp_path, 0.2) for _ in range(4)]
    outputs = [process.communicate(timeout=120)[0] for process in crowd]
    assert all(process.returncode == 0 for process in crowd)
    assert sum("writing" in output for output in outputs) == 1
    assert len({output.splitlines()[-1] for output in outputs}) == 1


def test_prepare_command(tiny_data: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    flags = [f"--dataset={tiny_data}", f"--encoder={tiny_encoder}", f"--cache_dir={tmp_path}"]
    flags.append("--max_length=64")
    code = (
        "import sys; from toolkit.__main__ import main; code = main(sys.argv[1:]);"
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    done = run_python("-c", code, "prepare", *flags)
    assert done.returncode == 0, done.stderr
    assert "108 rows (54 negative, 54 positive)" in done.stdout
    failed = run_python("-m", "toolkit", "prepare", "--dataset=/no/such", *flags[1:])
    assert failed.returncode == 3
    assert "neither a known name nor a path" in failed.stderr


def test_prepare_that_is_stopped(
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(toolkit.prepare, "prepare_data", interrupted)
    assert toolkit.prepare.main([f"--dataset={tiny_data}", f"--cache_dir={tmp_path}"]) == 130
    assert "stopped as asked" in capsys.readouterr().err


def test_snippets_split_by_review(shared_cache: Path) -> None:
    """The counts that the data set's description gives, and no review on two sides."""
    from toolkit.assets import MINILM, SNIPPETS, SNIPPETS_FILE, fetch

    cache = build_cache(DataSpec("snippets"), fetch(MINILM, shared_cache), shared_cache)
    lines = (fetch(SNIPPETS, shared_cache) / SNIPPETS_FILE).read_text().splitlines()
    kept = [line for line in lines if abs(float(line.split("\t")[1])) >= 0.5]
    assert len(lines) == 3708
    assert len(kept) == 2985
    assert sum(split.labels.sum() for split in cache.splits.values()) == 1750
    review = np.array([int(line.split("_")[0]) for line in kept])
    sides = [set(review[split.row_ids]) for split in cache.splits.values()]
    assert len(set.union(*sides)) == sum(map(len, sides)) == 298
    assert json.loads((cache.folder / "meta.json").read_text())["quarantined"] == {"train": 0}
