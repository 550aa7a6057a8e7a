"""What is printed where nobody reads: the run goes on, and its exit code is its own."""

import sys
import textwrap

import pytest

from tests.programs import run_python

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


def test_a_stream_that_is_closed_does_not_keep_a_run_from_saving() -> None:
    program = "import sys; sys.stdout.close(); from toolkit.console import say; say('lost')"
    assert run_python("-c", program).returncode == 0


def test_what_cannot_be_encoded_is_shown_by_its_number() -> None:
    """A path need not be text, and a terminal not be UTF-8: else its line is lost."""
    program = r"from toolkit.console import say; say('ü \udcff')"
    for encoding, shown in (("ascii", r"\xfc \udcff"), ("utf-8", r"ü \udcff")):
        assert run_python("-c", program, PYTHONIOENCODING=encoding).stdout == shown + "\n"
