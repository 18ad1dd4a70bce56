"""Rendered job scripts: lint, dry runs at 2 and at a thousand nodes, what follows a step's end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.launch.cluster_profile import Launcher, cluster_names, load_cluster
from megatron_ext.launch.job_script import exported_names
from scripts.job_scripts import SCRIPTS, script
from tests.fake_site import FakeSite
from tests.megatron_ext.launch.rendered_job import lint, rendered

CLUSTERS = [name for name in cluster_names() if name != "local"]
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def site(tmp_path: Path) -> FakeSite:
    return FakeSite(tmp_path / "site")


# ---------------------------------------------------------------------------------- what is asked


@pytest.mark.parametrize("num_nodes", [2, 1024])
@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
@pytest.mark.parametrize("cluster", CLUSTERS)
def test_scripts_are_clean_and_start_every_rank_once(
    cluster: str, launcher: Launcher, num_nodes: int, site: FakeSite, tmp_path: Path
) -> None:
    profile = load_cluster(cluster).profile
    text = rendered(cluster, tmp_path / "run", num_nodes=num_nodes, launcher=launcher)
    lint(text)
    done = site.run(text)
    assert done.returncode == 0, done.stderr
    (step,) = site.calls("srun")
    ranks = profile.ranks_per_node
    tasks = ranks if launcher == "srun" else 1
    assert step.arguments[:3] == [
        f"--nodes={num_nodes}",
        f"--ntasks={num_nodes * tasks}",
        f"--ntasks-per-node={tasks}",
    ]
    assert "--kill-on-bad-exit=1" in step.arguments
    (rank,) = site.calls("python")
    words = ["train", "7b", f"log.run_dir={tmp_path / 'run'}"]
    if launcher == "srun":
        assert rank.arguments == ["-u", "-m", "megatron_ext", *words]
    else:
        assert rank.arguments[:3] == ["-u", "-m", "torch.distributed.run"]
        assert f"--nnodes={num_nodes}" in rank.arguments
        assert f"--nproc-per-node={ranks}" in rank.arguments
        head = "10.1.2.3" if cluster == "frontier" else "node0001"
        assert f"--rdzv-endpoint={head}:{15000 + 4711}" in rank.arguments
        assert "--rdzv-id=4711.0" in rank.arguments
        assert rank.arguments[-5:] == ["-m", "megatron_ext", *words]


@pytest.mark.parametrize("num_nodes", [1, 2, 1024])
def test_frontier_binds_one_gpu_to_each_task(
    num_nodes: int, site: FakeSite, tmp_path: Path
) -> None:
    text = rendered("frontier", tmp_path / "run", num_nodes=num_nodes)
    assert "#SBATCH --network=disable_rdzv_get\n" in text
    assert "#SBATCH --account=ABC123\n" in text
    assert site.run(text).returncode == 0
    (step,) = site.calls("srun")
    options = step.arguments[3:6]
    assert options == ["--cpus-per-task=7", "--gpus-per-task=1", "--gpu-bind=closest"]
    (module,) = site.calls("module")
    assert module.arguments[0] == "load"
    assert "rccl-net-plugin" in module.arguments
    seen = step.environment
    # The plug-in does not start on one node; on several its lack must end the job.
    assert seen["NCCL_NET"] == ("Socket" if num_nodes == 1 else "OFI")
    assert seen["FI_MR_CACHE_MONITOR"] == "kdreg2"
    assert seen["FI_CXI_RDZV_PROTO"] == "alt_read"
    assert seen["NCCL_SOCKET_IFNAME"] == "hsn0,hsn1,hsn2,hsn3"
    assert seen["MASTER_ADDR"] == "10.1.2.3"
    gpus = set()
    for local in range(8) if num_nodes == 2 else ():
        assert site.run(text, FAKE_LOCALID=str(local)).returncode == 0
        (rank,) = site.calls("python")
        assert rank.environment["SLURM_LOCALID"] == str(local)
        assert rank.environment["FAKE_GPUS"].count("GPU[") == 1
        gpus.add(rank.environment["FAKE_GPUS"])
    assert len(gpus) == (8 if num_nodes == 2 else 0)


@pytest.mark.parametrize(("cluster", "numa"), [("blackwell", 4), ("blackwell-nvl72", 2)])
def test_blackwell_binds_ranks_to_their_processor(
    cluster: str, numa: int, site: FakeSite, tmp_path: Path
) -> None:
    text = rendered(cluster, tmp_path / "run", num_nodes=32)
    ranks = load_cluster(cluster).profile.ranks_per_node
    assert f"#SBATCH --gpus-per-node={ranks}\n" in text
    assert ("#SBATCH --segment=16\n" in text) == (cluster == "blackwell-nvl72")
    for local in (0, ranks - 1):
        assert site.run(text, FAKE_LOCALID=str(local)).returncode == 0
        (binding,) = site.calls("numactl")
        node = local // numa
        assert binding.arguments[:2] == [f"--cpunodebind={node}", f"--membind={node}"]
    (step,) = site.calls("srun")
    assert f"--gpus-per-node={ranks}" in step.arguments
    assert step.environment["NVLINK_DOMAIN_SIZE"] == ("8" if cluster == "blackwell" else "72")


def test_the_users_own_environment_wins(site: FakeSite, tmp_path: Path) -> None:
    own: dict[str, Any] = {
        "NCCL_SOCKET_IFNAME": "hsn0",
        "FI_CXI_RX_MATCH_MODE": "software",
        "NCCL_NET": "",
    }
    assert site.run(rendered("frontier", tmp_path / "run"), **own).returncode == 0
    seen = site.calls("srun")[0].environment
    assert {name: seen[name] for name in own} == own


def test_an_environment_is_unpacked_on_the_nodes(site: FakeSite, tmp_path: Path) -> None:
    archive = "/lustre/my env.tar"
    text = rendered("frontier", tmp_path / "run", broadcast=archive)
    lint(text)
    assert "#SBATCH --constraint=nvme\n" in text
    done = site.run(text, ends=[(0, None, None), (0, None, None)])
    assert done.returncode == 0, done.stderr
    (cast,) = site.calls("sbcast")
    assert cast.arguments == ["-pf", archive, "/mnt/bb/somebody/megatron-ext.tar"]
    unpack, step = site.calls("srun")
    assert unpack.arguments[:3] == ["--nodes=2", "--ntasks=2", "--ntasks-per-node=1"]
    assert "/mnt/bb/somebody/env/bin/python" in step.arguments


def test_images(site: FakeSite, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    image = "/images/my image.sif"
    text = rendered("frontier", run_dir, container=image, mounts=("/lustre",))
    lint(text)
    site.run(text)
    words = site.calls("srun")[0].arguments
    first = words.index("apptainer")
    assert words[first : first + 3] == ["apptainer", "exec", "--rocm"]
    here = str(site.folder)
    binds = ["--bind", here, "--bind", str(run_dir), "--bind", "/lustre", "--pwd", here]
    assert words[first + 3 : first + 11] == binds
    assert words[words.index(image) + 1 :][:4] == ["python", "-u", "-m", "megatron_ext"]
    text = rendered("blackwell", run_dir, container=image, mounts=("/data:/data:ro",))
    lint(text)
    site.run(text)
    options = site.calls("srun")[0].arguments
    assert f"--container-image={image}" in options
    assert f"--container-mounts={here}:{here},{run_dir}:{run_dir},/data:/data:ro" in options
    (names,) = (each for each in options if each.startswith("--container-env="))
    # Exactly what the site sets; the image's own values would win over it.
    profile = load_cluster("blackwell")
    assert names.partition("=")[2].split(",") == exported_names(profile.environment)
    assert "NCCL_NVLS_ENABLE" in names
    assert "--no-container-mount-home" in options


def test_scripts_in_the_repository_are_what_launch_writes() -> None:
    folders = [ROOT / "scripts" / name for name in ("frontier", "blackwell", "local")]
    found = {path for folder in folders for path in folder.glob("*.sh")}
    assert found == {ROOT / "scripts" / name for name, _ in SCRIPTS}
    for name, words in SCRIPTS:
        text = (ROOT / "scripts" / name).read_text()
        assert text == script(words), f"{name}: python -m scripts.job_scripts writes it again"
        lint(text)


# ------------------------------------------------------------------------ what follows a step's end


def saved(run_dir: Path, step: int) -> tuple[str, int]:
    return (str(run_dir / "latest_checkpointed_iteration.txt"), step)


Ends = list[tuple[int, tuple[str, int] | None, str | None]]


@pytest.mark.parametrize(
    ("ends", "variables", "code", "num_starts", "is_requeued"),
    [
        pytest.param(lambda d: [(0, saved(d, 9), None)], {}, 0, 1, False, id="finished"),
        pytest.param(lambda d: [(0, saved(d, 9), str(d))], {}, 0, 1, True, id="warned"),
        pytest.param(lambda d: [(0, None, str(d))], {}, 1, 1, False, id="warned, no progress"),
        pytest.param(
            lambda d: [(0, saved(d, 9), str(d))],
            {"SLURM_RESTART_COUNT": "100"},
            1,
            1,
            False,
            id="warned once too often",
        ),
        pytest.param(lambda d: [(2, None, None)], {}, 2, 1, False, id="a mistake"),
        pytest.param(
            # Slurm ends the other ranks of one that was killed, and srun tells of theirs.
            lambda d: [(143, saved(d, 3), None), (0, saved(d, 9), None)],
            {},
            0,
            2,
            False,
            id="terminated, started again",
        ),
        pytest.param(lambda d: [(137, None, None)], {}, 137, 1, False, id="lost at once"),
        pytest.param(
            lambda d: [(137, saved(d, 3), None), (0, saved(d, 9), None)],
            {},
            0,
            2,
            False,
            id="lost, started again",
        ),
        pytest.param(
            lambda d: [(137, saved(d, 3), None), (1, saved(d, 3), None)],
            {},
            1,
            2,
            False,
            id="lost, no progress after",
        ),
        pytest.param(
            lambda d: [(1, saved(d, step), None) for step in range(9)],
            {},
            1,
            4,
            False,
            id="lost too often",
        ),
        pytest.param(
            lambda d: [(137, saved(d, 3), None), (0, saved(d, 5), str(d))],
            {},
            0,
            2,
            True,
            id="lost, then warned",
        ),
    ],
)
def test_after_a_step(
    ends: Callable[[Path], Ends],
    variables: dict[str, str],
    code: int,
    num_starts: int,
    is_requeued: bool,
    site: FakeSite,
    tmp_path: Path,
) -> None:
    run_dir = tmp_path / "run"
    done = site.run(rendered("slurm", run_dir), ends=ends(run_dir), **variables)
    assert done.returncode == code, done.stdout + done.stderr
    assert len(site.calls("srun")) == num_starts
    requeued = [call.arguments for call in site.calls("scontrol") if call.arguments[0] == "requeue"]
    assert requeued == ([["requeue", "4711"]] if is_requeued else [])
    assert not (run_dir / "STOP").exists()


def test_a_job_that_slurm_queues_again_and_again_ends(site: FakeSite, tmp_path: Path) -> None:
    """A node that is lost each time before a step is saved."""
    run_dir = tmp_path / "run"
    text = rendered("slurm", run_dir, max_requeues=5)
    steps = [None, None, 3, 3, 3]
    codes = []
    for restart, step in enumerate(steps):
        if step is not None:
            (run_dir / "latest_checkpointed_iteration.txt").write_text(f"{step}\n")
        done = site.run(text, SLURM_RESTART_COUNT=str(restart))
        codes.append((done.returncode, len(site.calls("srun"))))
    assert codes == [(0, 1)] * 4 + [(1, 0)]
    assert "the last two starts saved no step (3)" in done.stderr
    assert site.run(text, SLURM_JOB_ID="4712", SLURM_RESTART_COUNT="5").returncode == 0
    assert site.run(text, SLURM_JOB_ID="4713", SLURM_RESTART_COUNT="6").returncode == 1


def test_a_stale_trigger_file_stops_nothing(site: FakeSite, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "STOP").touch()
    assert site.run(rendered("slurm", run_dir)).returncode == 0
    assert not (run_dir / "STOP").exists()
