"""Who is asked for this process's rank, in which order, and what is refused."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.errors import UserError
from megatron_ext.launch.ranks import (
    FileStoreAddress,
    RankInfo,
    TcpStoreAddress,
    discover,
    local_rank_environment,
)

# What torchrun --nnodes=2 --nproc-per-node=4 gives rank 6.
TORCHRUN = {
    "RANK": "6",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "2",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "node1.example",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RESTART_COUNT": "1",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
# What srun -N2 -n3 gives rank 2, in a job of other size.
SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "16",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "SLURM_STEP_NODELIST": "n[07-08]",
}
SINGLE = RankInfo(0, 1, 0, 1, "single", None)


def _tcp(info: RankInfo) -> TcpStoreAddress:
    assert isinstance(info.store, TcpStoreAddress)
    return info.store


def test_alone_by_default() -> None:
    assert discover({"PATH": "/bin"}) == SINGLE


def test_torchrun() -> None:
    store = TcpStoreAddress("node1.example", 29500, prefix="torchrun", is_kept_by_agent=True)
    assert discover(TORCHRUN) == RankInfo(6, 8, 2, 4, "torchrun", store)
    assert not discover(TORCHRUN).is_on_one_machine


def test_srun() -> None:
    info = discover(SRUN)
    assert (info.rank, info.world_size, info.local_rank, info.local_world_size) == (2, 3, 0, 1)
    assert info.source == "srun"
    assert (_tcp(info).host, _tcp(info).is_kept_by_agent) == ("n07", False)


def test_srun_takes_the_address_it_is_given() -> None:
    store = _tcp(discover(SRUN | {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "3442"}))
    assert (store.host, store.port) == ("10.0.0.7", 3442)


def test_srun_on_one_machine_meets_on_loopback() -> None:
    one_node = {"SLURM_STEP_TASKS_PER_NODE": "3", "SLURM_NODEID": "0", "SLURM_LOCALID": "2"}
    info = discover(SRUN | one_node)
    assert info.is_on_one_machine
    assert _tcp(info).host == "127.0.0.1"


def test_a_requeued_job_meets_elsewhere() -> None:
    assert _tcp(discover(SRUN)).prefix != _tcp(discover(SRUN | {"SLURM_RESTART_COUNT": "1"})).prefix


@given(st.integers(1, 2**32 - 1), st.integers(0, 10_000))
def test_srun_ports_are_outside_of_what_clients_are_given(job: int, step: int) -> None:
    info = discover(SRUN | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})
    assert 1024 < _tcp(info).port < 32768


@pytest.mark.parametrize(
    "change",
    [
        {"SLURM_STEP_NUM_TASKS": "1"},
        # The batch script itself and an interactive step: one process for the whole job.
        {"SLURM_STEP_ID": str(0xFFFFFFFB)},
        {"SLURM_STEP_ID": str(0xFFFFFFFA)},
    ],
)
def test_a_process_that_stands_for_a_whole_job_is_no_rank(change: dict[str, str]) -> None:
    assert discover(SRUN | change) == SINGLE
    without_step = {name: value for name, value in SRUN.items() if name != "SLURM_STEP_ID"}
    assert discover(without_step) == SINGLE


def test_the_local_launcher_is_understood_and_beats_what_it_was_started_in(tmp_path: Path) -> None:
    store = tmp_path / "store"
    around = TORCHRUN | SRUN | {"HOME": "/home/me"}
    environment = local_rank_environment(around, rank=1, num_ranks=3, store_path=store)
    assert environment["HOME"] == "/home/me"
    assert discover(environment) == RankInfo(1, 3, 1, 3, "local", FileStoreAddress(store))


def test_order(tmp_path: Path) -> None:
    local = local_rank_environment({}, rank=0, num_ranks=2, store_path=tmp_path / "store")
    explicit = RankInfo(1, 2, 1, 2, "explicit", FileStoreAddress(tmp_path))
    assert discover(local | SRUN | TORCHRUN, explicit=explicit) is explicit
    assert discover(local | SRUN | TORCHRUN).source == "torchrun"
    assert discover(local | SRUN).source == "srun"
    assert discover(local).source == "local"


@pytest.mark.parametrize(
    "name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
)
def test_torchrun_needs_each_variable(name: str) -> None:
    environment = {key: value for key, value in TORCHRUN.items() if key != name}
    with pytest.raises(UserError, match=rf"environment variable {name} is not set"):
        discover(environment)
    with pytest.raises(UserError, match=rf"environment variable {name} is empty"):
        discover(environment | {name: " "})


@pytest.mark.parametrize(
    "name", ["SLURM_LOCALID", "SLURM_NODEID", "SLURM_JOB_ID", "SLURM_STEP_TASKS_PER_NODE"]
)
def test_srun_needs_each_variable(name: str) -> None:
    environment = {key: value for key, value in SRUN.items() if key != name}
    with pytest.raises(UserError, match=rf"environment variable {name} is not set"):
        discover(environment)


@given(
    st.sampled_from(["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"]),
    st.one_of(st.text(min_size=1), st.integers(max_value=-1).map(str), st.floats().map(str)),
)
def test_numbers_are_numbers(name: str, value: str) -> None:
    if value.strip().isascii() and value.strip().isdigit():
        return
    with pytest.raises(UserError, match=name):
        discover(TORCHRUN | {name: value})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"RANK": "8"}, "RANK=8 and WORLD_SIZE=8"),
        ({"LOCAL_RANK": "4"}, "LOCAL_RANK=4 and LOCAL_WORLD_SIZE=4"),
        ({"RANK": "1"}, "RANK=1.* LOCAL_RANK=2"),
        ({"LOCAL_WORLD_SIZE": "9"}, "WORLD_SIZE=8.* LOCAL_WORLD_SIZE=9"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0': expected a whole number from 1"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT='65536'.* from 1 to 65535"),
        ({"MASTER_ADDR": "$(hostname)"}, "MASTER_ADDR='.*': expected a host name"),
    ],
)
def test_contradictions_of_torchrun_are_named(change: dict[str, str], named: str) -> None:
    with pytest.raises(UserError, match=named):
        discover(TORCHRUN | change)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"SLURM_PROCID": "3"}, "SLURM_PROCID=3 and SLURM_STEP_NUM_TASKS=3"),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x2)"}, r"'2\(x2\)'.* SLURM_STEP_NUM_TASKS=3"),
        ({"SLURM_NODEID": "2"}, "SLURM_NODEID=2"),
        ({"SLURM_LOCALID": "1"}, "SLURM_LOCALID=1"),
        ({"SLURM_STEP_NUM_TASKS": "many"}, "SLURM_STEP_NUM_TASKS='many'"),
    ],
)
def test_contradictions_of_srun_are_named(change: dict[str, str], named: str) -> None:
    with pytest.raises(UserError, match=named):
        discover(SRUN | change)


def test_what_an_earlier_local_run_left_is_named(tmp_path: Path) -> None:
    environment = local_rank_environment(
        {}, rank=0, num_ranks=2, store_path=tmp_path / "gone" / "store"
    )
    with pytest.raises(UserError, match=r"MEGATRON_EXT_STORE=.* left over"):
        discover(environment)


def test_impossible_ranks_cannot_be_made() -> None:
    with pytest.raises(UserError, match="impossible ranks"):
        RankInfo(2, 2, 0, 1, "explicit", FileStoreAddress(Path("x")))
    with pytest.raises(UserError, match="need a store"):
        RankInfo(0, 2, 0, 1, "explicit", None)
