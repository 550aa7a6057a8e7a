"""The embedded default comes through pip, pinned by hash, and its absence is a clear error."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants

from toolkit import assets
from toolkit.assets import MINILM, MINILM_WEIGHTS_SHA256, SNIPPETS, SNIPPETS_FILE, fetch, hub_folder
from toolkit.errors import DataError


def test_both_assets(shared_cache: Path) -> None:
    weights = fetch(MINILM, shared_cache) / "model.safetensors"
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == MINILM_WEIGHTS_SHA256
    assert (fetch(SNIPPETS, shared_cache) / SNIPPETS_FILE).stat().st_size == 373157


def test_without_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(DataError) as caught:
        fetch(SNIPPETS, tmp_path)
    for part in ("vaderSentiment==3.3.2", "pip download", "--dataset PATH"):
        assert part in str(caught.value)
    assert not [path for path in (tmp_path / "assets").iterdir() if path.is_dir()]


def test_another_file_under_that_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"(?i)hash"):
        fetch(replace(SNIPPETS, sha256="0" * 64), tmp_path)


COMMIT = "9d9c45c18f8c3cf1b23a3c27917b60cbf28f3289"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub that some other program has filled, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(assets, "_hub_answers", lambda *_: False)
    repository = tmp_path / "datasets--who--what"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    folder = repository / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    return folder


def from_hub(revision: str = COMMIT) -> Path:
    return hub_folder(
        "who/what", "dataset", revision, ["*.parquet"], required=["train-*.parquet"], hint="else"
    )


def test_a_part_of_a_data_set_is_not_taken_for_all_of_it(hub_cache: Path) -> None:
    """An interrupted download by another program leaves no note of what is still to come."""
    names = [f"train-{number:05d}-of-00003.parquet" for number in range(3)]
    for name in names[:2]:
        (hub_cache / name).touch()
    with pytest.raises(DataError, match="does not hold all of it"):
        from_hub()
    (hub_cache / names[2]).touch()
    assert from_hub() == hub_cache


def test_a_branch_is_said_to_be_as_cached(
    hub_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (hub_cache / "train-one.parquet").touch()
    assert from_hub() == hub_cache
    assert not capsys.readouterr().err, "a commit is what it is"
    assert from_hub("main") == hub_cache
    assert f"the hub does not answer: who/what is {COMMIT}, as cached" in capsys.readouterr().err
