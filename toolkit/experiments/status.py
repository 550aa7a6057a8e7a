"""Which runs there are, and how each of them stands: the command to come back to the next morning."""

import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from toolkit.console import complain, say
from toolkit.errors import ConfigError
from toolkit.experiments import slurm
from toolkit.experiments.arguments import parser, read
from toolkit.experiments.states import ALL_KINDS, read_state
from toolkit.experiments.sweep import runs_folder


@dataclass(frozen=True)
class Listed:
    """A run folder, and what a command calls it."""

    folder: Path
    label: str = ""
    index: int | None = None
    """Its place in the grid."""

    def name(self, width: int) -> str:
        """Return the beginning of its line."""
        number = "" if self.index is None else f"{self.index:>4}  "
        return f"{number}{self.folder.name:<14}  {self.label:<{width}}".rstrip()


@dataclass(frozen=True)
class Listing:
    """The runs that a command was asked about."""

    words: str
    """Sweep file and flags, or the folder: to be typed again."""
    folder: Path
    runs: list[Listed]
    method: str | None = None
    """How the sweep chooses its runs; None: a folder was given."""


def list_runs(command: str, doc: str | None, argv: list[str]) -> Listing:
    """Return the runs of a sweep file, or all that a folder holds.

    Those of a search are what lies in its folder: nobody knows the others.
    """
    made = parser(command, doc)
    place = made.parse_known_args(argv)[0].file
    if place.is_dir():
        if argv[1:]:
            raise ConfigError([f"{token} only goes with a sweep file" for token in argv[1:]])
        return Listing(shlex.quote(str(place)), place.absolute(), _found_in(place))
    asked = read(made, argv)
    words, method = shlex.join([str(place), *asked.extra]), asked.sweep.method
    if method != "grid":
        folder = runs_folder(asked.sweep, asked.extra).absolute()
        return Listing(words, folder, _found_in(folder), method)
    runs = asked.runs()
    listed = [Listed(run.folder, run.label, run.index) for run in runs]
    return Listing(words, runs[0].folder.parent.absolute(), listed, method)


def _found_in(folder: Path) -> list[Listed]:
    found = sorted(path.parent for path in folder.glob("*/status.json"))
    return [Listed(path) for path in found if ".old-" not in path.name]


def status(argv: list[str]) -> int:
    """Show how every run of a sweep, or of a folder, stands."""
    listing = list_runs("status", status.__doc__, argv)
    sweep, queued = Path(shlex.split(listing.words)[0]).stem, _queued()
    width = max((len(each.label) for each in listing.runs), default=0)
    counts: Counter[str] = Counter()
    for each in listing.runs:
        state, task = read_state(each.folder), queued.get(each.folder.resolve())
        kind, text = str(state.kind), state.describe()
        if task and kind not in ("running", "completed"):
            kind, text = "queued", "  ".join(filter(None, [task.describe(), text]))
        elif kind == "waiting":
            text = _why_not_begun(sweep, each)
        counts[kind] += 1
        say(f"{each.name(width):<{width + 22}}  {kind:<9}  {text}".rstrip())
    order = [kind for kind in ("queued", *ALL_KINDS) if counts[kind]]
    summary = ", ".join(f"{counts[kind]} {kind}" for kind in order)
    say(f"{len(listing.runs)} runs in {listing.folder}" + (f": {summary}" if summary else ""))
    for line in _what_next(listing, counts):
        say(line)
    return 0


def _why_not_begun(sweep: str, listed: Listed) -> str:
    """Name what the last start printed, if there was one: there is no run folder yet."""
    logs = listed.folder.parent / "logs"
    found = [*logs.glob(f"{sweep}_*_{listed.index}.out"), *logs.glob(f"{listed.folder.name}.log")]
    newest = max(found, key=lambda path: path.stat().st_mtime, default=None)
    if not newest:
        return ""
    return f"its last start has not begun its run, or ended before it did  (log {newest})"


def _what_next(listing: Listing, counts: Counter[str]) -> Iterator[str]:
    """Say what to type, for the kinds that occur."""
    command, words = "python -m toolkit sweep", listing.words
    is_grid = listing.method == "grid"
    starts = f"{command} run {words}" + (
        ", or submit instead of run" if is_grid else " --search optuna"
    )
    open_kinds = [kind for kind in ("waiting", "preempted", "lost") if counts[kind]]
    over = [kind for kind in ("failed", "stopped") if counts[kind]]
    if listing.method and open_kinds:
        yield f"to start what is {' or '.join(open_kinds)}: {starts}"
    if is_grid and over:  # a search proposes other values instead
        yield f"to start what has {' or was '.join(over)}, too: the same with --retry_failed"
    if counts["completed"]:
        yield f"to compare what is completed: {command} results {words}"


def _queued() -> dict[Path, slurm.Task]:
    try:
        return slurm.queue()
    except slurm.SlurmError as error:  # what the run folders say is worth showing
        complain(f"warning: which runs are queued is not known: {str(error).splitlines()[-1]}")
        return {}
