"""Rules that hold for the repository as a whole. Each says how many things it looked at."""

import ast
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from tests.programs import ROOT, run_python
from toolkit.config import FIELDS, parse
from toolkit.data.sources import DATASETS

PACKAGE = ROOT / "toolkit"
BASE = {"errors", "console", "files", "assets", "stop", "redact"}
MAY_IMPORT = {
    "errors": set(),
    "redact": set(),
    "console": {"redact"},
    "files": set(),
    "assets": BASE,
    "imports": set(),
    "scheduler": set(),
    "reaper": set(),
    "stop": {"errors", "scheduler"},
    "restart": {"console", "scheduler", "stop"},
    "config": {"errors", "console", "redact"},
    "machine": set(),
    "launcher": {"errors", "config"},
    "data": BASE,
    "model": BASE,
    "record": BASE | {"machine"},
    "engine": BASE | {"data", "machine", "model", "record", "restart"},
    "prepare": BASE | {"config", "data", "model"},
    "saving": BASE | {"config", "engine", "record"},
    "build": {"config", "data", "engine", "errors", "model"},
    "predict": {"build", "config", "data", "engine", "errors", "model", "record"},
    "run": BASE
    | {"build", "config", "data", "model", "engine", "record", "prepare", "restart", "saving"},
    "train": BASE
    | {"config", "data", "imports", "launcher", "record", "prepare", "restart", "run"},
    "experiments": BASE | {"config", "data", "machine", "record", "scheduler"},
    "ranks": {"console"},
    "plan": BASE
    | {"build", "config", "data", "engine", "experiments", "imports", "model", "prepare", "ranks"},
    "rehearsal": {"build", "config", "engine", "imports", "model", "prepare", "ranks"},
    "hello": {"engine", "ranks"},
    "doctor": {"config", "console", "machine", "model", "ranks", "record"},
    "__main__": {"console"},
    "__init__": set(),
}
"""Parts of the package -> the parts that they may know."""
ONE_SEAM = {
    "accelerate": "engine/runtime.py",
    "deepspeed": "engine/zero.py",
    "print": "console.py",
}


def modules() -> list[Path]:
    found = sorted(PACKAGE.rglob("*.py"))
    assert len(found) >= 38
    return found


def imported(path: Path) -> set[str]:
    """Return the full names that a module imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def part(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def test_imports_go_one_way() -> None:
    for path in modules():
        for name in imported(path):
            if name.startswith("toolkit."):
                target = name.split(".")[1]
                if target in MAY_IMPORT:
                    assert target in MAY_IMPORT[part(path)] | {part(path)}, f"{path} imports {name}"


@pytest.mark.parametrize(("library", "place"), ONE_SEAM.items())
def test_one_seam(library: str, place: str | None) -> None:
    if library == "print":
        pattern = re.compile(r"(?<![\w.])print\(")
        users = {str(p.relative_to(PACKAGE)) for p in modules() if pattern.search(p.read_text())}
    else:
        users = {
            str(p.relative_to(PACKAGE))
            for p in modules()
            if any(name.split(".")[0] == library for name in imported(p))
        }
    assert users == ({place} if place else set())


def test_light_modules_import_no_torch() -> None:
    light = [
        ".".join(("toolkit", *path.relative_to(PACKAGE).with_suffix("").parts))
        for path in modules()
        if part(path) in {"config", "data", "record", "prepare", "train", "__main__", "assets"}
    ]
    light = [name.removesuffix(".__init__") for name in light]
    assert len(light) >= 22
    code = f"""
import importlib, sys
for name in {light!r}:
    importlib.import_module(name)
print(sorted({{"torch", "transformers", "datasets", "accelerate", "wandb", "pandas"}} & set(sys.modules)))
"""
    done = run_python("-c", code)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_nothing_happens_at_import() -> None:
    """Top-level statements define; the only call statement is the script bootstrap."""
    for path in modules():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                raise AssertionError(f"{path}:{node.lineno} calls something at import time")


def test_no_file_of_ours_shadows_a_library_for_the_script() -> None:
    """`toolkit/` comes first on sys.path when train.py is started by path; the script undoes that."""
    code = """
import os, runpy, sys
sys.argv = ["train.py", "--lr=-1"]
sys.path[0] = os.path.dirname(PATH)  # as Python does for a script
try:
    runpy.run_path(PATH, run_name="__main__")
