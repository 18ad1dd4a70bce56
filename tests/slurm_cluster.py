"""A Slurm cluster of two virtual nodes on this machine, for tests marked `slurm`.

Everything lies in one folder, listens on loopback and ends with the `with` block. Needs root and
Debian's slurm-wlm, whose slurmd may run several times on one host.
"""

import contextlib
import os
import secrets
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_PATIENCE_SECONDS = 30.0

_CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
ReturnToService=2
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool_%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd_%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd_%n.log
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={port_0} CPUs=8
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port_1} CPUs=8
PartitionName=main Nodes=n[0-1] Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True, slots=True)
class SlurmCluster:
    """`environment` makes Slurm's programs talk to this cluster."""

    folder: Path
    environment: dict[str, str]

    def run(
        self, command: Sequence[str], *, timeout_seconds: float = 60.0, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """A program of Slurm; srun waits for ever for what the cluster has not, so it is timed."""
        return subprocess.run(
            list(command),
            env=self.environment | variables,
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            check=False,
        )


@contextlib.contextmanager
def slurm_cluster(folder: Path) -> Iterator[SlurmCluster]:
    """Two nodes, n0 and n1, of 8 CPUs each."""
    # munged refuses folders that others may write to.
    folder.chmod(0o755)
    configuration = _write_configuration(folder)
    environment = dict(os.environ) | {"SLURM_CONF": str(configuration)}
    cluster = SlurmCluster(folder, environment)
    munged = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket"]
    for name in ("key-file", "pid-file", "log-file", "seed-file"):
        munged.append(f"--{name}={folder}/munge.{name}")
    with contextlib.ExitStack() as stack:
        for command in (
            munged,
            ["slurmctld", "-D", "-i", "-f", str(configuration)],
            ["slurmd", "-D", "-f", str(configuration), "-N", "n0"],
            ["slurmd", "-D", "-f", str(configuration), "-N", "n1"],
        ):
            stack.enter_context(_daemon(command, folder / f"{command[0]}_{command[-1][-2:]}.out"))
            if command is munged:
                _wait_for(lambda: (folder / "munge.socket").exists(), what="munged's socket")
        _wait_for(lambda: _num_idle(cluster) == 2, what="two idle nodes")
        yield cluster


@contextlib.contextmanager
def _daemon(command: Sequence[str], log: Path) -> Iterator[None]:
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(timeout=5.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _write_configuration(folder: Path) -> Path:
    (folder / "state").mkdir()
    (folder / "munge.key-file").write_bytes(secrets.token_bytes(128))
    (folder / "munge.key-file").chmod(0o400)
    ports = _free_ports(3)
    path = folder / "slurm.conf"
    path.write_text(
        _CONFIGURATION.format(
            folder=folder,
            host=socket.gethostname().partition(".")[0],
            controller_port=ports[0],
            port_0=ports[1],
            port_1=ports[2],
        )
    )
    return path


def _free_ports(num_ports: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(num_ports)
        ]
        return [int(server.getsockname()[1]) for server in servers]


def _num_idle(cluster: SlurmCluster) -> int:
    done = cluster.run(["sinfo", "--noheader", "--Node", "--format=%N %t"])
    return sum(line.endswith(" idle") for line in done.stdout.splitlines())


def _wait_for(is_true: Callable[[], bool], *, what: str) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not is_true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"Slurm on this machine: no {what} after {_PATIENCE_SECONDS:.0f} s")
        time.sleep(0.1)
