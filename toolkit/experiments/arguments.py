"""What the commands of `python -m toolkit sweep` are given: a file, options, settings of its runs."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from toolkit.config import FIELDS
from toolkit.console import say
from toolkit.errors import ConfigError
from toolkit.experiments import sweep as sweeps


@dataclass(frozen=True)
class Request:
    """What a command was asked for."""

    options: argparse.Namespace
    sweep: sweeps.Sweep
    extra: list[str]
    """Settings that hold for every run, each as one `--name=value`."""
    others: list[str]
    """What is neither an option of the command nor a setting of a run."""

    @property
    def file(self) -> Path:
        """The sweep file."""
        return self.sweep.path

    def runs(self) -> list[sweeps.Run]:
        """List the sweep's runs.

        Raises:
            ConfigError: naming everything that is wrong with them.
        """
        return sweeps.runs(self.sweep, self.extra)


def parser(command: str, doc: str | None) -> argparse.ArgumentParser:
    """Make the parser of a command."""
    made = argparse.ArgumentParser(f"toolkit sweep {command}", description=doc, allow_abbrev=False)
    made.add_argument("file", type=Path, help="sweep file in W&B's format")
    return made


def read(made: argparse.ArgumentParser, argv: list[str], *, with_others: bool = False) -> Request:
    """Parse a command's arguments and read the sweep file.

    Raises:
        ConfigError: when the file is no sweep; or a flag is unknown, unless others are wanted.
    """
    options, unknown = made.parse_known_args(argv)
    extra, others = split_flags(unknown)
    if not options.file.exists() and any(word.endswith((".yaml", ".yml")) for word in unknown):
        raise ConfigError(
            [f"{options.file} is no sweep file: the file comes first, options after it"]
        )
    if others and not with_others:
        raise ConfigError([f"{token} is unknown to {made.prog}" for token in others])
    return Request(options, sweeps.load(options.file), extra, others)


def refuse_overwrite(request: Request) -> None:
    """Refuse a flag that would do nothing: what is complete is not started.

    Raises:
        ConfigError: when it is given.
    """
    if any(flag.partition("=")[0] == "--overwrite" for flag in request.extra):
        again = "python -m toolkit train --config RUN_FOLDER/config.yaml --overwrite"
        raise ConfigError(
            [f"--overwrite: a sweep starts what is missing alone; to train one run again: {again}"]
        )


def note_what_is_ignored(request: Request) -> None:
    """Say that a grid's runs are all trained to their end."""
    if request.sweep.early_terminate:
        say(
            f"early_terminate of {request.file} is for W&B agents and --search: no run is cut short here"
        )


def split_flags(unknown: list[str]) -> tuple[list[str], list[str]]:
    """Tell settings of a run from the rest; each setting comes back as one `--name=value`."""
    ours: list[str] = []
    rest: list[str] = []
    position = 0
    while position < len(unknown):
        token, position = unknown[position], position + 1
        name, equals, value = token[2:].partition("=")
        name = name.replace("-", "_")
        if not token.startswith("--") or name.partition(".")[0] not in {*FIELDS, "config"}:
            rest.append(token)
            continue
        if not equals and position < len(unknown) and not unknown[position].startswith("--"):
            equals, value, position = "=", unknown[position], position + 1
        ours.append(f"--{name}{equals}{value}")
    return ours, rest
