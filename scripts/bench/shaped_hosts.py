"""Hosts with slow links between them, on one machine: network namespaces behind a switch.

    with shaped_hosts(2, megabits_per_second=200) as hosts:
        code = run_ranks(hosts, ["python", "job.py"], ranks_per_host=1)

Loopback moves more bytes per FLOP of a CPU rank than any network does per FLOP of a GPU, so on it
nothing that saves communication can show. Here each host's link (both directions, as a network
card's) carries what a token bucket lets through; ranks of one host talk over its loopback. A GPU of
400 TFLOP/s behind 50 GB/s has 1 byte for 8,000 FLOP; a core of 50 GFLOP/s behind 50 Mbit/s has as
many. Needs root, `ip` and `tc` (Debian: iproute2). Nothing of the machine's own network is touched.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

# What may leave a link at once: a few milliseconds' worth, at least one segment of 64 KiB.
_BURST_SECONDS = 0.004
_SMALLEST_BURST_BYTES = 128 * 1024
# What may wait for a link before packets are lost: more than the buffers of all sockets here.
_QUEUE_BYTES = 64 * 1024 * 1024
_INTERFACE = "link0"
_PORT = 29500


@dataclass(frozen=True, slots=True)
class Host:
    """A network namespace.

    Attributes:
        name: of the namespace.
        address: of its link; the other hosts reach it there.
        interface: its link.
    """

    name: str
    address: str
    interface: str

    def command(self, command: Sequence[str]) -> list[str]:
        """`command` as run on this host."""
        return ["ip", "netns", "exec", self.name, *command]


def why_no_shaped_hosts() -> str:
    """Why this machine cannot have them; empty where it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if missing := [name for name in ("ip", "tc") if shutil.which(name) is None]:
        return f"{' and '.join(missing)} not found (Debian: iproute2)"
    name = f"probe{secrets.token_hex(3)}"
    for command in (
        ["ip", "netns", "add", name],
        ["ip", "-n", name, "link", "add", "a0", "type", "veth", "peer", "name", "b0"],
        ["tc", "-n", name, "qdisc", "add", "dev", "a0", *_bucket(100.0)],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
            return f"{' '.join(command[:4])}: {done.stderr.strip()}"
    _run("ip", "netns", "del", name)
    return ""


@contextlib.contextmanager
def shaped_hosts(num_hosts: int, *, megabits_per_second: float) -> Iterator[list[Host]]:
    """Hosts whose links each carry `megabits_per_second` in and as much out; gone afterwards.

    Raises:
        RuntimeError: this machine cannot have them.
    """
    if reason := why_no_shaped_hosts():
        raise RuntimeError(f"no hosts with shaped links here: {reason}")
    prefix = f"hosts{secrets.token_hex(3)}"
    switch = f"{prefix}switch"
    hosts = [
        Host(name=f"{prefix}n{number}", address=f"10.77.0.{number + 1}", interface=_INTERFACE)
        for number in range(num_hosts)
    ]
    made: list[str] = []
    try:
        for name in (switch, *(host.name for host in hosts)):
            _run("ip", "netns", "add", name)
            made.append(name)
            _run("ip", "-n", name, "link", "set", "lo", "up")
        _run("ip", "-n", switch, "link", "add", "bridge0", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "bridge0", "up")
        for number, host in enumerate(hosts):
            _plug(host, switch, f"port{number}", megabits_per_second)
        yield hosts
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def _plug(host: Host, switch: str, port: str, megabits_per_second: float) -> None:
    _run(
        "ip", "link", "add", host.interface, "netns", host.name,
        "type", "veth", "peer", "name", port, "netns", switch,
    )  # fmt: skip
    _run("ip", "-n", switch, "link", "set", port, "master", "bridge0", "up")
    _run("ip", "-n", host.name, "address", "add", f"{host.address}/24", "dev", host.interface)
    _run("ip", "-n", host.name, "link", "set", host.interface, "up")
    for namespace, interface in ((host.name, host.interface), (switch, port)):
        _run("tc", "-n", namespace, "qdisc", "add", "dev", interface, *_bucket(megabits_per_second))


def _bucket(megabits_per_second: float) -> list[str]:
    bytes_per_second = megabits_per_second * 1e6 / 8.0
    burst = max(int(bytes_per_second * _BURST_SECONDS), _SMALLEST_BURST_BYTES)
    return [
        "root", "tbf", "rate", f"{int(megabits_per_second * 1000)}kbit",
        "burst", str(burst), "limit", str(_QUEUE_BYTES),
    ]  # fmt: skip


def run_ranks(
    hosts: Sequence[Host],
    command: Sequence[str],
    *,
    ranks_per_host: int,
    timeout_seconds: float,
    environment: Mapping[str, str] | None = None,
) -> int:
    """Run `command` as `ranks_per_host` ranks on each host, one thread each, as torchrun would.

    Ranks are numbered host by host and print where this process prints. When one fails the others
    are killed.

    Returns:
        0, or the exit code of a rank that failed (128 + signal; 124 for too late).
    """
    world_size = len(hosts) * ranks_per_host
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(world_size):
            host = hosts[rank // ranks_per_host]
            variables = {
                "OMP_NUM_THREADS": "1",
                **os.environ,
                "GLOO_SOCKET_IFNAME": host.interface,
                "MASTER_ADDR": hosts[0].address,
                "MASTER_PORT": str(_PORT),
                "RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_RANK": str(rank % ranks_per_host),
                "LOCAL_WORLD_SIZE": str(ranks_per_host),
                **(environment or {}),
            }
            ranks.append(
                subprocess.Popen(host.command(command), env=variables, start_new_session=True)
            )
        return _wait(ranks, time.monotonic() + timeout_seconds)
    finally:
        for process in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run_linked(command: Sequence[str], num_ranks: int, *, link_megabits: float | None) -> int:
    """One-thread ranks on this machine, or each on a host of its own; returns the exit code."""
    if link_megabits is None:
        from megatron_ext.launch.local import run_local

        return run_local(command, num_ranks)
    with shaped_hosts(num_ranks, megabits_per_second=link_megabits) as hosts:
        return run_ranks(hosts, command, ranks_per_host=1, timeout_seconds=1800.0)


def _wait(ranks: Sequence[subprocess.Popen[bytes]], deadline: float) -> int:
    while True:
        codes = [process.poll() for process in ranks]
        for code in codes:
            if code:
                return code if code > 0 else 128 - code
        if all(code == 0 for code in codes):
            return 0
        if time.monotonic() > deadline:
            return 124
        time.sleep(0.05)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
