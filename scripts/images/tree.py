"""A folder as a container's root: its own mounts, process numbers and user; no daemon.

What a container runtime does for one process is done here with util-linux and coreutils (root is
needed): `unshare` gives it namespaces of mounts and process numbers, so that it is process 1 as in
a container, `chroot` the root and the user, `env` the environment and the folder. /proc, /sys
(read-only), /dev with the usual nodes and 64 MiB of /dev/shm (Docker's default) are mounted. What
is not done: network, memory and processor limits, capabilities and seccomp stay the machine's.
"""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# $1 root, $2 user, $3 folder, then pairs of mounts up to --, then NAME=VALUE... command.
_ENTER = """
set -eu
root=$1 user=$2 folder=$3
shift 3
mount -t proc proc "$root/proc"
mount --bind -o ro /sys "$root/sys"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
for node in null zero full random urandom; do
    touch "$root/dev/$node"
    mount --bind "/dev/$node" "$root/dev/$node"
done
ln -s /proc/self/fd "$root/dev/fd"
mkdir "$root/dev/shm"
mount -t tmpfs -o size=64m,mode=1777 tmpfs "$root/dev/shm"
mount -t tmpfs -o mode=755 tmpfs "$root/run"
while [ "$1" != -- ]; do
    if [ -d "$1" ]; then mkdir -p "$root$2"; else mkdir -p "$root${2%/*}"; touch "$root$2"; fi
    mount --bind -o ro "$1" "$root$2"
    shift 2
done
shift
exec chroot --userspec="$user" "$root" /usr/bin/env -i --chdir="$folder" "$@"
"""


@dataclass(frozen=True, slots=True)
class Settings:
    """How a process in the tree starts."""

    environment: Mapping[str, str] = field(default_factory=dict)
    user: str = "0:0"
    folder: str = "/"
    mounts: Mapping[Path, str] = field(default_factory=dict)
    """Read-only: path outside, path inside."""


def start(root: Path, command: Sequence[str], settings: Settings) -> subprocess.Popen[str]:
    """`command` as process 1 below `root`; its output comes through one pipe."""
    environment = {"PATH": DEFAULT_PATH, "HOME": _home(root, settings.user)}
    environment |= settings.environment
    mounts = [word for pair in settings.mounts.items() for word in map(str, pair)]
    return subprocess.Popen(
        [
            *("unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation=private"),
            *("sh", "-c", _ENTER, "enter", str(root), settings.user, settings.folder, *mounts),
            *("--", *(f"{name}={value}" for name, value in environment.items()), *command),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(
    root: Path, command: Sequence[str], settings: Settings, *, timeout_seconds: float
) -> tuple[int, str]:
    """Exit code and output. TimeoutExpired after `timeout_seconds`, with nothing left running."""
    process = start(root, command, settings)
    # --kill-child: what is in the namespace dies with unshare.
    timer = threading.Timer(timeout_seconds, process.kill)
    timer.start()
    try:
        output, _ = process.communicate()
    finally:
        is_late = not timer.is_alive()
        timer.cancel()
    if is_late:
        raise subprocess.TimeoutExpired(list(command), timeout_seconds, output=output)
    return process.returncode, output


def send_signal(process: subprocess.Popen[str], number: int) -> None:
    """To process 1 of the tree, as `docker stop` and a cluster's agent do."""
    (child,) = psutil.Process(process.pid).children()
    os.kill(child.pid, number)


def _home(root: Path, user: str) -> str:
    number = user.partition(":")[0]
    for line in (root / "etc/passwd").read_text(encoding="utf-8").splitlines():
        fields = line.split(":")
        if fields[2] == number:
            return fields[5]
    return "/"
