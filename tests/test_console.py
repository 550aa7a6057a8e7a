"""What is printed where nobody reads: the run goes on, and its exit code is its own."""

import os
import subprocess
import sys
import tempfile
import textwrap

import pytest

from tests.programs import TRAIN, run_python

NOBODY_READS = """
import os, sys
reader, writer = os.pipe()
os.close(reader)
for number in (1, 2):
    os.dup2(writer, number)
"""


@pytest.mark.parametrize("exit_code", [0, 3])
def test_a_program_ends_by_its_own_code_though_nobody_reads(exit_code: int) -> None:
    program = f"""
    from toolkit.console import complain, say

    for print_line in (say, complain):
        print_line("lost")
        print_line("lost, too")
    print("a library prints", flush=True)
    sys.exit({exit_code})
    """
    assert run_python("-c", NOBODY_READS + textwrap.dedent(program)).returncode == exit_code


def test_a_full_disk_is_not_taken_for_a_reader_who_has_gone() -> None:
    """What could not be written waits: there may be room again."""
    if not sys.platform.startswith("linux"):
        pytest.skip("/dev/full is Linux's")
    program = """
    import os
    from toolkit.console import say

    free = os.dup(1)
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    say("first")
    os.dup2(free, 1)
    say("second")
    """
    done = run_python("-c", textwrap.dedent(program))
    assert (done.stdout.split(), done.returncode) == (["first", "second"], 0)


@pytest.mark.parametrize(
    "there",
    ["None", "closed()", "Bare()", "io.StringIO()"],
    ids=["none", "closed", "bare", "memory"],
)
def test_whatever_stands_in_for_a_stream(there: str) -> None:
    """A daemon's is None, a closed one raises ValueError, and somebody's own has but two methods."""
    program = f"""
    import io, sys
    from toolkit.console import complain, flush, say

    class Bare:
        def write(self, text): raise BrokenPipeError(32, "nobody reads")
        def flush(self): pass

    def closed():
        sys.__stdout__.close()
        return sys.__stdout__

    sys.stdout = {there}
    say("lost")
    complain("seen")
    flush()
    sys.exit(3)
    """
    done = run_python("-c", textwrap.dedent(program))
    assert (done.returncode, done.stderr) == (3, "seen\n")


def test_an_error_of_a_disk_that_passes_does_not_silence_a_log() -> None:
    program = """
    import errno, sys
    from toolkit import console

    written = console._printable
    console._printable = lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "a disk's"))
    console.say("lost")
    console._printable = written
    console.say("seen")
    """
    with tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, "-c", textwrap.dedent(program)]
        subprocess.run(command, stdout=log, check=True, cwd=TRAIN.parent.parent)
        log.seek(0)
        assert log.read() == "seen\n"


def test_what_cannot_be_encoded_is_shown_by_its_number() -> None:
    """A path need not be text, and a terminal not be UTF-8: else its line is lost."""
    program = r"from toolkit.console import say; say('ü \udcff')"
    for encoding, shown in (("ascii", r"\xfc \udcff"), ("utf-8", r"ü \udcff")):
        assert run_python("-c", program, PYTHONIOENCODING=encoding).stdout == shown + "\n"


def test_also_while_a_bar_is_shown() -> None:
    program = """
    import sys
    from rich.console import Console
    from rich.file_proxy import FileProxy
    from toolkit.console import say

    sys.stdout = FileProxy(Console(file=sys.stdout), sys.stdout)
    say("ü")
    say("after")
    """
    done = run_python("-c", textwrap.dedent(program), PYTHONIOENCODING="ascii")
    assert done.stdout.split() == [r"\xfc", "after"]


def test_a_path_is_shown_as_the_terminal_takes_it() -> None:
    """Where the locale is C, Python lets the bytes of a path through."""
    program = r"from toolkit.console import say; say('\udcff')"
    handler = {"PYTHONIOENCODING": "ascii:surrogateescape"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, capture_output=True, cwd=TRAIN.parent.parent, env=os.environ | handler
    )
    assert done.stdout == b"\xff\n"
