"""A sweep file, in W&B's own format, as an ordered list of runs with stable ids; starts nothing.

    program: toolkit/train.py
    method: grid
    metric: {name: eval/f1, goal: maximize}
    command: [accelerate, launch, --config_file, launch/cpu.yaml, "${program}", "${args}"]
    parameters:
      output_dir: {value: runs/heads}
      head: {values: [v1, v2, v3]}
      lr: {values: [2.0e-5, 5.0e-5]}

`wandb sweep` takes the same file. A run gets the arguments that W&B's agent would give it, in the
same form, and its id follows from what they mean: so it does not matter who starts it.
"""

import itertools
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit import strict_yaml
from toolkit.config import RunConfig, parse
from toolkit.errors import ConfigError

METHODS = ("grid", "random", "bayes", "custom")
KEYS = {
    *("method", "parameters", "program", "command", "metric", "name", "description"),
    *("project", "entity", "early_terminate", "run_cap", "job", "image_uri", "metrics"),
    *("controller", "scheduler", "apiVersion", "kind"),
}
"""The keys that W&B's schema has at the top of a sweep; it refuses others, and so do we."""
TEXTS = ("program", "name", "description", "project", "entity", "job", "image_uri")
DEFAULT_COMMAND = ["${env}", "${interpreter}", "${program}", "${args}"]
ENVIRONMENT = re.compile(r"\$\{envvar:([A-Z0-9_]*)\}")
MAX_RUNS = 100_000
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Sweep:
    """What a sweep file says."""

    path: Path
    method: str
    program: str
    command: list[str]
    parameters: dict[str, Any]
    metric: str
    maximize: bool
    early_terminate: dict[str, Any] | None
    run_cap: int | None


@dataclass(frozen=True)
class Run:
    """One run of a sweep."""

    index: int
    """Its place in the grid, counted from 0: the task of a SLURM array."""
    values: dict[str, Any]
    """The parameters that differ between runs."""
    flags: list[str]
    """What follows the program on the command line."""
    command: list[str]
    """The whole command line, as W&B's agent would start it."""
    config: RunConfig

    @property
    def run_id(self) -> str:
        """Name of the run folder."""
        assert self.config.run_id
        return self.config.run_id

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.config.folder

    @property
    def label(self) -> str:
        """What tells this run from the others: `head=v1 lr=2e-05`."""
        return " ".join(f"{name}={_short(value)}" for name, value in self.values.items())


def load(path: Path) -> Sweep:
    """Read a sweep file.

    Raises:
        ConfigError: naming everything that is wrong with it.
    """
    try:
        _, content = strict_yaml.read(path)
    except ValueError as error:
        raise ConfigError([f"sweep file {path} {error}"]) from error
    problems = [f"{path}: {problem}" for problem in _problems(content)]
    if problems:
        raise ConfigError(problems)
    metric = content.get("metric", {"name": "eval/f1", "goal": "maximize"})
    return Sweep(
        path=path,
        method=content["method"],
        program=content.get("program", "toolkit/train.py"),
        command=[str(token) for token in content.get("command", DEFAULT_COMMAND)],
        parameters=content["parameters"],
        metric=metric.get("name", "eval/f1"),
        maximize=metric.get("goal", "minimize") == "maximize",  # W&B's default
        early_terminate=content.get("early_terminate"),
        run_cap=content.get("run_cap"),
    )


def _problems(content: dict[str, Any]) -> Iterator[str]:
    for key in content.keys() - KEYS:
        yield f"{key} is no key of a sweep; allowed are {', '.join(sorted(KEYS))}"
    if content.get("method") not in METHODS:
        yield f"method got {content.get('method')!r}, allowed is one of {', '.join(METHODS)}"
    for key in TEXTS:
        if key in content and not isinstance(content[key], str):
            yield f"{key} got {content[key]!r}, allowed is text"
    cap = content.get("run_cap", 1)
    if isinstance(cap, bool) or not isinstance(cap, int) or cap < 1:
        yield f"run_cap got {cap!r}, allowed is a whole number of 1 or more"
    stops = content.get("early_terminate", {"type": "hyperband"})
    if not isinstance(stops, dict) or stops.get("type") != "hyperband":
        yield f"early_terminate got {stops!r}, allowed is {{type: hyperband, min_iter: 3, eta: 3}}"
    command = content.get("command", DEFAULT_COMMAND)
    if not isinstance(command, list) or "${program}" not in command or "${args}" not in command:
        yield 'command must be a list of single words with "${program}" and "${args}" among them'
    metric = content.get("metric", {})
    if (
        not isinstance(metric, dict)
        or not isinstance(metric.get("name", ""), str)
        or metric.get("goal", "maximize") not in ("maximize", "minimize")
    ):
        yield f"metric got {metric!r}, allowed is {{name: eval/f1, goal: maximize or minimize}}"
    parameters = content.get("parameters")
    if not isinstance(parameters, dict) or not parameters:
        yield "parameters is missing or empty"
        return
    for name, parameter in parameters.items():
        yield from _parameter_problems(name, parameter)


