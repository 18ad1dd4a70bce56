"""A cluster as data: how its nodes are asked for, and how ranks are started on them.

`megatron_ext/launch/clusters/NAME.yaml` ships; a site copies one with the environment file that it
names (a shell file that becomes part of the job script as it stands), changes both and names its
own. What stands in a profile is the site's word and trusted; what a user gives with a command is
not, and is quoted or refused (`job`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from megatron_ext.errors import UserError
from megatron_ext.profile_file import profile_names, profile_path, read_profile

Launcher = Literal["srun", "torchrun"]
_FOLDER = Path(__file__).parent / "clusters"


class ClusterProfile(BaseModel):
    """What one cluster wants."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    batch_system: Literal["slurm", "none"] = "slurm"
    """none: this machine; the script starts the ranks itself."""
    device_profile: str | None = None
    """What `plan` predicts with."""
    ranks_per_node: int = Field(ge=1)
    launcher: Launcher = "srun"
    """srun: one task a rank; torchrun: one task a node, which starts and restarts its ranks."""
    needs_account: bool = False
    partition: str | None = None
    time: str = "02:00:00"
    signal_seconds: int = Field(600, ge=30)
    """Before the time limit: the run saves, stops and is queued again."""
    sbatch_options: list[str] = Field(default_factory=list)
    """Options of sbatch as they stand."""
    cpus_per_task: int | None = Field(None, ge=1)
    """Of one rank; with torchrun a node's task gets as many for each of its ranks."""
    gpus_per_rank: int = Field(1, ge=0, le=1)
    gpu_options: list[str] = Field(default_factory=list)
    """Of srun, where a rank has a GPU of its own."""
    srun_options: list[str] = Field(default_factory=list)
    ranks_per_numa_node: int | None = Field(None, ge=1)
    """Ranks are bound to the memory of their processor with numactl."""
    most_nodes_of_a_segment: int | None = Field(None, ge=1)
    """Nodes behind one NVLink switch; a job is made of segments that lie in one."""
    container: Literal["apptainer", "pyxis"] | None = None
    """How images run here."""
    container_options: list[str] = Field(default_factory=list)
    environment: str | None = None
    """Shell file beside the profile."""
    broadcast_options: list[str] = Field(default_factory=list)
    """Options of sbatch when an environment is copied to the nodes' own disks."""
    has_node_storage: bool = False
    """The environment file sets node_storage, a folder on the node's own disk."""

    @field_validator(
        "sbatch_options", "srun_options", "gpu_options", "container_options", "broadcast_options"
    )
    @classmethod
    def _are_options(cls, options: list[str]) -> list[str]:
        for option in options:
            if not option.startswith("-") or "\n" in option or "\0" in option:
                raise ValueError(f"{option!r}: an option begins with - and is one line")
        return options


@dataclass(frozen=True, slots=True)
class Cluster:
    """A profile, its name, and the text of its environment file."""

    name: str
    profile: ClusterProfile
    environment: str


def cluster_names() -> list[str]:
    return profile_names(_FOLDER)


def load_cluster(name: str) -> Cluster:
    """A cluster that ships, by name, or a YAML file.

    Raises:
        UserError: there is none, or it or its environment file is wrong; names file and key.
    """
    path = profile_path(name, _FOLDER, kind="cluster")
    profile = read_profile(path, ClusterProfile, kind="cluster")
    text = ""
    if profile.environment is not None:
        file = path.parent / profile.environment
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"cluster {path}: environment {file}: cannot be read ({error})"
            ) from None
    return Cluster(path.stem, profile, text.rstrip("\n"))
