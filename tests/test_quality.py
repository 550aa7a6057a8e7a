"""A smoke alarm on real data: every head learns `snippets`."""

import json
from pathlib import Path

import pytest

from toolkit.config import head_names
from toolkit.train import main


@pytest.mark.parametrize("head", head_names())
def test_every_head_learns_snippets(head: str, tmp_path: Path) -> None:
    flags = [f"--head={head}", "--track=none", f"--output_dir={tmp_path}", "--run_id=alarm"]
    # one thread: two runs that use all cores, side by side, hardly move
    assert main([*flags, "--epochs=1", "--lr=1e-4", "--cpu_threads=1"]) == 0
    summary = json.loads((tmp_path / "alarm" / "summary.json").read_text())
    assert summary["test"]["n"] == 596
    assert summary["test"]["accuracy"]["value"] >= 0.85