def _parameter_problems(name: str, parameter: Any) -> Iterator[str]:
    place = f"parameters.{name}"
    if not isinstance(parameter, dict) or not parameter:
        yield f"{place} got {parameter!r}, allowed is {{value: ...}}, {{values: [...]}}"
        return
    values = parameter.get("values", [None])
    if not isinstance(values, list) or not values:
        yield f"{place}.values got {values!r}, allowed is a list"
    if {"value", "values"} <= parameter.keys():
        yield f"{place} has both value and values, allowed is one of them"
    inner = parameter.get("parameters", {})
    if not isinstance(inner, dict):
        yield f"{place}.parameters got {inner!r}, allowed is a dictionary of parameters"
        return
    bounds = {key: parameter[key] for key in ("min", "max", "q") if key in parameter}
    for key, bound in bounds.items():
        if isinstance(bound, bool) or not isinstance(bound, int | float):
            hint = "; YAML takes 1e-5 for text: write 1.0e-5" if isinstance(bound, str) else ""
            yield f"{place}.{key} got {bound!r}, allowed is a number{hint}"
            return
    if ("min" in bounds) != ("max" in bounds) or bounds.get("min", 0) > bounds.get("max", 0):
        yield f"{place} got {parameter!r}: it needs min and max, min not above max"
    if parameter.get("distribution") == "int_uniform":
        for key in ("min", "max"):
            if not isinstance(parameter.get(key, 0), int):
                yield f"{place}.{key} got {parameter[key]!r}, allowed is a whole number"
    for key, one in inner.items():
        yield from _parameter_problems(f"{name}.{key}", one)


def runs(sweep: Sweep, extra: list[str]) -> list[Run]:
    """List the runs of a grid, the last parameter varying fastest.

    Args:
        sweep: a sweep whose method is grid.
        extra: flags that every run gets besides, such as `--dataset=amazon_polarity`.

    Raises:
        ConfigError: naming every run that is no valid run, every two that are the same, and the
            folders of runs that would not lie beside each other.
    """
    problems = overridden(sweep, extra)
    extra = [] if problems else extra
    found: dict[str, Run] = {}
    for index, cell in enumerate(_cells(sweep)):
        try:
            run = make_run(sweep, index, cell, extra)
        except ConfigError as error:
            problems += [f"run {index}: {problem}" for problem in error.problems]
            continue
        same = found.setdefault(run.run_id, run)
        if same is not run:
            problems.append(f"runs {same.index} and {index} are the same run, {run.run_id}")
    if problems:
        raise ConfigError(problems)
    folders = sorted({str(run.folder.parent) for run in found.values()})
    if len(folders) > 1:
        hint = "give --output_dir, or set one value for it under parameters"
        raise ConfigError(
            [
                f"{sweep.path}: output_dir got {', '.join(folders)}, allowed is one for all runs; {hint}"
            ]
        )
    return list(found.values())[: sweep.run_cap]


def run_at(sweep: Sweep, index: int, extra: list[str]) -> Run:
    """Return one run of a grid without looking at the others, of which there may be thousands.

    Raises:
        ConfigError: when there is no such run, or it is no valid one.
    """
    if problems := overridden(sweep, extra):
        raise ConfigError(problems)
    for place, cell in enumerate(_cells(sweep)):
        if place == sweep.run_cap:
            break
        if place == index:
            return make_run(sweep, index, cell, extra)
    raise ConfigError([f"{sweep.path}: there is no run {index}; they are counted from 0"])


