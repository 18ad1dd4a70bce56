"""Ranks told by flags."""

import subprocess
import sys

import pytest

from megatron_ext.cli import build_parser
from megatron_ext.errors import UserError
from megatron_ext.launch.rank_flags import explicit_rank
from megatron_ext.launch.ranks import RankInfo, TcpStoreAddress, discover

FLAGS = {
    "--rank": "3",
    "--world-size": "4",
    "--local-rank": "1",
    "--local-world-size": "2",
    "--master": "node01:29500",
}


def _explicit(**changed: str | None) -> RankInfo | None:
    flags = FLAGS | {"--" + name.replace("_", "-"): value for name, value in changed.items()}
    words = [word for flag, value in flags.items() if value is not None for word in (flag, value)]
    return explicit_rank(build_parser().parse_args(["train", "quickstart", *words]))


def test_flags_come_before_torchrun_and_srun() -> None:
    store = TcpStoreAddress("node01", 29500, prefix="explicit", is_kept_by_agent=False)
    expected = RankInfo(3, 4, 1, 2, "explicit", store)
    environment = {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "SLURM_PROCID": "1",
        "SLURM_STEP_ID": "0",
    }
    assert discover(environment, explicit=_explicit()) == expected


def test_without_flags_the_environment_speaks() -> None:
    assert explicit_rank(build_parser().parse_args(["train", "quickstart"])) is None


def test_an_address_of_the_new_kind() -> None:
    info = _explicit(master="[fe80::1]:80")
    assert info is not None
    assert isinstance(info.store, TcpStoreAddress)
    assert (info.store.host, info.store.port) == ("fe80::1", 80)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"master": None, "local_rank": None}, "without --local-rank, --master: give all five"),
        ({"ranks": "2"}, "--ranks 2 starts ranks, --rank 3 says that this is one"),
        ({"rank": "4"}, r"impossible ranks \(explicit\): rank 4 of 4"),
        ({"local_rank": "2"}, "local rank 2 of 2 on this machine"),
        ({"master": "node01"}, "--master 'node01': expected HOST:PORT"),
        ({"master": "node01:70000"}, "expected HOST:PORT"),
        ({"master": "$(id):1"}, "expected HOST:PORT"),
        ({"master": "[::zz]:1"}, "expected HOST:PORT"),
        ({"master": "[1:2]:1"}, r"\[1:2\] is no IP address"),
    ],
)
def test_mistakes_are_named(changed: dict[str, str | None], named: str) -> None:
    with pytest.raises(UserError, match=named):
        _explicit(**changed)


def test_the_command_passes_them_on() -> None:
    words = ["train", "quickstart", "--rank", "0"]
    done = subprocess.run(
        [sys.executable, "-m", "megatron_ext", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "--rank without --world-size" in done.stderr
