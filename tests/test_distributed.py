"""Invariants 1 and 3 on real process groups: 1, 2 and 3 gloo processes under `accelerate launch`."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.programs import ROOT, TRAIN, launch, launcher

WORKER = ROOT / "tests" / "workers" / "train_few_steps.py"
WORLDS = (1, 2, 3)
STEPS = 5
PADDED = ("padded", "padded_accum3")
LIKE_PACKED = ("accum1", "accum4", "accum7", "max_tokens", "begun_ahead", *PADDED)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, worker_flags: list[str]) -> Path:
    """Run the worker once on each world size."""
    folder = tmp_path_factory.mktemp("results")
    for world_size in WORLDS:
        done = launch(world_size, WORKER, folder, str(world_size), *worker_flags)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


def load(folder: Path, case: str, world_size: int) -> dict[str, np.ndarray]:
    with np.load(folder / f"{case}-{world_size}.npz") as file:
        return dict(file)


def relative_difference(a: dict[str, np.ndarray], b: dict[str, np.ndarray], prefix: str) -> float:
    """Return |a - b| / |b| over all tensors of a kind, as one long vector."""
    names = [name for name in b if name.startswith(prefix)]
    assert len(names) > 30
    difference = sum(float(((a[name] - b[name]) ** 2).sum()) for name in names)
    return (difference / sum(float((b[name] ** 2).sum()) for name in names)) ** 0.5


@pytest.mark.parametrize("case", LIKE_PACKED)
@pytest.mark.parametrize("world_size", WORLDS)
def test_a_step_is_the_same_however_it_is_split(results: Path, case: str, world_size: int) -> None:
    """Invariant 1, with dropout on: rows, rates, gradient, loss, and the weights after 5 steps."""
    one, split = load(results, "accum1", 1), load(results, case, world_size)
    assert (one["rows"] == split["rows"]).all()
    assert (one["rates"] == split["rates"]).all()
    assert len(set(one["rates"][:, 0])) == STEPS
    np.testing.assert_allclose(split["losses"], one["losses"], rtol=1e-5)
    assert relative_difference(split, one, "gradient/") < 1e-5
    assert relative_difference(split, one, "weight/") < 1e-5


@pytest.mark.parametrize("world_size", WORLDS)
def test_a_step_with_fewer_rows_than_micro_batches(results: Path, world_size: int) -> None:
    """Two rows on up to three ranks: somebody's micro-batch is empty."""
    one, split = load(results, "tiny_batch", 1), load(results, "tiny_batch", world_size)
    assert one["rows"].sum() == 2 * STEPS
    assert (one["rows"] == split["rows"]).all()
    assert relative_difference(split, one, "gradient/") < 1e-5
    assert relative_difference(split, one, "weight/") < 1e-5


@pytest.mark.parametrize("world_size", WORLDS)
def test_evaluation_counts_every_row_once(results: Path, world_size: int) -> None:
    """Invariant 3, for sizes around the number of ranks: each has the score that one rank gives it."""
    alone, shared = (
        json.loads((results / f"report-{ranks}.json").read_text())["evaluated"]
        for ranks in (1, world_size)
    )
    sizes = [0, 1, 2, 3, 4, 23, 41]
    assert [*shared] == [str(size) for size in sizes]
    for size in sizes:
        expected, _ = alone[str(size)]
        assert len(expected) == size
        for scores in shared[str(size)]:  # packed, and padded
            np.testing.assert_allclose(scores, expected, rtol=1e-5)
    assert len(set(alone["41"][0])) > 20, "rows can be told apart"


def test_the_reducer_is_gone_before_the_process_group(
    tiny_flags: list[str], tmp_path: Path
) -> None:
    """Else torch 2.13 hangs at the end of some runs; see `Runtime.end`."""
    script = tmp_path / "script.py"
    script.write_text(
        """
import gc, sys
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel
from toolkit.train import main
end, seen = Accelerator.end_training, []
def watched(self):
    seen.append(sum(isinstance(x, DistributedDataParallel) for x in gc.get_objects()))
    end(self)
Accelerator.end_training = watched
prepare = Accelerator.prepare
def checked(self, *objects):
    prepared = prepare(self, *objects)
    assert isinstance(prepared[0], DistributedDataParallel)
    return prepared
Accelerator.prepare = checked
code = main(sys.argv[1:])
assert seen == [0], seen
sys.exit(code)
"""
    )
    done = launch(2, script, *tiny_flags, "--max_steps=2")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("world_size", WORLDS)
def test_clipping_clips(results: Path, world_size: int) -> None:
    report = json.loads((results / f"report-{world_size}.json").read_text())
    assert report["clipped_norm"] == pytest.approx(0.01, rel=1e-3)
    assert report["free_norm"] > 0.1


@pytest.mark.parametrize("world_size", WORLDS)
def test_nan_on_one_rank_is_one_decision_for_all(results: Path, world_size: int) -> None:
    report = json.loads((results / f"report-{world_size}.json").read_text())
    assert report["poison"] == {
        "skipped": 2,
        "finite": True,
        "diverged": True,
        "replicas_equal": True,
    }


@pytest.mark.parametrize("config", ["ddp_nodes", "zero2_nodes"])
def test_several_machines(tiny_flags: list[str], config: str) -> None:
    """Two launchers, each of them a machine with one process, as the launch config's head says."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    place = ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
    machines = []
    for rank in range(2):
        command = [*launcher(2, config), *place, "--num_machines", "2", "--machine_rank", str(rank)]
        machines.append(
            subprocess.Popen(
                [sys.executable, *command, str(TRAIN), *tiny_flags, "--max_steps=3"],
                env=os.environ | {"ACCELERATE_USE_CPU": "true"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    said = [machine.communicate(timeout=120)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    [folder] = [path for path in Path(tiny_flags[3].split("=")[1]).iterdir() if path.is_dir()]
    facts = json.loads((folder / "run.json").read_text())
    assert facts["world_size"] == 2
    assert facts["distributed_type"] == ("DEEPSPEED" if "zero" in config else "MULTI_CPU")
    assert "95 % interval" in said[0]
    assert "95 % interval" not in said[1]
