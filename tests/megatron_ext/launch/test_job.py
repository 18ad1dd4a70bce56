"""Hostile and impossible requests: values reach the ranks whole, or are refused; none is run."""

from __future__ import annotations

import contextlib
import string
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_ext.errors import UserError
from megatron_ext.launch.cluster_profile import Launcher
from megatron_ext.launch.job import limit_seconds
from tests.fake_site import FakeSite
from tests.megatron_ext.launch.rendered_job import rendered


@pytest.fixture
def site(tmp_path: Path) -> FakeSite:
    return FakeSite(tmp_path / "site")


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
    max_examples=15,
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
        ({"words": ("\udcff",)}, "no UTF-8"),
        ({"account": "a b"}, "--account 'a b'"),
    ],
)
def test_requests_that_cannot_be_are_refused(
    changed: dict[str, object], named: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=named.replace("(", r"\(")):
        rendered("slurm", tmp_path / "run", **changed)


def test_folders_that_cannot_be_mounted_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a,b: with --container, a path with , or :"):
        rendered("slurm", tmp_path / "a,b", container="image")


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
