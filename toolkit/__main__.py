"""Command line: `python -m toolkit <command>`.

Commands import what they need when they run, so that `--help` answers at once.
"""

import importlib
import sys

from toolkit.console import complain, say

COMMANDS = {
    "train": ("toolkit.train", "train one classifier in this process"),
    "doctor": ("toolkit.doctor", "is this machine ready? versions, devices, ranks, disk, network"),
    "sweep": ("toolkit.experiments.commands", "many runs: here, on SLURM, or by W&B agents"),
    "plan": ("toolkit.plan", "what a run will need: memory, micro-batches, time and cost"),
    "prepare": ("toolkit.prepare", "download, check and tokenise the data; needs no GPU"),
}


def main(argv: list[str] | None = None) -> int:
    """Run a command; return the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments and arguments[0] in COMMANDS:
        return importlib.import_module(COMMANDS[arguments[0]][0]).main(arguments[1:])
    wants_help = not arguments or arguments[0] in ("-h", "--help")
    lines = ["usage: python -m toolkit COMMAND [--help] [flags]", ""]
    lines += [f"  {name:<9} {text}" for name, (_, text) in COMMANDS.items()]
    if not wants_help:
        lines.insert(0, f"error: no command {arguments[0]!r}\n")
    (say if wants_help else complain)("\n".join(lines))
    return 0 if wants_help else 2


if __name__ == "__main__":
    sys.exit(main())
