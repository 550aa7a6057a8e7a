"""Do others compute on the cores that this process's threads want?"""

import os
import time

WINDOW_SECONDS = 10.0
FAIR_SHARE = 0.7
"""Of a core for each thread. Alone, threads have 0.98: while they wait for each other they spin."""
SPINNING = "GOMP_SPINCOUNT"
"""How a user says for how long, in the OpenMP that torch brings along on Linux."""


class Cores:
    """Notices, once, when others leave this process too little of its cores.

    A thread that has a core spins until the one that has none has done its part: two trainings of two
    threads on two cores take 4 to 80 times as long, not twice (tests/bench/NOTES.md).
    """

    def __init__(self, threads: int) -> None:
        sleeping = os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive"
        self.threads = threads
        self.watches = threads > 1 and not sleeping and not os.environ.get(SPINNING)
        self.begin()

    def begin(self) -> None:
        """Look at what comes from here on: who waits for a disk wants no cores."""
        self.since, self.used = time.monotonic(), time.process_time()

    def complaint(self) -> str | None:
        """Return what to say of the last seconds, if that is due; to be asked after each step."""
        now, used = time.monotonic(), time.process_time()
        if not self.watches or now - self.since < WINDOW_SECONDS:
            return None
        cores = (used - self.used) / (now - self.since)
        self.begin()
        if cores >= FAIR_SHARE * self.threads:
            return None
        self.watches = False
        return (
            f"This process has {cores:.1f} of the {self.threads} cores that its threads want: others "
            "compute there, or a limit is set, and threads that wait for each other crawl. If that "
            "lasts, stop it (Ctrl-C) and start it again, it goes on where it was, with fewer threads: "
            "--cpu_threads 1"
        )
