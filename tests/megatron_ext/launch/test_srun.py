"""Ranks started by a real srun find out who they are and meet."""

import json
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm_cluster import SlurmCluster, slurm_cluster

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).resolve().parents[3]

SCRIPT = """
    import json, os
    import torch
    from megatron_ext.launch import process_group
    from megatron_ext.launch.ranks import discover

    info = discover()
    with process_group.running(info, device=torch.device("cpu"), timeout_seconds=60.0):
        total = torch.tensor(float(info.rank))
        torch.distributed.all_reduce(total)
    keys = ("rank", "world_size", "local_rank", "local_world_size", "source")
    print(json.dumps([*(getattr(info, key) for key in keys), total.item()]))
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture
def script(tmp_path: Path) -> list[str]:
    path = tmp_path / "rank.py"
    path.write_text(textwrap.dedent(SCRIPT))
    # env, so that srun's tasks find the packages whatever they were started with.
    return ["env", f"PYTHONPATH={ROOT}", "OMP_NUM_THREADS=1", sys.executable, str(path)]


def test_two_machines(cluster: SlurmCluster, script: list[str]) -> None:
    # Virtual nodes have no host names of their own.
    done = cluster.run(
        ["srun", "--nodes=2", "--ntasks=3", *script],
        MASTER_ADDR="127.0.0.1",
        GLOO_SOCKET_IFNAME="lo",
    )
    assert done.returncode == 0, done.stderr
    found = sorted(json.loads(line) for line in done.stdout.splitlines())
    assert found == [
        [0, 3, 0, 2, "srun", 3.0],
        [1, 3, 1, 2, "srun", 3.0],
        [2, 3, 0, 1, "srun", 3.0],
    ]


def test_one_machine_needs_no_address(cluster: SlurmCluster, script: list[str]) -> None:
    done = cluster.run(["srun", "--nodes=1", "--ntasks=2", *script])
    assert done.returncode == 0, done.stderr
    found = sorted(json.loads(line) for line in done.stdout.splitlines())
    assert found == [[0, 2, 0, 2, "srun", 1.0], [1, 2, 1, 2, "srun", 1.0]]


def test_the_batch_script_itself_is_no_rank(cluster: SlurmCluster, tmp_path: Path) -> None:
    ask = "from megatron_ext.launch.ranks import discover; print(discover().source)"
    batch = tmp_path / "job.sh"
    batch.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} {sys.executable} -c "{ask}"\n')
    output = tmp_path / "out"
    command = ["sbatch", "--wait", "--nodes=2", "--ntasks=4", f"--output={output}", str(batch)]
    started = time.monotonic()
    done = cluster.run(command)
    assert done.returncode == 0, done.stderr
    while not output.exists() and time.monotonic() < started + 30.0:
        time.sleep(0.05)
    assert output.read_text() == "single\n"
