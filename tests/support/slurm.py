"""A Slurm of one node in a folder of its own, for as long as a test needs it."""

from __future__ import annotations

import getpass
import os
import secrets
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from support.waiting import PATIENCE, wait_until

# Debian and others keep daemons where the path of an ordinary user does not lead.
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
MISSING = [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]

# The node has more of everything than the machine, so that what the launcher asks for is there. A job that is
# ended has minutes to save. Jobs of the partition urgent take the place of others, which are queued again.
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={daemon}
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
KillWait={patience}
JobRequeue=1
ReturnToService=2
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=64 RealMemory=600000 Gres=gpu:8 State=UNKNOWN
PartitionName=usual Nodes={host} Default=YES PriorityTier=1 GraceTime={patience} MaxTime=INFINITE
PartitionName=urgent Nodes={host} PriorityTier=2 PreemptMode=OFF MaxTime=INFINITE
"""


class Slurm:
    """Commands of a Slurm that runs.

    Attributes:
        environment: with which they, and what submits jobs, find it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {"PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}

    def __call__(self, *command: str, **environment: str) -> str:
        """What a command of Slurm prints."""
        environment = {**os.environ, **environment, **self.environment}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def jobs(self) -> list[str]:
        """Ids of the jobs that have not ended, an array's one by one."""
        return self("squeue", "--noheader", "--array", "--format=%i").split()

    def job(self, job: str) -> dict[str, str]:
        """What Slurm tells of a job, as ``JobState``."""
        told = self("scontrol", "show", "job", "--oneliner", job)
        return dict(word.split("=", 1) for word in told.split() if "=" in word)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as opened:
        sockets = [opened.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextmanager
def one_node_slurm(folder: Path) -> Iterator[Slurm]:
    """Start munged, slurmctld and slurmd with files in ``folder``; end them, and all jobs, afterwards."""
    host = socket.gethostname().partition(".")[0]
    controller, daemon = _free_ports(2)
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    values = {"host": host, "user": getpass.getuser(), "folder": folder, "patience": PATIENCE}
    configuration = CONFIGURATION.format(**values, controller=controller, daemon=daemon)
    (folder / "slurm.conf").write_text(configuration)
    for number in range(8):
        # A device, as Slurm wants it.
        (folder / f"gpu{number}").symlink_to(os.devnull)
    (folder / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={folder}/gpu[0-7]\n")
    slurm = Slurm(folder)
    files = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munge.pid"}
    files |= {"seed-file": "munge.seed", "log-file": "munge.log"}
    munge = ["--foreground", "--force", *(f"--{name}={folder / file}" for name, file in files.items())]
    with ExitStack() as started:

        def start(*command: str) -> subprocess.Popen[bytes]:
            output = started.enter_context(open(folder / f"{command[0]}.out", "wb"))
            process = subprocess.Popen(
                command,
                env={**os.environ, **slurm.environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            started.callback(_end, process)
            return process

        def works(process: subprocess.Popen[bytes], *command: str) -> None:
            """Wait until a command succeeds, while the daemon lives."""
            wait_until(lambda: _succeeds(slurm, command), lambda: process.poll() is None)

        munged = start("munged", *munge)
        wait_until((folder / "munge.socket").exists, lambda: munged.poll() is None)
        works(start("slurmctld", "-D"), "scontrol", "ping")
        works(start("slurmd", "-D"), "srun", "--immediate=9", "true")
        try:
            yield slurm
        finally:
            slurm("scancel", f"--user={getpass.getuser()}")
            wait_until(lambda: not slurm.jobs())


def _succeeds(slurm: Slurm, command: tuple[str, ...]) -> bool:
    try:
        slurm(*command)
    except AssertionError:
        return False
    return True


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(60)
    finally:
        process.kill()
        process.wait()
