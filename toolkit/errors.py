"""The errors that a user can cause, each with the status that goes into `status.json`."""


class ToolkitError(Exception):
    """A failure with a known outcome: printed without a traceback and recorded."""

    status = "crashed"
    exit_code = 1


class ProblemsError(ToolkitError):
    """Several problems found together, so that a user mends them in one go."""

    title = "problems"

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        noun = "problem" if len(problems) == 1 else "problems"
        lines = "\n".join(f"  - {problem}" for problem in problems)
        super().__init__(f"{len(problems)} {noun} {self.title}:\n{lines}")


class ConfigError(ProblemsError):
    """The configuration cannot be run as it stands."""

    title = "in the configuration"
    status = "config_error"
    exit_code = 2


class DataError(ProblemsError):
    """The data set (or the encoder) is absent or holds rows that cannot be used."""

    title = "with the data"
    status = "data_error"
    exit_code = 3


class DivergedError(ToolkitError):
    """Too many steps had a loss or a gradient that is not finite."""

    status = "diverged"
    exit_code = 4


class CheckpointError(ToolkitError):
    """A checkpoint cannot be written or read."""

    status = "io_error"
    exit_code = 5


class Preempted(ToolkitError):
    """Asked to stop: everything that was done is saved, and the same command goes on."""

    status = "preempted"
    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again

    def __init__(self, step: int | None = None) -> None:
        where = "as asked" if step is None else f"after step {step}, which is saved"
        super().__init__(f"stopped {where}; the same command goes on from there")
