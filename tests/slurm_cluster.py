"""A Slurm cluster of two nodes on this machine, for tests: daemons, configuration, ports and logs of its own."""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

NODES = ("127.0.0.1", "127.0.0.2")  # a master address is a node's name: these need no name server
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scancel", "scontrol", "sinfo", "squeue", "srun")
PATH = f"{os.environ['PATH']}:/usr/local/sbin:/usr/sbin"  # daemons are in no ordinary user's PATH
FINISHED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"}

CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
# A requeued job waits until its old credential has expired: 120 s by default, and 5 s are the least.
AuthInfo=socket={directory}/munge.socket,cred_expire=5
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_interval=1
KillWait=5
ReturnToService=2
# Nodes may claim more cores than this machine has, and GPUs that it does not have.
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName={nodes[0]} NodeHostname={host} NodeAddr={nodes[0]} Port={ports[1]} CPUs=4 Gres=gpu:2
NodeName={nodes[1]} NodeHostname={host} NodeAddr={nodes[1]} Port={ports[2]} CPUs=4 Gres=gpu:2
PartitionName=main Nodes=ALL Default=YES State=UP
"""


def missing_programs() -> list[str]:
    return [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("", 0))
        return [one.getsockname()[1] for one in sockets]


class Cluster:
    """Runs while its context is open; everything it writes is in `directory`, every daemon's log as NAME.log."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        outside = {
            key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_", "SRUN_"))
        }
        self.environment = outside | {"SLURM_CONF": str(directory / "slurm.conf"), "PATH": PATH}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        configuration = CONFIGURATION.format(
            directory=self.directory,
            host=socket.gethostname().split(".")[0],
            nodes=NODES,
            ports=free_ports(3),
            user=pwd.getpwuid(os.geteuid()).pw_name,
        )
        (self.directory / "slurm.conf").write_text(configuration)
        (self.directory / "gres.conf").write_text("Name=gpu File=/dev/null,/dev/zero\n")
        # Nothing here uses cgroups; the other plugins would look for mounts and a systemd that a container lacks.
        (self.directory / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (self.directory / "state").mkdir()
        key = self.directory / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        try:
            self._start_munge()
            self._start("slurmctld", "slurmctld", "-D")
            for node in NODES:
                (self.directory / f"spool-{node}").mkdir()
                self._start(f"slurmd-{node}", "slurmd", "-D", "-N", node)
            self.wait("two idle nodes", self._is_idle, seconds=30)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.run("scancel", "--user", pwd.getpwuid(os.geteuid()).pw_name)
            self.wait("the end of all jobs", lambda: not self.run("squeue", "--noheader"), seconds=30)
        finally:
            self._stop()

    def _start_munge(self) -> None:
        path = self.directory / "munge"
        files = [f"--{kind}-file={path}.{kind}" for kind in ("key", "log", "pid", "seed")]
        # --force: it wants its socket where everyone may go, and pytest's directories are for one user.
        self._start("munged", "munged", "--foreground", "--force", f"--socket={path}.socket", *files)
        self.wait("munge's socket", Path(f"{path}.socket").exists, seconds=10)

    def _start(self, name: str, *command: str) -> None:
        with (self.directory / f"{name}.log").open("wb") as log:
            # A session of its own: Ctrl-C is for pytest, which then stops the daemons in order.
            self._daemons[name] = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def _stop(self) -> None:
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def _is_idle(self) -> bool:
        with contextlib.suppress(RuntimeError):  # slurmctld does not answer yet
            return self.run("sinfo", "--noheader", "--Node", "--format=%T").split() == ["idle"] * len(NODES)
        return False

    def wait(self, what: str, condition: Callable[[], object], seconds: float) -> None:
        """Polls until the condition holds.

        Raises:
            RuntimeError: a daemon died, with the end of its log.
            TimeoutError: the time is over.
        """
        deadline = time.monotonic() + seconds
        while not condition():
            for name, daemon in self._daemons.items():
                if daemon.poll() is not None:
                    log = self.directory / f"{name}.log"
                    raise RuntimeError(f"{name} ended with {daemon.returncode}, see {log}:\n{log.read_text()[-2000:]}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"no {what} after {seconds} s; the daemons' logs are in {self.directory}")
            time.sleep(0.1)

    def run(self, *command: str, cwd: Path | None = None, **variables: str) -> str:
        """What a Slurm command prints; `variables` are added to its environment."""
        result = subprocess.run(
            command, cwd=cwd, env=self.environment | variables, capture_output=True, text=True, check=False, timeout=200
        )
        if result.returncode:
            raise RuntimeError(
                f"{' '.join(command)} failed: {result.stderr}; the daemons' logs are in {self.directory}"
            )
        return result.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """The fields of `scontrol show job`, such as JobState, ExitCode and Restarts."""
        shown = self.run("scontrol", "--oneliner", "show", "job", job)
        return dict(field.split("=", 1) for field in shown.split() if "=" in field)

    def finish(self, job: str, seconds: float = 60) -> dict[str, str]:
        """Waits until the job will not run again."""
        log = self.job(job)["StdOut"]
        self.wait(f"end of job {job} (log {log})", lambda: self.job(job)["JobState"] in FINISHED, seconds)
        return self.job(job)
