"""What all tests share: real ranks, and which marked tests this machine can run."""

import functools
import os
import shutil
import subprocess
from collections.abc import Iterator

import hypothesis
import pytest

from tests.rank_pool import Ranks

# Threads that wait for work would else spin, and take the core from the rank that they wait for.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# A loaded machine makes single examples slow; that is no failure.
hypothesis.settings.register_profile("megatron-ext", deadline=None, print_blob=True)
hypothesis.settings.load_profile("megatron-ext")


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """`ranks.run(num, function, ...)`: the function in that many processes over gloo."""
    pool = Ranks()
    yield pool
    pool.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what the machine cannot run, and say what it lacks. Slow tests run."""
    lacks = {"gpu": _lacks_gpu, "slurm": _lacks_slurm, "netns": _lacks_network_namespaces}
    for item in items:
        for mark, find_lack in lacks.items():
            if item.get_closest_marker(mark) and (lack := find_lack()):
                item.add_marker(pytest.mark.skip(reason=f"{mark}: {lack}"))


@functools.cache
def _lacks_gpu() -> str:
    import torch

    return "" if torch.cuda.is_available() else "torch finds no CUDA or ROCm device"


@functools.cache
def _lacks_slurm() -> str:
    # The tests start a cluster of their own: they must not submit to a real one.
    return _lacks_root_and("srun", "sbatch", "slurmctld", "slurmd", "munged")


@functools.cache
def _lacks_network_namespaces() -> str:
    if lack := _lacks_root_and("ip", "tc", "unshare"):
        return lack
    probe = subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False)
    return "" if probe.returncode == 0 else "the kernel refuses a new network namespace"


def _lacks_root_and(*programs: str) -> str:
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    return "" if os.geteuid() == 0 else "needs root"
