"""Ranks meet in each of the ways they can be started, listen nowhere else, and part in order."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest
import torch
from torch import distributed

from megatron_ext.errors import UserError
from megatron_ext.launch import process_group
from megatron_ext.launch.ranks import FileStoreAddress, RankInfo, TcpStoreAddress
from tests.rank_pool import Ranks

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")


def _rank_info(store: TcpStoreAddress | FileStoreAddress, *, local_world_size: int) -> RankInfo:
    return RankInfo(
        rank=distributed.get_rank(),
        world_size=distributed.get_world_size(),
        local_rank=distributed.get_rank() % local_world_size,
        local_world_size=local_world_size,
        source="explicit",
        store=store,
    )


def _meet_at(port: int, host: str, local_world_size: int) -> tuple[float, list[str]]:
    """Leave the test's group, meet at a TCP store; the sum of 1 over ranks, and who listens."""
    address = TcpStoreAddress(host, port, prefix="test", is_kept_by_agent=False)
    info = _rank_info(address, local_world_size=local_world_size)
    distributed.destroy_process_group()
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    with process_group.running(info, device=CPU, timeout_seconds=20.0):
        return _sum_of_ones(), _listening_addresses()


def _sum_of_ones() -> float:
    one = torch.ones(1)
    distributed.all_reduce(one)
    return one.item()


def _listening_addresses() -> list[str]:
    return [
        connection.laddr.ip
        for connection in psutil.Process().net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    ]


def _sum_and_listening() -> tuple[float, list[str]]:
    return _sum_of_ones(), _listening_addresses()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_ranks_of_one_machine_listen_on_loopback_only(ranks: Ranks) -> None:
    for total, addresses in ranks.run(2, _sum_and_listening):
        assert total == 2.0
        assert addresses
        assert set(addresses) == {"127.0.0.1"}


@pytest.mark.parametrize("local_world_size", [1, 2])
def test_rank_0_keeps_a_store_at_one_address(ranks: Ranks, local_world_size: int) -> None:
    results = ranks.run(2, _meet_at, _free_port(), "127.0.0.1", local_world_size)
    for total, addresses in results:
        assert total == 2.0
        assert set(addresses) == {"127.0.0.1"}
    assert len(results[0][1]) == len(results[1][1]) + 1


def test_one_rank_needs_no_one(ranks: Ranks) -> None:
    assert ranks.run(1, _alone) == [1.0]


def _alone() -> float:
    distributed.destroy_process_group()
    info = RankInfo(0, 1, 0, 1, "single", None)
    assert process_group.start(info, device=CPU, timeout_seconds=5.0) == CPU
    total = _sum_of_ones()
    process_group.stop()
    process_group.stop()
    assert not distributed.is_initialized()
    return total


@pytest.mark.parametrize(
    ("host", "named"),
    [
        ("no-such-host.invalid", r"host 'no-such-host.invalid' has no address .*MASTER_ADDR"),
        # An address kept for documentation: surely not one of ours.
        ("192.0.2.1", r"cannot listen at 192.0.2.1 port .*MASTER_ADDR"),
    ],
)
def test_addresses_that_are_not_ours_are_named(host: str, named: str) -> None:
    store = TcpStoreAddress(host, _free_port(), prefix="test", is_kept_by_agent=False)
    with pytest.raises(UserError, match=named):
        process_group.start(RankInfo(0, 2, 0, 1, "srun", store), device=CPU, timeout_seconds=1.0)


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        store = TcpStoreAddress("127.0.0.1", port, prefix="test", is_kept_by_agent=False)
        info = RankInfo(0, 2, 0, 1, "srun", store)
        with pytest.raises(UserError, match=rf"port {port} .*MASTER_PORT to a free port"):
            process_group.start(info, device=CPU, timeout_seconds=1.0)


def test_a_rank_that_finds_nobody_says_where_it_looked() -> None:
    port = _free_port()
    store = TcpStoreAddress("127.0.0.1", port, prefix="test", is_kept_by_agent=False)
    info = RankInfo(1, 2, 0, 1, "srun", store)
    with pytest.raises(UserError, match=rf"rank 1 of 2 .*127.0.0.1 port {port}.*is rank 0 alive"):
        process_group.start(info, device=CPU, timeout_seconds=1.0)


RANK_SCRIPT = """
    import os, signal, sys, time
    from pathlib import Path
    import torch
    from megatron_ext.launch import process_group
    from megatron_ext.launch.ranks import discover

    info, folder = discover(), Path(sys.argv[1])
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    with process_group.running(info, device=torch.device("cpu"), timeout_seconds=30.0):
        tensor = torch.ones(1)
        for step in range(10_000):
            torch.distributed.all_reduce(tensor.fill_(1.0))
            (folder / f"pid_{info.rank}").write_text(str(os.getpid()))
            if step == 3 and info.source == "torchrun":
                if attempt == 0 and info.rank == 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                if attempt == 1:
                    break
            time.sleep(0.01)
    (folder / f"done_{attempt}_{info.rank}").write_text(str(tensor.item()))
"""


def _write_rank_script(folder: Path) -> Path:
    path = folder / "rank.py"
    path.write_text(textwrap.dedent(RANK_SCRIPT))
    return path


def test_torchrun_restarts_in_place(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["--max-restarts=1", str(_write_rank_script(tmp_path)), str(tmp_path)]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert {path.name for path in tmp_path.glob("done_*")} == {"done_1_0", "done_1_1"}
    assert {path.read_text() for path in tmp_path.glob("done_*")} == {"2.0"}


def test_a_rank_killed_in_a_collective_ends_all_in_seconds(tmp_path: Path) -> None:
    parent = (
        "import sys; from megatron_ext.launch.local import run_local\n"
        "sys.exit(run_local([sys.executable, *sys.argv[1:]], 2))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", parent, str(_write_rank_script(tmp_path)), str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 60.0
        while not all((tmp_path / f"pid_{rank}").exists() for rank in range(2)):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.02)
        pids = [int((tmp_path / f"pid_{rank}").read_text()) for rank in range(2)]
        os.kill(pids[1], signal.SIGKILL)
        killed_at = time.monotonic()
        _, stderr = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert time.monotonic() - killed_at < 8.0
    assert process.returncode == 128 + signal.SIGKILL
    assert "rank 1 of 2 was killed by SIGKILL" in stderr
    assert not any(psutil.pid_exists(pid) for pid in pids)
