"""Invariant 5: whatever launch config holds the model, the same training comes out.

Tolerances, as |a - b| / |b| over all parameters as one long vector, against one process:

    fp32    5e-7: ranks and micro-batches sum in another order
    bf16    2e-3: the same, and what was rounded otherwise is rounded to three digits in every layer
"""

from pathlib import Path

import numpy as np
import pytest

from tests.programs import ROOT, launch

WORKER = ROOT / "tests" / "workers" / "compare_distributions.py"
LAUNCHES = {
    "one": ("cpu", 1),
    "ddp2": ("cpu2", 2),
    "ddp3": ("cpu2", 3),
    "zero1": ("zero1", 2),
    "zero2": ("zero2", 2),
    "zero3": ("zero3", 2),
    "zero2_offload": ("zero2_offload", 2),
}
"""Name -> launch config and number of processes."""
SEVERAL = [name for name in LAUNCHES if name != "one"]
PLAIN = [
    f"{head}-{precision}-{accum}"
    for head in ("v1", "v2", "v3")
    for precision in ("fp32", "bf16")
    for accum in (1, 4)
]
TOLERANCE = {"fp32": 5e-7, "bf16": 2e-3}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, worker_flags: list[str]) -> Path:
    """Run the worker once under each launch config."""
    folder = tmp_path_factory.mktemp("zero")
    for name, (config, processes) in LAUNCHES.items():
        done = launch(
            processes, WORKER, folder / name, str(processes), *worker_flags, config=config
        )
        assert done.returncode == 0, f"{name}\n{done.stdout}{done.stderr}"
    return folder


def load(folder: Path, name: str, case: str) -> dict[str, np.ndarray]:
    with np.load(folder / f"{name}.npz") as file:
        return {
            key.removeprefix(f"{case}/"): file[key] for key in file if key.startswith(f"{case}/")
        }


def difference(a: dict[str, np.ndarray], b: dict[str, np.ndarray], kind: str) -> float:
    names = [name for name in b if name.startswith(f"{kind}/")]
    assert len(names) >= 39
    assert all(a[name].shape == b[name].shape for name in names), "not at full size"
    squares = sum(float(((a[name] - b[name]) ** 2).sum()) for name in names)
    return (squares / sum(float((b[name] ** 2).sum()) for name in names)) ** 0.5


@pytest.mark.parametrize("case", PLAIN)
@pytest.mark.parametrize("name", SEVERAL)
def test_same_curve_and_weights(results: Path, name: str, case: str) -> None:
    ours, reference = load(results, name, case), load(results, "one", case)
    tolerance = TOLERANCE[case.split("-")[1]]
    assert difference(ours, reference, "initial") == 0, "loading depends on the distribution"
    assert difference(ours, reference, "weight") < tolerance
    for moment in ("exp_avg", "exp_avg_sq"):
        assert difference(ours, reference, moment) < 20 * tolerance
    assert ours["log"][:, 0] == pytest.approx(reference["log"][:, 0], rel=tolerance)
    assert ours["log"][:, 1] == pytest.approx(reference["log"][:, 1], rel=10 * tolerance)
    assert np.array_equal(ours["log"][:, 2:], reference["log"][:, 2:]), "another learning rate"
    assert ours["updates"] == reference["updates"] == 4


@pytest.mark.parametrize("name", SEVERAL)
def test_clipping_clips(results: Path, name: str) -> None:
    """Adam's step hardly depends on the gradient's scale; its first moment does, in proportion."""
    clipped, free = load(results, name, "clipped"), load(results, name, "free")
    assert difference(clipped, load(results, "one", "clipped"), "exp_avg") < 1e-5
    assert difference(clipped, load(results, "one", "clipped"), "weight") < 5e-7
    norms = free["log"][:, 1]
    assert norms.min() > 0.3, "the norm in the log is that before clipping"
    assert clipped["log"][0, 1] == pytest.approx(norms[0], rel=1e-5)

    def size(of: dict[str, np.ndarray]) -> float:
        moments = [of[key] for key in of if key.startswith("exp_avg/")]
        return float(np.sqrt(sum((moment**2).sum() for moment in moments)))

    assert size(clipped) <= 0.05 * 1.001, "an average of gradients no longer than 0.05"
    assert size(free) > 0.1


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_step_that_is_not_finite_on_one_rank_is_left_out_by_all(results: Path, name: str) -> None:
    ours, reference = load(results, name, "poisoned"), load(results, "one", "poisoned")
    assert ours["skipped"] == 1
    assert ours["updates"] == 3
    assert ours["log"][1, 1] == -1
    assert difference(ours, reference, "weight") < 5e-7


@pytest.mark.parametrize("accum", [1, 2])
@pytest.mark.parametrize("name", ["one", "ddp2", "ddp3", "zero1", "zero2", "zero2_offload"])
def test_out_of_memory_while_gradients_go_out(results: Path, name: str, accum: int) -> None:
    """In every step, at another parameter, on another rank; nothing of it is left in the weights."""
    ours, reference = load(results, name, f"out_of_memory_{accum}"), load(results, "one", "free")
    assert ours["broken"] == ours["updates"] == 4
    assert ours["skipped"] == 0
    assert difference(ours, reference, "weight") < 5e-7


def test_the_launch_configs_did_what_their_names_say(results: Path) -> None:
    plans = {name: str(load(results, name, "free")["plan"]) for name in LAUNCHES}
    assert plans.pop("zero3") == "float32, a shard on each rank"
    assert set(plans.values()) == {"float32, whole on each rank"}
    assert len(plans) == 6
