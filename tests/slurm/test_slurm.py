"""The templates on a real SLURM: arrays, two nodes, preemption, walltime, lost nodes."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.faults.harness import result_of
from tests.programs import ROOT
from tests.slurm.bench import SETTINGS, Bench
from tests.slurm.cluster import Cluster, why_not
from tests.wandb_server import ENTITY, PROJECT, serving

pytestmark = pytest.mark.skipif(
    why_not() is not None and not os.environ.get("TOOLKIT_NEEDS_SLURM"), reason=str(why_not())
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    assert why_not() is None, why_not()
    with Cluster(tmp_path_factory.mktemp("slurm")) as started:
        yield started


LONG = ["--epochs=80", "--save_minutes=0.02", "--head=v3", "--dropout=0.2"]


@pytest.fixture
def bench(tmp_path: Path, cluster: Cluster, tiny_encoder: Path, tiny_data: Path) -> Bench:
    return Bench(tmp_path, cluster, tiny_encoder, tiny_data)


def test_an_array_gives_what_the_local_runner_gives(bench: Bench) -> None:
    """Submitted, looked at in the middle, and held against `sweep run` in another folder.

    Three tasks at a time on two nodes: two of them share one.
    """
    said = bench.sweep("submit", "--throttle", "3", "--cpus-per-task=1", "--time=10")
    assert "Submitted 4 of 4 runs as array" in said
    job = said.split("array ")[1].split()[0]
    assert "Nothing is missing" in bench.sweep("submit")
    bench.cluster.wait_for(lambda: "RUNNING" in bench.states(job))
    assert "queued" in bench.sweep("status") or "running" in bench.sweep("status")
    bench.wait(job)
    assert "4 completed" in bench.sweep("status"), bench.logs()
    assert "Best run by F1" in bench.sweep("results")
    bench.write(bench.folder / "local")
    assert bench.sweep("run", "--jobs", "2").count("completed after") == 4
    results = [_test_metrics(folder) for folder in (bench.runs, bench.folder / "local")]
    assert results[0] == results[1]
    assert len(results[0]) == 4


def _test_metrics(folder: Path) -> dict[str, Any]:
    """Return {run id: test metrics} of the runs in a folder."""
    summaries = [json.loads(path.read_text()) for path in folder.glob("*/summary.json")]
    return {summary["run_id"]: summary["test"] for summary in summaries}


def test_a_run_gets_the_cores_of_its_job(bench: Bench) -> None:
    """Neither more nor fewer."""
    for cores in (1, 2):
        flags = [f"--run_id=on-{cores}", "--cpu_threads=None", "--max_steps=2"]
        bench.wait(bench.train(f"--cpus-per-task={cores}", "--time=10", flags=flags))
        facts = json.loads((bench.run_folder(f"on-{cores}") / "run.json").read_text())
        assert facts["cpu_threads"] == cores, bench.logs()


def test_two_nodes(bench: Bench) -> None:
    job = bench.train("--nodes=2", "--cpus-per-task=1", "--time=10", flags=["--run_id=two"])
    bench.wait(job)
    assert bench.status("two")["status"] == "completed", bench.logs()
    facts = json.loads((bench.run_folder("two") / "run.json").read_text())
    assert facts["world_size"] == 2


def test_a_job_that_gets_some_variables_only(bench: Bench) -> None:
    """The run gets those, and what the templates set besides."""
    export = f"--export={','.join(SETTINGS)}"
    bench.wait(bench.train(export, "--time=10", flags=["--run_id=some", "--max_steps=2"]))
    assert bench.status("some")["status"] == "completed", bench.logs()


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, cluster: Cluster, tiny_encoder: Path, tiny_data: Path
) -> dict[str, Any]:
    """What a long run ends with when nothing happens to it."""
    bench = Bench(tmp_path_factory.mktemp("whole"), cluster, tiny_encoder, tiny_data)
    bench.wait(bench.train("--cpus-per-task=1", flags=[*LONG, "--run_id=long"]))
    assert bench.status("long")["status"] == "completed", bench.logs()
    return result_of(bench.run_folder("long"))


def hurt_warning(bench: Bench, job: str) -> None:
    bench.cluster.ask("scancel", "--batch", "--signal=USR2", job)


def hurt_preemption(bench: Bench, job: str) -> None:
    """A job of the higher partition takes both nodes for a moment."""
    options = ("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null")
    bench.cluster.ask("sbatch", *options, "--wrap=sleep 3")


def hurt_requeue(bench: Bench, job: str) -> None:
    bench.cluster.ask("scontrol", "requeue", job)


def hurt_node(bench: Bench, job: str) -> None:
    """The node dies with all that runs on it; SLURM notices after SlurmdTimeout."""
    node = bench.cluster.node_of(job)
    bench.cluster.kill_node(node, [process.pid for process in bench.processes()])
    bench.cluster.wait_for(lambda: bench.has_restarted(), 120)
    bench.cluster.start_node(node)


@pytest.mark.parametrize("hurt", [hurt_warning, hurt_preemption, hurt_requeue, hurt_node])
def test_interrupted_and_goes_on(bench: Bench, uninterrupted: dict[str, Any], hurt: Any) -> None:
    job = bench.train("--cpus-per-task=1", "--time=10", flags=[*LONG, "--run_id=long"])
    bench.cluster.wait_for(lambda: bench.has_logged("long", 20))
    hurt(bench, job)
    bench.wait(job, 240)
    assert bench.status("long")["status"] == "completed", bench.logs()
    assert "Going on after step" in bench.logs()
    is_asked = hurt in (hurt_warning, hurt_preemption, hurt_requeue)
    assert ("stopped after step" in bench.logs()) == is_asked, "saved, not killed in the middle"
    assert result_of(bench.run_folder("long")) == uninterrupted


def test_walltime(bench: Bench, uninterrupted: dict[str, Any]) -> None:
    """The run pauses in the middle until its time is nearly up, which SLURM notices every 30 s only.

    A start that is asked before it has come so far goes on the next time. SLURM asks after 10 to 40 s.
    """
    options = ("--cpus-per-task=1", "--time=1", "--signal=B:USR2@50")
    fault = {"TOOLKIT_FAULT": "stop@data:0:100"}
    job = bench.train(*options, flags=[*LONG, "--run_id=long"], **fault)
    bench.cluster.wait_for(lambda: bench.let_go_on(job, asked_within=42), 300)
    bench.wait(job, 300)
    assert bench.status("long")["status"] == "completed", bench.logs()
    assert "to be queued again (1 of at most 20 times)" in bench.logs()
    assert result_of(bench.run_folder("long")) == uninterrupted


def test_requeues_are_capped_and_cancelled_runs_stay_so(bench: Bench) -> None:
    job = bench.train("--cpus-per-task=1", flags=[*LONG, "--run_id=long"], MAX_REQUEUES="0")
    bench.cluster.wait_for(lambda: bench.has_logged("long", 10))
    hurt_warning(bench, job)
    bench.wait(job)
    assert bench.status("long")["status"] == "preempted"
    job = bench.train("--cpus-per-task=1", flags=[*LONG, "--run_id=long"])
    bench.cluster.wait_for(lambda: bench.status("long")["status"] == "running")
    time.sleep(3)
    bench.cluster.ask("scancel", job)
    bench.wait(job)
    assert bench.status("long")["status"] == "preempted", bench.logs()


def test_a_failed_task_is_retried_alone(bench: Bench) -> None:
    """Submitted by hand, and it crashes; `submit` leaves it alone, until `--retry_failed`."""
    fault = {"TOOLKIT_FAULT": "raise@optimizer:0:7"}
    job = bench.by_hand("--array=2", "--begin=now+5", **fault)
    assert "1 queued, 3 waiting" in bench.sweep("status")
    bench.wait(job)
    line = bench.sweep("status").splitlines()[2]
    assert "crashed" in line
    assert "injected" in Path(line.partition("(log ")[2].rstrip(")")).read_text()
    said = bench.sweep("submit", "--cpus-per-task=1")
    assert "Submitted 3 of 4" in said
    bench.wait(said.split("array ")[1].split()[0])
    assert "1 failed, 3 completed" in bench.sweep("status"), bench.logs()
    said = bench.sweep("submit", "--retry_failed", "--cpus-per-task=1")
    assert "Submitted 1 of 4" in said
    bench.wait(said.split("array ")[1].split()[0])
    assert "4 completed" in bench.sweep("status"), bench.logs()
    assert bench.logs().count("Going on after step 0") == 0


def test_a_daemon_that_dies_and_comes_back(bench: Bench, uninterrupted: dict[str, Any]) -> None:
    """The run does not notice."""
    job = bench.train("--cpus-per-task=1", "--time=10", flags=[*LONG, "--run_id=long"])
    bench.cluster.wait_for(lambda: bench.has_logged("long", 20))
    node = bench.cluster.node_of(job)
    bench.cluster.kill_node(node, [])
    time.sleep(2)
    bench.cluster.start_node(node)
    bench.wait(job, 240)
    assert bench.status("long")["status"] == "completed", bench.logs()
    assert not bench.has_restarted()
    assert result_of(bench.run_folder("long")) == uninterrupted


HOSTILE = "a b;touch MARK $(touch MARK) `touch MARK` '\" | > MARK * ${HOME} %s \\ é"
KEYS = {"WANDB_API_KEY": "c7" * 20, "HF_TOKEN": "hf_canaryCANARYcanary"}


def test_hostile_values_and_secrets(bench: Bench, tiny_data: Path) -> None:
    """Values reach the trainer as they are and no shell; keys are in no log, script or run folder."""
    data = bench.folder / HOSTILE
    shutil.copytree(tiny_data, data)
    bench.fixed |= {"dataset": str(data), "experiment": HOSTILE, "track": "wandb"}
    bench.write(bench.runs, {"head": ["v1"]})
    extra = ["--wandb.group=x;touch MARK", "--wandb.project=$(touch MARK)"]
    said = bench.sweep("submit", "--chdir", str(bench.folder), *extra, **KEYS)
    job = said.split("array ")[1].split()[0]
    assert "queued" in bench.sweep("status", *extra)
    bench.wait(job)
    assert "1 completed" in bench.sweep("status", *extra), bench.logs()
    [summary] = bench.runs.glob("*/summary.json")
    settings = yaml.safe_load((summary.parent / "config.yaml").read_text())
    assert (settings["experiment"], settings["dataset"]) == (HOSTILE, str(data))
    assert not list(bench.folder.rglob("MARK"))
    files = [path for path in bench.folder.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert any(path.suffix == ".wandb" for path in files)
    for path in files:
        assert not any(key.encode() in path.read_bytes() for key in KEYS.values()), path


def add_sweep(bench: Bench, server: Any, launch: str, heads: list[str]) -> str:
    """Make a sweep of long runs; return its name for an agent."""
    flags = [flag for flag in bench.flags if "epochs" not in flag and "track" not in flag]
    command = ["accelerate", "launch", "--config_file", str(ROOT / "launch" / f"{launch}.yaml")]
    command += ["${program}", *flags, f"--output_dir={bench.runs}", "${args}"]
    content = {"program": str(ROOT / "toolkit" / "train.py"), "command": command}
    cells = [{"head": head, "epochs": 40} for head in heads]
    sweep = server.add_sweep(content | {"method": "grid", "parameters": {}}, cells)
    return f"{ENTITY}/{PROJECT}/{sweep}"


def check_interrupted_once(bench: Bench, runs: list[Any]) -> None:
    """All runs are finished, one of them in two starts; each has every step once."""
    assert {run.state for run in runs} == {"finished"}, bench.logs()
    assert sorted(run.starts for run in runs) == [1] * (len(runs) - 1) + [2]
    assert bench.logs().count("Going on after step") == 1, bench.logs()
    journals = bench.journals()
    assert len(journals) == len(runs)
    for journal in journals:
        rows = [json.loads(line) for line in journal.read_text().splitlines()]
        steps = [row["step"] for row in rows if row["kind"] == "train"]
        assert steps == [*range(1, len(steps) + 1)]
    assert "c7" * 20 not in bench.logs()


def test_agents(bench: Bench) -> None:
    """Two agents of an array; one is asked to stop, queues again, and the run goes on."""
    with serving() as (server, url):
        sweep = add_sweep(bench, server, "cpu2", ["v1", "v3"])
        key = {"WANDB_MODE": "online", "WANDB_BASE_URL": url, "WANDB_API_KEY": "c7" * 20}
        job = bench.agents(sweep, "--array=1-2", **key)
        bench.cluster.wait_for(bench.has_begun)
        bench.cluster.ask("scancel", "--batch", "--signal=USR2", f"{job}_1")
        bench.wait(job, 240)
        runs = list(server.runs.values())
    check_interrupted_once(bench, runs)
    assert bench.logs().count("Interrupted: to be queued again (1 of at most 20 times)") == 1


@pytest.mark.parametrize("hurt", [hurt_preemption, hurt_requeue])
def test_an_agent_that_slurm_interrupts(bench: Bench, hurt: Any) -> None:
    """It dies of SIGTERM at once, and so does a launcher of one process; the trainer saves."""
    with serving() as (server, url):
        sweep = add_sweep(bench, server, "cpu", ["v1"])
        key = {"WANDB_MODE": "online", "WANDB_BASE_URL": url, "WANDB_API_KEY": "c7" * 20}
        job = bench.agents(sweep, "--array=1", **key)
        bench.cluster.wait_for(bench.has_begun)
        hurt(bench, job)
        bench.wait(job, 240)
        runs = list(server.runs.values())
    check_interrupted_once(bench, runs)
    assert "stopped after step" in bench.logs(), "saved, not killed in the middle"
