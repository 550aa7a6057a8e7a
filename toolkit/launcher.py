"""This process's place as the launcher tells it, before there is a process group."""

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

POLL_SECONDS = 0.1


class Turn:
    """Lets the first process of a machine prepare the data while the others wait.

    They could all try: locks see to it that one builds. But when data is bad, the launcher ends all
    processes with the first that fails, and the one that has to say why might not be done yet.
    """

    def __init__(self) -> None:
        self.is_main = int(os.environ.get("RANK", "0")) == 0
        self.is_first = int(os.environ.get("LOCAL_RANK", "0")) == 0
        self.processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        launch = (
            os.getppid(),
            os.environ.get("MASTER_PORT"),
            os.environ.get("TORCHELASTIC_RESTART_COUNT"),
        )
        name = "-".join(map(str, (*launch, os.getuid())))
        self.done = Path(tempfile.gettempdir()) / f"toolkit-prepared-{name}"

    @contextmanager
    def in_order(self) -> Iterator[None]:
        """Run the block in the first process; in the others, once it succeeded there."""
        if self.processes == 1:
            yield
        elif self.is_first:
            self.done.unlink(missing_ok=True)  # of a launcher that had the same process id
            yield
            self.done.touch()
        else:
            while not self.done.exists():  # if the first one fails, the launcher ends this one
                time.sleep(POLL_SECONDS)
            yield
