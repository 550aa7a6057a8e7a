"""Start and stop a real SLURM on this machine: munged, slurmctld, and two virtual nodes.

Needs root and Debian's packages slurm-wlm and munge. The daemons are ended by process id.
"""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

NODES = ("n1", "n2")
CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort=6817
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CryptoType=crypto/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
# a requeued job waits until its old credential has expired, two minutes by default
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
SchedulerParameters=sched_interval=2,batch_sched_delay=0,bf_interval=2,requeue_setup_env_fail
MpiDefault=none
KillWait=20
MinJobAge=600
SlurmdTimeout=10
MailProg=/bin/true
NodeName={nodes} NodeHostname={host} NodeAddr=127.0.0.1 Port=17001-17002 CPUs=2 RealMemory=4000
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=60 MaxTime=INFINITE State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """Return why no cluster can be started here, or None."""
    absent = [name for name in ("slurmctld", "slurmd", "munged", "sbatch") if not which(name)]
    if absent:
        return f"{', '.join(absent)} not installed (apt-get install slurm-wlm munge)"
    return None if getpass.getuser() == "root" else "starting SLURM's daemons needs root"


def which(name: str) -> str | None:
    """Find a program, where an ordinary user's PATH does not look too."""
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


class Cluster:
    """Two virtual nodes with two CPUs each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "slurm.conf"
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "Cluster":
        try:
            self._start_all()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start_all(self) -> None:
        _name_nodes()
        (self.folder / "state").mkdir()
        host = socket.gethostname()
        text = CONFIG.format(host=host, folder=self.folder, nodes=f"n[1-{len(NODES)}]")
        self.config.write_text(text)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        munge = [f"--key-file={key}", f"--socket={self.folder}/munge.socket", "--force"]
        munge += [f"--{kind}-file={self.folder}/munged.{kind}" for kind in ("pid", "log", "seed")]
        self.start("munged", "--foreground", *munge)
        self.wait_for(lambda: (self.folder / "munge.socket").exists())
        self.start("slurmctld", "-D", "-f", str(self.config))
        for node in NODES:
            self.start_node(node)
        nodes = ("sinfo", "-h", "-o", "%D %t")
        self.wait_for(lambda: self.ask(*nodes, check=False) == "2 idle\n")

    def start_node(self, node: str) -> None:
        """Start a node's daemon."""
        self.start(f"slurmd-{node}", "-D", "-N", node, "-f", str(self.config))

    def start(self, name: str, *arguments: str) -> None:
        """Start a daemon in the foreground."""
        program = which(name.partition("-")[0])
        assert program
        with (self.folder / f"{name}.out").open("wb") as out:
            self.daemons[name] = subprocess.Popen(
                [program, *arguments], stdout=out, stderr=out, start_new_session=True
            )

    def __exit__(self, *_: object) -> None:
        self.ask("scancel", "--user=root", "--full", check=False)
        deadline = time.monotonic() + 20
        while self.ask("squeue", "-h", check=False).strip() and time.monotonic() < deadline:
            time.sleep(0.5)
        for process in reversed(self.daemons.values()):
            process.send_signal(signal.SIGTERM)
        for process in self.daemons.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()

    def node_of(self, job: str) -> str:
        """Return the node that a job runs on."""
        return self.ask("squeue", "-h", f"--jobs={job}", "-o", "%N").strip()

    def kill_node(self, node: str, pids: list[int]) -> None:
        """Let a node die: its daemon, and the processes that run there."""
        self.daemons[f"slurmd-{node}"].kill()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    @property
    def environment(self) -> dict[str, str]:
        """What programs need to find this cluster."""
        return {"SLURM_CONF": str(self.config)}

    def ask(self, *command: str, check: bool = True, **environment: str) -> str:
        """Run one of SLURM's programs; return what it prints."""
        settings = os.environ | self.environment | environment
        done = subprocess.run(command, capture_output=True, text=True, env=settings)
        assert done.returncode == 0 or not check, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def wait_for(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        """Wait until a condition holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not within {seconds} s; see {self.folder}"
            time.sleep(0.3)


def _name_nodes() -> None:
    hosts = Path("/etc/hosts")
    text = hosts.read_text()
    if not all(f" {node}" in text for node in NODES):
        hosts.write_text(f"{text.rstrip()}\n127.0.0.1 {' '.join(NODES)}\n")
