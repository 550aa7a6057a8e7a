"""What is planned follows from counts that can be checked, and fits what a run then takes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.programs import TRAIN, launcher, run_python
from toolkit.engine import estimate
from toolkit.engine.estimate import Activations


def test_what_a_forward_pass_keeps() -> None:
    """Two inputs of a product are kept, the parameter is not counted, a shared storage is once."""
    weight = torch.ones(100, 50, requires_grad=True)
    x = torch.ones(8, 100)

    def compute() -> torch.Tensor:
        hidden = x @ weight  # keeps x, and the weight
        return (hidden.exp() * hidden).sum()  # exp keeps its result, the product both

    assert estimate.saved_bytes(compute, [weight]) == 4 * (8 * 100 + 8 * 50 + 8 * 50)


def test_state_of_each_distribution() -> None:
    """Each cut divides by the ranks, and with one rank there is nothing to gain."""
    four = {
        kind: estimate.state_bytes(kind, 1000, 4, on_cpu=False)
        for kind in ("replicas", "zero1", "zero2", "zero2_offload", "zero3")
    }
    assert four == {
        "replicas": 16_000,
        "zero1": 8_000 + 12_000 / 4,
        "zero2": 4_000 + 16_000 / 4,
        "zero2_offload": 4_000 + 4_000 / 4,
        "zero3": 20_000 / 4,
    }
    assert estimate.state_bytes("zero2_offload", 1000, 4, on_cpu=True) == four["zero2"]


def test_what_fits() -> None:
    kept = Activations(fixed=100.0, per_token=10.0)
    assert kept.of(7) == 170
    assert kept.tokens_within(170) == 7
    assert kept.tokens_within(90) < 0


def test_stated_rates() -> None:
    """BERT-base at Amazon Polarity's lengths: section 2 of the reference counts 524 MFLOP."""
    offsets = np.array([0, 130, 260])
    flops = estimate.token_flops(12, 768, 3072, offsets)
    assert flops == pytest.approx(524e6, rel=0.001)
    rates = estimate.stated(300, 2000, flops, 110_000_000)
    assert rates.per_token == pytest.approx(524e6 / 300e12, rel=0.001)
    assert rates.fixed == pytest.approx(28 * 110e6 / 2e12)
    assert estimate.communication_bytes("replicas", 110_000_000, 8) == 4 * 110e6 * 2 * 7 / 8
    assert estimate.communication_bytes("replicas", 110_000_000, 1) == 0


def run_measured(*arguments: str) -> int:
    """Run Python; return the peak memory of the process or of the largest below it, in bytes."""
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    process = subprocess.Popen([sys.executable, *arguments], env=environment, cwd="/")
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_maxrss * 1024


def test_memory_is_as_planned(tmp_path: Path, shared_cache: Path) -> None:
    """Of a run with one process and with two, within 15 %."""
    flags = [f"--cache_dir={shared_cache}", "--head=v2", "--batch_size=128", "--max_steps=10"]
    flags += ["--train_rows=500", "--test_rows=64", "--validation_rows=64", "--cpu_threads=1"]
    done = run_python("-m", "toolkit", "plan", *flags, PYTHONPATH=str(TRAIN.parent.parent))
    assert done.returncode == 0, done.stderr
    planned = dict(re.findall(r"^(\w+)\.yaml +\d+ +([\d.]+)", done.stdout, re.MULTILINE))
    assert set(planned) == {"cpu", "cpu2", "zero1", "zero2", "zero2_offload", "zero3"}
    for processes, name in ((1, "cpu"), (2, "cpu2")):
        place = [f"--output_dir={tmp_path}", f"--run_id={name}", "--track=none"]
        peak = run_measured(*launcher(processes), str(TRAIN), *flags, *place)
        assert float(planned[name]) * 2**30 == pytest.approx(peak, rel=0.15), name


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--tflops=0"], "--tflops got 0, allowed is more than 0"),
        (["--sweep=nowhere.yaml"], "--sweep got nowhere.yaml, which is no file"),
        (["--batch_sise=3"], "batch_sise"),
    ],
)
def test_wrong_flags(flags: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    from toolkit.plan import main

    assert main(flags) == 2
    assert part in capsys.readouterr().err
