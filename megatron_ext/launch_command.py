"""`megatron-ext launch`: the job script of a configuration on a cluster, written and submitted."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ext import exit_codes
from megatron_ext.config import Config
from megatron_ext.config_check import check_config
from megatron_ext.config_file import load_config
from megatron_ext.errors import UserError
from megatron_ext.launch.cluster_profile import Cluster, Launcher, load_cluster
from megatron_ext.launch.job import Job, JobRequest, make_job
from megatron_ext.launch.job_script import render

SCRIPT_FILE = "job.sh"


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchRequest:
    """Names as the options of the command."""

    source: str
    overrides: Sequence[str]
    cluster: str
    nodes: int
    is_print: bool = False
    ranks: int | None = None
    python: str | None = None
    job_name: str | None = None
    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    reservation: str | None = None
    time: str | None = None
    launcher: Launcher | None = None
    segment: int | None = None
    container: str | None = None
    mounts: Sequence[str] = ()
    broadcast: str | None = None
    max_restarts: int = 3
    max_requeues: int = 100


def launch(request: LaunchRequest) -> int:
    """Print the script, or write it into the run folder and submit it; returns the exit code."""
    cluster = _cluster(request)
    config = load_config(request.source, request.overrides)
    assert config.log.run_dir is not None
    run_dir = Path(config.log.run_dir).absolute()
    job = make_job(_job_request(request, config, run_dir), cluster)
    _check(config, job)
    text = render(job)
    for line in _warnings(config, job):
        print(f"warning: {line}", file=sys.stderr)
    if request.is_print:
        print(text, end="")
        return exit_codes.DONE
    script = run_dir / SCRIPT_FILE
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        script.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{script}: cannot be written ({error.strerror})") from None
    command = ["sbatch", str(script)] if cluster.profile.batch_system == "slurm" else None
    return _run(command or ["bash", str(script)])


def _run(command: list[str]) -> int:
    try:
        done = subprocess.run(command, check=False)
    except FileNotFoundError:
        raise UserError(
            f"{command[0]} is not here: run this on a login node of the cluster, or look at the "
            "script with --print"
        ) from None
    return exit_codes.DONE if done.returncode == 0 else exit_codes.FAILED


def _cluster(request: LaunchRequest) -> Cluster:
    cluster = load_cluster(request.cluster)
    if request.ranks is None:
        return cluster
    if cluster.profile.batch_system != "none":
        raise UserError(
            f"--ranks {request.ranks}: cluster {cluster.name} has "
            f"{cluster.profile.ranks_per_node} ranks a node; give --nodes"
        )
    if request.ranks < 1:
        raise UserError(f"--ranks {request.ranks}: at least 1")
    profile = cluster.profile.model_copy(update={"ranks_per_node": request.ranks})
    return Cluster(cluster.name, profile, cluster.environment)


def _job_request(request: LaunchRequest, config: Config, run_dir: Path) -> JobRequest:
    source = request.source
    if source.endswith((".yaml", ".yml")):
        source = str(Path(source).absolute())
    words = [word for word in request.overrides if not word.startswith("log.run_dir=")]
    python = request.python or ("python" if request.container else sys.executable)
    name = request.job_name
    if name is None:
        # Made from a file's name: what cannot stand in a job's name is left out.
        name = re.sub(r"[^A-Za-z0-9_.+-]+", "-", run_dir.name).strip("-.+")[:64] or "megatron-ext"
    return JobRequest(
        words=(source, *words, f"log.run_dir={run_dir}"),
        run_dir=run_dir,
        python=python,
        num_nodes=request.nodes,
        job_name=name,
        account=request.account or os.environ.get("SBATCH_ACCOUNT"),
        partition=request.partition,
        qos=request.qos,
        reservation=request.reservation,
        time=request.time,
        launcher=request.launcher,
        segment=request.segment,
        container=request.container,
        mounts=tuple(request.mounts),
        broadcast=request.broadcast,
        max_restarts=request.max_restarts,
        max_requeues=request.max_requeues,
    )


def _check(config: Config, job: Job) -> None:
    """Refuse what would die in its first minute."""
    profile = job.cluster.profile
    tensor = config.parallel.tensor_model_parallel_size
    if tensor > profile.ranks_per_node:
        raise UserError(
            f"parallel.tensor_model_parallel_size={tensor} is more than the "
            f"{profile.ranks_per_node} ranks of a node of {job.cluster.name}; use at most "
            f"{profile.ranks_per_node}, and more parallel.pipeline_model_parallel_size"
        )
    if config.launch.device == "cuda" and not profile.gpus_per_rank:
        raise UserError(
            f"launch.device=cuda, but ranks of cluster {job.cluster.name} have no GPU "
            "(gpus_per_rank: 0); use launch.device=cpu, or another cluster"
        )
    check_config(config, world_size=job.num_ranks)


def _warnings(config: Config, job: Job) -> list[str]:
    """What the planner says of it, where the cluster names its device."""
    device = job.cluster.profile.device_profile
    if device is None:
        return []
    from megatron_ext.planning.predict import predict
    from megatron_ext.planning.subject import subject_of

    checked = check_config(config, world_size=job.num_ranks)
    subject = subject_of(checked, num_ranks=job.num_ranks, device_name=device)
    found = predict(subject.model, subject.layout, subject.device)
    if found.fits:
        return []
    return [
        f"predicted {found.memory.total / 2**30:.1f} GiB on the fullest rank, "
        f"{found.usable_bytes / 2**30:.1f} GiB may be filled: it will not fit "
        f"(megatron-ext plan {' '.join(job.request.words[:1])} --device {device} tells more)"
    ]
