"""W&B as a mirror of the journal: it may be absent, slow or down, and the run goes on."""

import configparser
import json
import netrc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

from toolkit.console import complain


class Backend(Protocol):
    """What we need of Accelerate's tracker."""

    run: Any
    """W&B's own run."""

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        """Send one row."""


class Tracker:
    """Mirrors rows to a backend, or to nothing. The first failure is reported and ends it."""

    def __init__(self, start: Callable[[], Backend] | None = None) -> None:
        self.backend: Backend | None = None
        self.is_cut_off = False
        """W&B's own process is gone. SLURM signals all processes of a job, and that one leaves at once,
        while we save."""
        if start is not None:
            self.backend = self._guard(start)

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Mirror one row; `global_step` is the axis, because W&B's own step only grows."""
        if self.backend is not None:
            backend = self.backend
            self._guard(lambda: backend.log(values | {"global_step": step}))

    def finish(self, exit_code: int = 0, *, preempted: bool = False) -> None:
        """End the mirrored run; W&B gives a preempted one that failed to the next agent."""
        if self.backend is None:
            return
        run, self.backend = self.backend.run, None
        if preempted:
            self._guard(run.mark_preempting)
        self._guard(lambda: run.finish(exit_code=exit_code))

    def _guard(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:  # a mirror must not end the run, whatever breaks in it
            complain(
                f"W&B failed and is off for the rest of this run: {type(error).__name__}: {error}"
            )
            self.backend = None
            self.is_cut_off |= isinstance(error, ConnectionError)
            return None


def replay(journal: Path, arguments: dict[str, Any], config: dict[str, Any]) -> None:
    """Send what a completed run has in its journal to a new W&B run.

    A sweep that is made anew has new runs, and the same settings are the same run here: it is not
    trained again, but the sweep waits for its metrics.
    """
    with _mirroring():
        import wandb

        run = wandb.init(config=config, **arguments)
        run.define_metric("*", step_metric="global_step")
        for line in journal.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            values = {name: value for name, value in row.items() if "/" in name}
            run.log(values | {"global_step": row["step"]})
        run.finish()


def give_back(arguments: dict[str, Any]) -> None:
    """Let W&B give an interrupted run to another agent, if its tracker could not say so."""
    with _mirroring():
        import wandb

        with suppress(ConnectionError):
            wandb.teardown()  # forgets a process of W&B's that is gone
        run = wandb.init(**arguments)
        run.mark_preempting()
        run.finish(exit_code=1)


@contextmanager
def _mirroring() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a mirror must not end the run, whatever breaks in it
        complain(f"W&B failed: {type(error).__name__}: {error}")


def wandb_arguments(options: dict[str, Any], run_id: str, folder: Path) -> dict[str, Any]:
    """Return the arguments of `wandb.init`, its own variables that name places taking precedence."""
    return {
        "project": os.environ.get("WANDB_PROJECT") or options["project"],
        "entity": os.environ.get("WANDB_ENTITY") or options["entity"],
        "group": os.environ.get("WANDB_RUN_GROUP") or options["group"],
        "tags": options["tags"],
        "id": _agent_run_id() or run_id,
        "name": run_id,
        "resume": "allow",
        "dir": str(folder),
        "mode": wandb_mode(),
        # keeps it from holding up a run, and quiet. When the server has gone meanwhile, the end takes
        # 12 s more than its limit (wandb 0.31.0), and may take 30
        "settings": {"init_timeout": 15, "finish_timeout": 12, "console": "off", "quiet": True},
    }


def is_agents_run() -> bool:
    """Tell whether a W&B agent started this run."""
    return bool(os.environ.get("WANDB_SWEEP_ID"))


def _agent_run_id() -> str | None:
    """Return the id that a W&B agent gave, under which its sweep knows the run."""
    return os.environ.get("WANDB_RUN_ID") if is_agents_run() else None


def wandb_mode() -> str:
    """Return "online" when there is a key, else "offline": never a prompt."""
    return os.environ.get("WANDB_MODE") or ("online" if has_wandb_key() else "offline")


def wandb_url() -> str:
    """Return the address of W&B's server: the environment's, or what `wandb login --host` noted."""
    noted = configparser.ConfigParser()
    folder = os.environ.get("WANDB_CONFIG_DIR") or Path.home() / ".config" / "wandb"
    with suppress(configparser.Error):
        noted.read(Path(folder, "settings"))
    ours = os.environ.get("WANDB_BASE_URL")
    return str(ours or noted.get("default", "base_url", fallback="https://api.wandb.ai"))


def has_wandb_key() -> bool:
    """Tell whether there is a key for W&B's server, in the environment or in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(wandb_url()).hostname
    place = os.environ.get("NETRC") or str(Path.home() / ".netrc")  # named: else modes are checked
    try:
        return bool(host and netrc.netrc(place).authenticators(host))
    except (OSError, netrc.NetrcParseError):
        return False
