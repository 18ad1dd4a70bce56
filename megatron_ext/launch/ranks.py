"""Who am I: the rank of this process, told by whoever started it.

The first of these that speaks is believed: the caller (explicit), torchrun, srun, our own local
launcher; where none does, this is the only process. Every value is checked here, and no other file
reads these variables, so that a wrong one is named before any rank waits for another.
"""

import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_ext.errors import UserError
from megatron_ext.launch.slurm_lists import first_host, tasks_per_node

Source = Literal["explicit", "torchrun", "srun", "local", "single"]

_TORCHRUN_TRIGGERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_TORCHRUN_VARIABLES = (
    *_TORCHRUN_TRIGGERS,
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_RESTART_COUNT",
    "TORCHELASTIC_USE_AGENT_STORE",
)
_SRUN_TRIGGERS = ("SLURM_PROCID", "SLURM_STEP_ID")
_LOCAL_RANK, _LOCAL_NUM_RANKS = "MEGATRON_EXT_RANK", "MEGATRON_EXT_NUM_RANKS"
_LOCAL_STORE = "MEGATRON_EXT_STORE"

# Slurm numbers its batch, extern and interactive steps from here up: in those one process stands
# for the whole job and is no rank of it.
_FIRST_SPECIAL_STEP = 0xFFFFFFF0
# Ports for srun: below the ephemeral range (32768 and up on Linux), so no client socket sits there.
_FIRST_PORT, _NUM_PORTS = 15000, 15000


@dataclass(frozen=True, slots=True)
class FileStoreAddress:
    """Ranks of one machine meet in a file: no port, nothing listens."""

    path: Path


@dataclass(frozen=True, slots=True)
class TcpStoreAddress:
    """Ranks meet at a TCPStore, which the launcher's agent or rank 0 keeps.

    `prefix` sets this start apart from others at the same address.
    """

    host: str
    port: int
    prefix: str
    is_kept_by_agent: bool


@dataclass(frozen=True, slots=True)
class RankInfo:
    """One process's place among all (`rank`) and on its machine (`local_rank`).

    `store` is where the ranks meet to set up communication; None where there is no one to meet.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    source: Source
    store: FileStoreAddress | TcpStoreAddress | None

    def __post_init__(self) -> None:
        is_possible = (
            0 <= self.local_rank < self.local_world_size <= self.world_size
            and self.local_rank <= self.rank < self.world_size
        )
        if not is_possible:
            raise UserError(
                f"impossible ranks ({self.source}): rank {self.rank} of {self.world_size}, "
                f"local rank {self.local_rank} of {self.local_world_size} on this machine"
            )
        if self.store is None and self.world_size > 1:
            raise UserError(f"{self.world_size} ranks ({self.source}) need a store to meet at")

    @property
    def is_on_one_machine(self) -> bool:
        """All ranks run here, so that nothing has to listen beyond loopback."""
        return self.local_world_size == self.world_size


def discover(
    environment: Mapping[str, str] | None = None, *, explicit: RankInfo | None = None
) -> RankInfo:
    """This process's rank; `environment` is `os.environ` unless given.

    Raises UserError naming the variable that is missing, is not a number or contradicts another.
    """
    if explicit is not None:
        return explicit
    variables = _Variables(os.environ if environment is None else environment)
    if any(name in variables.values for name in _TORCHRUN_TRIGGERS):
        return _from_torchrun(variables)
    if all(name in variables.values for name in _SRUN_TRIGGERS) and _is_one_of_many(variables):
        return _from_srun(variables)
    if _LOCAL_RANK in variables.values:
        return _from_local_launcher(variables)
    return RankInfo(
        rank=0, world_size=1, local_rank=0, local_world_size=1, source="single", store=None
    )


def local_rank_environment(
    environment: Mapping[str, str], *, rank: int, num_ranks: int, store_path: Path
) -> dict[str, str]:
    """What our local launcher starts a rank with: this rank, and no one else's word on it."""
    foreign = (*_TORCHRUN_VARIABLES, *_SRUN_TRIGGERS)
    return {name: value for name, value in environment.items() if name not in foreign} | {
        _LOCAL_RANK: str(rank),
        _LOCAL_NUM_RANKS: str(num_ranks),
        _LOCAL_STORE: str(store_path),
    }


@dataclass(frozen=True, slots=True)
class _Variables:
    values: Mapping[str, str]

    def first_set(self, *names: str) -> str | None:
        return next((name for name in names if name in self.values), None)

    def text(self, name: str, *, because: str) -> str:
        value = self.values.get(name, "")
        if not value.strip():
            found = "empty" if name in self.values else "not set"
            raise UserError(f"environment variable {name} is {found}, but {because}")
        return value.strip()

    def number(self, name: str, *, because: str, minimum: int = 0, below: int = 2**31) -> int:
        value = self.text(name, because=because)
        if not re.fullmatch(r"[0-9]{1,10}", value) or not minimum <= int(value) < below:
            raise UserError(
                f"environment variable {name}={value!r}: expected a whole number from {minimum} "
                f"to {below - 1} ({because})"
            )
        return int(value)

    def smaller(self, name: str, than: str, *, because: str) -> tuple[int, int]:
        """The rank in `name` and the count in `than` that it must stay below."""
        count = self.number(than, because=because, minimum=1)
        rank = self.number(name, because=because)
        if rank >= count:
            raise UserError(
                f"environment variables {name}={rank} and {than}={count} contradict each other: "
                f"{name} counts from 0 to {than} - 1"
            )
        return rank, count


