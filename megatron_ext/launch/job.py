"""What one job is: checked values, before any of them becomes part of a script.

Slurm reads `#SBATCH` lines by rules of its own, in which no quoting protects; so what a user gives
for them must look like what it is (a name, a time) or is refused. Everything else (paths, words of
the configuration) may hold any character and is quoted by the script (`job_script`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.errors import UserError
from megatron_ext.launch.cluster_profile import Cluster, Launcher

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,63}")
_LIST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,:=@&|()*\[\]+-]{0,255}")
_TIME = re.compile(r"(?:([0-9]{1,3})-)?([0-9]{1,4})(?::([0-5]?[0-9]))?(?::([0-5]?[0-9]))?")
_MOST_NODES = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRequest:
    """As a user asks; None: what the cluster's profile says.

    Attributes:
        words: of `megatron-ext train`: recipe or file, and settings.
        run_dir: absolute; checkpoints and trigger files lie there.
        python: interpreter that has megatron-ext.
        container: image; python is then the image's.
        broadcast: packed environment (tar) for the nodes' own disks.
    """

    words: tuple[str, ...]
    run_dir: Path
    python: str
    num_nodes: int
    job_name: str
    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    reservation: str | None = None
    time: str | None = None
    launcher: Launcher | None = None
    segment: int | None = None
    container: str | None = None
    mounts: tuple[str, ...] = ()
    broadcast: str | None = None
    max_restarts: int = 3
    max_requeues: int = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Checked; nothing in it can be more than it says."""

    request: JobRequest
    cluster: Cluster
    launcher: Launcher
    time: str
    segment: int | None

    @property
    def num_ranks(self) -> int:
        return self.request.num_nodes * self.cluster.profile.ranks_per_node


def make_job(request: JobRequest, cluster: Cluster) -> Job:
    """Check a request against its cluster.

    Raises:
        UserError: naming the option, what was given and what would work.
    """
    profile = cluster.profile
    if not 1 <= request.num_nodes <= _MOST_NODES:
        raise UserError(f"--nodes {request.num_nodes}: expected 1 to {_MOST_NODES:,}")
    if profile.batch_system == "none" and request.num_nodes > 1:
        raise UserError(f"--nodes {request.num_nodes}: cluster {cluster.name} is one machine")
    if profile.needs_account and not request.account:
        raise UserError(f"cluster {cluster.name} wants an account: --account PROJECT")
    for option in ("job_name", "account", "partition", "qos", "reservation"):
        value = getattr(request, option)
        pattern = _NAME if option in ("job_name", "account") else _LIST
        if value is not None and not pattern.fullmatch(value):
            raise UserError(
                f"--{option.replace('_', '-')} {value!r}: expected letters, digits and _ . - only; "
                "Slurm's own lines in a job script cannot quote anything else"
            )
    for option in ("container", "broadcast", "python"):
        value = getattr(request, option)
        if value is not None and (not value or "\0" in value):
            raise UserError(f"--{option} {value!r}: expected a path")
    for word in (*request.words, *request.mounts, request.container or "", request.python):
        if not _is_text(word):
            raise UserError(f"{word!r}: holds a NUL or bytes that are no UTF-8; rename it")
    if request.container and re.search("[,:]", str(request.run_dir)):
        raise UserError(
            f"log.run_dir={request.run_dir}: with --container, a path with , or : cannot be mounted"
        )
    if request.container and profile.container is None:
        raise UserError(
            f"--container: cluster {cluster.name} runs no images; `container: apptainer` or "
            "`pyxis` in a profile of your own says how"
        )
    if request.broadcast and not profile.has_node_storage:
        raise UserError(f"--broadcast: cluster {cluster.name} names no disk of its nodes")
    if request.broadcast and request.container:
        raise UserError("--broadcast and --container: an image is not unpacked; give one of them")
    time = request.time or profile.time
    limit = limit_seconds(time)
    if limit <= profile.signal_seconds:
        raise UserError(
            f"--time {time}: the cluster's warning comes {profile.signal_seconds} s before the "
            "limit (signal_seconds), so a run would never begin; ask for more"
        )
    return Job(
        request=request,
        cluster=cluster,
        launcher=request.launcher or profile.launcher,
        time=time,
        segment=_segment(request, cluster),
    )


def _is_text(word: str) -> bool:
    try:
        return b"\0" not in word.encode()
    except UnicodeEncodeError:
        return False


def limit_seconds(time: str) -> int:
    """Slurm's forms: minutes, M:S, H:M:S, D-H, D-H:M, D-H:M:S.

    Raises:
        UserError: it is none of them.
    """
    found = _TIME.fullmatch(time)
    if found is None:
        raise UserError(f"--time {time!r}: expected Slurm's form, such as 90, 2:00:00 or 1-12")
    days, first, second, third = (
        int(part) if part is not None else None for part in found.groups()
    )
    assert first is not None
    if days is not None:
        return ((days * 24 + first) * 60 + (second or 0)) * 60 + (third or 0)
    if third is not None:
        return (first * 60 + (second or 0)) * 60 + third
    return first * 60 + (second or 0)


def _segment(request: JobRequest, cluster: Cluster) -> int | None:
    most = cluster.profile.most_nodes_of_a_segment
    if most is None:
        if request.segment is not None:
            raise UserError(
                f"--segment {request.segment}: nodes of cluster {cluster.name} share no NVLink "
                "switch; leave it out"
            )
        return None
    divisors = [n for n in range(1, most + 1) if request.num_nodes % n == 0]
    if request.segment is None:
        return divisors[-1]
    if request.segment not in divisors:
        raise UserError(
            f"--segment {request.segment}: must divide --nodes {request.num_nodes} and be at most "
            f"{most}; use one of {', '.join(map(str, divisors))}"
        )
    return request.segment