except SystemExit:
    pass
assert not [p for p in sys.path if p.rstrip("/").endswith("/toolkit")], sys.path
"""
    done = run_python("-c", code.replace("PATH", repr(str(PACKAGE / "train.py"))))
    assert done.returncode == 0, done.stderr
    assert "lr got -1" in done.stderr


def test_launch_configs_load_strictly() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    configs = sorted((ROOT / "launch").glob("*.yaml"))
    stages = ("zero1", "zero2", "zero2_offload", "zero3")
    zero = {f"{name}{nodes}" for name in stages for nodes in ("", "_nodes")}
    assert {path.stem for path in configs} == {"cpu", "cpu2", "gpu", "ddp", "ddp_nodes", *zero}
    for path in configs:
        config = load_config_from_file(str(path))
        assert config.num_machines == (2 if path.stem.endswith("_nodes") else 1)
        assert config.mixed_precision is None, "precision is the run's own setting"
        allowed = {"zero_stage", "offload_optimizer_device", "deepspeed_multinode_launcher"}
        assert set(config.deepspeed_config) <= allowed


def test_run_configs_load_strictly() -> None:
    configs = sorted((ROOT / "configs" / "runs").rglob("*.yaml"))
    assert len(configs) >= 7
    for path in configs:
        config = parse([f"--config={path}"])
        written = yaml.safe_load(path.read_text())
        assert all(getattr(config, name) == value for name, value in written.items())


def test_shell_scripts_parse() -> None:
    slurm = [path for path in sorted((ROOT / "slurm").iterdir()) if path.is_file()]
    scripts = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / ".ci" / "run", *slurm]
    assert len(scripts) == 10
    for script in scripts:
        subprocess.run(["bash", "-n", script], check=True)
        if shutil.which("shellcheck") or os.environ.get("CI"):  # continuous integration installs it
            subprocess.run(["shellcheck", script], check=True)
        is_sourced = script.name == "supervise.sh"
        assert is_sourced or script.stat().st_mode & 0o111, f"{script} is not executable"


def links_of(document: Path) -> list[Path]:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)\)", document.read_text())
    return [document.parent / link for link in links]


def test_documents_link_to_what_is_there() -> None:
    documents = [ROOT / "README.md", *sorted((ROOT / "tests" / "bench").glob("*.md"))]
    links = [link for document in documents for link in links_of(document)]
    assert len(documents) == 4
    assert len(links) >= 12
    assert [link for link in links if not link.exists()] == []


def test_readme_names_real_things() -> None:
    text = (ROOT / "README.md").read_text()
    files = re.findall(r"(?:launch|configs|toolkit)/[\w/]+\.(?:sh|yaml|py)", text)
    assert len(set(files)) >= 8
    assert all((ROOT / name).exists() for name in files)
    flags = set(re.findall(r"--([a-z][a-z_]+)", text)) - {"config_file", "num_processes", "help"}
    flags -= {"cpu", "config", "print_config", "launch", "launches"}
    flags -= {"jobs", "throttle", "rate", "retry_failed", "search", "sampler", "trials"}  # of sweep
    flags -= {"array", "gpus", "time"}  # of sbatch
    flags -= {"tflops", "memory_gb", "link_gb", "price"}  # of plan
    assert len(flags) >= 15
    assert flags <= set(FIELDS), flags - set(FIELDS)
    assert all(f"`{name}`" in text for name in DATASETS)


def test_ci_calls_the_readme_test_command() -> None:
    assert "bash launch/test.sh" in (ROOT / "README.md").read_text()
    assert "bash launch/test.sh" in (ROOT / ".ci" / "run").read_text()


def test_pins_cover_every_dependency_at_or_above_its_floor() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    pins = dict(
        line.lower().replace("_", "-").split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    assert len(wanted) >= 20
    for text in wanted:
        requirement = Requirement(text)
        pinned = pins[requirement.name.lower().replace("_", "-")]
        assert requirement.specifier.contains(pinned), f"{text} is pinned to {pinned}"


def test_nobody_loads_pickles_or_remote_code() -> None:
    banned = re.compile(
        r"torch\.load\(|import pickle|pickle\.|trust_remote_code|weights_only=False"
    )
    for path in modules():
        hits = [m for m in banned.findall(path.read_text()) if m]
        assert not hits, f"{path}: {hits}"