def _from_torchrun(variables: _Variables) -> RankInfo:
    triggers = " and ".join(name for name in _TORCHRUN_TRIGGERS if name in variables.values)
    because = (
        f"{triggers} says that torchrun started this process; start it with torchrun, or unset "
        f"{triggers} to run without"
    )
    rank, world_size = variables.smaller("RANK", "WORLD_SIZE", because=because)
    local_rank, local_world_size = variables.smaller(
        "LOCAL_RANK", "LOCAL_WORLD_SIZE", because=because
    )
    if local_rank > rank or local_world_size > world_size:
        raise UserError(
            f"environment variables RANK={rank}, WORLD_SIZE={world_size}, LOCAL_RANK={local_rank} "
            f"and LOCAL_WORLD_SIZE={local_world_size} contradict each other: what is counted on "
            "one machine cannot exceed the whole"
        )
    store = None
    if world_size > 1:
        store = TcpStoreAddress(
            host=_host(variables, "MASTER_ADDR", because=because),
            port=_port(variables, because=because),
            # Not the restart count: each machine's agent keeps its own (see attempt.py).
            prefix="torchrun",
            is_kept_by_agent=variables.values.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )
    return RankInfo(rank, world_size, local_rank, local_world_size, "torchrun", store)


def _is_one_of_many(variables: _Variables) -> bool:
    because = "SLURM_PROCID and SLURM_STEP_ID say that srun started this process"
    step = variables.number("SLURM_STEP_ID", because=because, below=2**32)
    if step >= _FIRST_SPECIAL_STEP:
        return False
    return variables.number(_srun_count(variables), because=because, minimum=1) > 1


def _srun_count(variables: _Variables) -> str:
    # The step's own count where srun gives it: SLURM_NTASKS may be the whole job's.
    return variables.first_set("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") or "SLURM_NTASKS"


def _from_srun(variables: _Variables) -> RankInfo:
    because = "SLURM_PROCID says that srun started this process"
    rank, world_size = variables.smaller("SLURM_PROCID", _srun_count(variables), because=because)
    local_rank = variables.number("SLURM_LOCALID", because=because)
    node = variables.number("SLURM_NODEID", because=because)
    layout = variables.first_set("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE")
    layout = layout or "SLURM_STEP_TASKS_PER_NODE"
    counts = tasks_per_node(variables.text(layout, because=because))
    if sum(counts) != world_size or node >= len(counts) or local_rank >= counts[node]:
        raise UserError(
            f"environment variables {layout}={variables.values[layout]!r}, SLURM_NODEID={node}, "
            f"SLURM_LOCALID={local_rank} and {_srun_count(variables)}={world_size} contradict each "
            "other; start the ranks with srun directly"
        )
    job = variables.number("SLURM_JOB_ID", because=because, below=2**32)
    step = variables.number("SLURM_STEP_ID", because=because, below=2**32)
    restart = variables.values.get("SLURM_RESTART_COUNT", "0")
    if "MASTER_ADDR" in variables.values:
        host = _host(variables, "MASTER_ADDR", because=because)
    elif len(counts) == 1:
        host = "127.0.0.1"
    else:
        nodes = variables.first_set("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST")
        host = first_host(variables.text(nodes or "SLURM_STEP_NODELIST", because=because))
    if "MASTER_PORT" in variables.values:
        port = _port(variables, because=because)
    else:
        port = _FIRST_PORT + (job * 31 + step) % _NUM_PORTS
    store = TcpStoreAddress(
        host=host, port=port, prefix=f"srun_{job}_{step}_{restart}", is_kept_by_agent=False
    )
    return RankInfo(rank, world_size, local_rank, counts[node], "srun", store)


def _from_local_launcher(variables: _Variables) -> RankInfo:
    because = f"{_LOCAL_RANK} says that megatron-ext's local launcher started this process"
    rank, num_ranks = variables.smaller(_LOCAL_RANK, _LOCAL_NUM_RANKS, because=because)
    path = Path(variables.text(_LOCAL_STORE, because=because))
    if not path.parent.is_dir():
        raise UserError(
            f"environment variable {_LOCAL_STORE}={str(path)!r}: no such folder {path.parent}; "
            f"is {_LOCAL_RANK} left over from an earlier run? Unset it"
        )
    return RankInfo(rank, num_ranks, rank, num_ranks, "local", FileStoreAddress(path))


def _host(variables: _Variables, name: str, *, because: str) -> str:
    host = variables.text(name, because=because)
    try:
        ipaddress.ip_address(host)
    except ValueError:
        if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,252})", host):
            raise UserError(
                f"environment variable {name}={host!r}: expected a host name or an IP address"
            ) from None
    return host


def _port(variables: _Variables, *, because: str) -> int:
    return variables.number("MASTER_PORT", because=because, minimum=1, below=2**16)