def overridden(sweep: Sweep, extra: list[str]) -> list[str]:
    """Name the flags of parameters that differ between runs; a flag may replace one that does not."""
    swept = overridden_flags(sweep, extra)
    return [f"{flag}: {sweep.path} varies it from run to run" for flag in swept]


def overridden_flags(sweep: Sweep, extra: list[str]) -> list[str]:
    """Return the flags of parameters that differ between runs."""
    names = {name for name, parameter in sweep.parameters.items() if "value" not in parameter}
    return [flag for flag in extra if flag.partition("=")[0][2:].replace("-", "_") in names]


def make_run(sweep: Sweep, index: int, cell: dict[str, Any], extra: list[str]) -> Run:
    """Make the run of one choice of values.

    Raises:
        ConfigError: when it is no valid run.
    """
    command = list(_expand(sweep.command, sweep.program, cell))
    start = command.index(find(sweep.program)) + 1
    flags = [*command[start:], *extra]
    differ = {name: value for name, value in cell.items() if "value" not in sweep.parameters[name]}
    return Run(index, differ, flags, [*command, *extra], parse(flags, "sweep"))


def runs_folder(sweep: Sweep, extra: list[str]) -> Path:
    """Return where run folders go: by the settings that say so, for others may not be known yet."""
    names = ("output_dir", "config")
    placing = {name: sweep.parameters[name] for name in names if name in sweep.parameters}
    fixed = {name: p["value"] for name, p in placing.items() if "value" in p}
    flags = [flag for flag in extra if flag.partition("=")[0][2:] in names]
    return make_run(sweep, 0, fixed, flags).folder.parent


def _cells(sweep: Sweep) -> Iterator[dict[str, Any]]:
    """Yield the grid's choices of values."""
    if sweep.method != "grid":
        hint = "`sweep run --search optuna` or a W&B agent searches"
        raise ConfigError([f"{sweep.path}: method {sweep.method} has no list of runs; {hint}"])
    problems = []
    choices: dict[str, list[Any]] = {}
    for name, parameter in sweep.parameters.items():
        try:
            choices[name] = list(_choices(name, parameter))
        except ValueError as error:
            problems.append(f"{sweep.path}: {error}")
    count = 1
    for values in choices.values():
        count *= len(values)
    if count > MAX_RUNS:
        problems.append(f"{sweep.path}: {count} runs are more than {MAX_RUNS}")
    if problems:
        raise ConfigError(problems)
    for cell in itertools.product(*choices.values()):
        yield dict(zip(choices, cell, strict=True))


def _choices(name: str, parameter: dict[str, Any]) -> Iterator[Any]:
    """Yield a parameter's values; a parameter with parameters of its own has dictionaries."""
    if "value" in parameter:
        yield parameter["value"]
    elif "values" in parameter:
        yield from parameter["values"]
    elif "parameters" in parameter:
        inner = {
            key: list(_choices(f"{name}.{key}", value))
            for key, value in parameter["parameters"].items()
        }
        for values in itertools.product(*inner.values()):
            yield dict(zip(inner, values, strict=True))
    elif parameter.get("distribution") == "int_uniform" and "min" in parameter:
        yield from range(parameter["min"], parameter["max"] + 1)
    else:
        raise ValueError(f"parameters.{name} got {parameter!r}: a grid needs value or values")


def _expand(command: list[str], program: str, cell: dict[str, Any]) -> Iterator[str]:
    """Fill in a command as W&B's agent does: a macro is a word of its own."""
    flags = [
        f"--{name}={find(value) if name == 'config' else value}" for name, value in cell.items()
    ]
    macros = {
        "${env}": ["/usr/bin/env"],
        "${interpreter}": ["python"],
        "${program}": [find(program)],
        "${args}": flags,
    }
    for token in command:
        yield from macros.get(token, [find(ENVIRONMENT.sub(_variable, token))])


def _variable(found: re.Match[str]) -> str:
    return os.environ.get(found[1], found[1])


def find(path: str) -> str:
    """Let what the repository has be found from any working directory."""
    in_repository = "/" in str(path) and not Path(path).exists() and (ROOT / path).is_file()
    return str(ROOT / path) if in_repository else path


def _short(value: Any) -> str:
    if isinstance(value, str):
        return Path(value).stem if value.endswith((".yaml", ".yml")) else value
    return json.dumps(value) if isinstance(value, dict) else str(value)
