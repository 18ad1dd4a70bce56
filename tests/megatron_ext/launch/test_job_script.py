"""Rendered job scripts: lint, dry runs at 2 and at a thousand nodes, what follows a step's end."""

from __future__ import annotations

import contextlib
import string
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_ext.errors import UserError
from megatron_ext.launch.cluster_profile import Launcher, cluster_names, load_cluster
from megatron_ext.launch.job import JobRequest, limit_seconds, make_job
from megatron_ext.launch.job_script import render
from scripts.job_scripts import SCRIPTS, script
from tests.fake_site import FakeSite

CLUSTERS = [name for name in cluster_names() if name != "local"]
ROOT = Path(__file__).resolve().parents[3]


def request(run_dir: Path, **changed: object) -> JobRequest:
    fields: dict[str, object] = {
        "words": ("7b", f"log.run_dir={run_dir}"),
        "run_dir": run_dir,
        "python": "python",
        "num_nodes": 2,
        "job_name": "run",
        "account": "ABC123",
    }
    return JobRequest(**(fields | changed))  # type: ignore[arg-type]


def rendered(cluster: str, run_dir: Path, **changed: object) -> str:
    return render(make_job(request(run_dir, **changed), load_cluster(cluster)))


def lint(text: str) -> None:
    done = subprocess.run(
        ["shellcheck", "--shell=bash", "-"], input=text, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


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
    assert words[first + 3 : first + 7] == ["--bind", str(run_dir), "--bind", "/lustre"]
    assert words[words.index(image) + 1 :][:4] == ["python", "-u", "-m", "megatron_ext"]
    text = rendered("blackwell", run_dir, container=image, mounts=("/data:/data:ro",))
    lint(text)
    site.run(text)
    options = site.calls("srun")[0].arguments
    assert f"--container-image={image}" in options
    assert f"--container-mounts={run_dir}:{run_dir},/data:/data:ro" in options
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
        pytest.param(lambda d: [(143, saved(d, 3), None)], {}, 143, 1, False, id="scancel"),
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


def test_a_stale_trigger_file_stops_nothing(site: FakeSite, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "STOP").touch()
    assert site.run(rendered("slurm", run_dir)).returncode == 0
    assert not (run_dir / "STOP").exists()


# ---------------------------------------------------------------------------------- hostile input

HOSTILE = st.one_of(
    st.sampled_from(
        [
            "$(touch canary)",
            "`touch canary`",
            "a b",
            "a'b",
            'a"b',
            "a\nb",
            "x\n#SBATCH --wrap=evil",
            "; touch canary",
            "& touch canary &",
            "$HOME",
            "${IFS}",
            "\\",
            "*",
            "~",
            "!!",
            "é漢",
            "a\n\ntouch canary\n",
        ]
    ),
    st.text(
        st.characters(exclude_characters="\0", exclude_categories=["Cs"]),
        min_size=1,
        max_size=12,
    ),
)
QUIET = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@QUIET
@given(word=HOSTILE, value=HOSTILE, folder=HOSTILE, launcher=st.sampled_from(["srun", "torchrun"]))
def test_words_paths_and_values_arrive_whole(
    word: str, value: str, folder: str, launcher: Launcher, site: FakeSite, tmp_path: Path
) -> None:
    run_dir = tmp_path / "runs" / folder.replace("/", "_").strip(".")
    words = (word, f"optim.lr={value}", f"log.run_dir={run_dir}")
    text = rendered("slurm", run_dir, words=words, launcher=launcher)
    done = site.run(text)
    assert done.returncode == 0, done.stderr
    (rank,) = site.calls("python")
    assert rank.arguments[-3:] == list(words)
    assert run_dir.is_dir()
    assert not list(tmp_path.rglob("canary"))


@QUIET
@given(image=HOSTILE, mount=HOSTILE, python=HOSTILE)
def test_images_and_interpreters_arrive_whole(
    image: str, mount: str, python: str, site: FakeSite, tmp_path: Path
) -> None:
    text = rendered("slurm", tmp_path / "run", container=image, mounts=(mount,), python=python)
    assert site.run(text).returncode == 0
    arguments = site.calls("srun")[0].arguments
    assert f"--container-image={image}" in arguments
    assert python in arguments
    assert any(each.startswith("--container-mounts=") and mount in each for each in arguments)
    assert not list(tmp_path.rglob("canary"))


@QUIET
@given(
    option=st.sampled_from(["job_name", "account", "partition", "qos", "reservation", "time"]),
    value=HOSTILE,
)
def test_values_for_slurm_are_plain_or_refused(option: str, value: str, tmp_path: Path) -> None:
    name = option.replace("_", "-")
    plain = string.ascii_letters + string.digits + "_.,:=@&|()*[]+-"
    if set(value) <= set(plain):
        with contextlib.suppress(UserError):
            line = f"#SBATCH --{name}={value}"
            assert line in rendered("slurm", tmp_path / "run", **{option: value}).splitlines()
        return
    with pytest.raises(UserError, match=f"--{name}"):
        rendered("slurm", tmp_path / "run", **{option: value})


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"num_nodes": 0}, "--nodes 0"),
        ({"num_nodes": 10**6}, "--nodes 1000000"),
        ({"time": "soon"}, "--time 'soon'"),
        ({"time": "0:30"}, "--time 0:30: the cluster's warning comes 600 s"),
        ({"segment": 4}, "--segment 4: nodes of cluster slurm share no NVLink"),
        ({"broadcast": "x.tar"}, "--broadcast: cluster slurm names no disk"),
        ({"container": ""}, "--container ''"),
        ({"account": "a b"}, "--account 'a b'"),
    ],
)
def test_requests_that_cannot_be_are_refused(
    changed: dict[str, object], named: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=named.replace("(", r"\(")):
        rendered("slurm", tmp_path / "run", **changed)


def test_segments_divide_the_nodes(tmp_path: Path) -> None:
    assert "--segment=9\n" in rendered("blackwell-nvl72", tmp_path, num_nodes=18)
    with pytest.raises(UserError, match="use one of 1, 2, 4, 8, 16"):
        rendered("blackwell-nvl72", tmp_path, num_nodes=16, segment=5)
    with pytest.raises(UserError, match="wants an account"):
        rendered("frontier", tmp_path, account=None)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("90:30", 5430), ("2:00:00", 7200), ("1-12", 129_600), ("1-0:5:7", 86_707)],
)
def test_time_limits_are_read_as_slurm_does(text: str, seconds: int) -> None:
    assert limit_seconds(text) == seconds
