"""Do others compute on the cores that this process's threads want?"""

import os
import time

WINDOW_SECONDS = 10.0
FAIR_SHARE = 0.7
"""Of a core for each thread. Alone, threads have 0.98: while they wait for each other they spin."""
SETTINGS = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"
"""How a user says that they sleep instead."""


class Cores:
    """Notices, once, when others leave this process too little of its cores.

    A thread that has a core spins until the one that has none has done its part: two trainings of two
    threads on two cores take 4 to 80 times as long, not twice (tests/bench/NOTES.md).
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.watches = threads > 1 and not any(name in os.environ for name in SETTINGS)
        self.since, self.used = time.monotonic(), time.process_time()

    def complaint(self) -> str | None:
        """Return what to say of the last seconds, if that is due; to be asked after each step."""
        now, used = time.monotonic(), time.process_time()
        if not self.watches or now - self.since < WINDOW_SECONDS:
            return None
        cores = (used - self.used) / (now - self.since)
        self.since, self.used = now, used
        if cores >= FAIR_SHARE * self.threads:
            return None
        self.watches = False
        return (
            f"This process has {cores:.1f} of the {self.threads} cores that its threads want: others "
            "compute there, and threads that wait for each other crawl. If that lasts, stop it "
            "(Ctrl-C) and start it again, it goes on where it was, with fewer threads: --cpu_threads 1"
        )
