"""The ranks come together, and part again properly.

A process group starts from a store in which ranks find each other's addresses. Where the store lies
depends on who started the ranks (`ranks.RankInfo.store`): a file for local ranks, the agent's
TCPStore under torchrun (a fresh prefix per attempt), rank 0's under srun. torch's own TCPStore
listens on every interface; ours is given a socket that is bound to one address. Ranks on one
machine talk over loopback.
"""

import atexit
import contextlib
import ipaddress
import os
import socket
import sys
from collections.abc import Iterator
from datetime import timedelta

import torch
from torch import distributed

from megatron_ext.errors import UserError
from megatron_ext.launch.attempt import agree_on_attempt
from megatron_ext.launch.ranks import FileStoreAddress, RankInfo, TcpStoreAddress

_LISTEN_BACKLOG = 4096


@contextlib.contextmanager
def running(
    info: RankInfo, *, device: torch.device, timeout_seconds: float
) -> Iterator[torch.device]:
    """A process group for the `with` block, ended however the block is left."""
    used_device = start(info, device=device, timeout_seconds=timeout_seconds)
    try:
        yield used_device
    finally:
        stop()


def start(info: RankInfo, *, device: torch.device, timeout_seconds: float) -> torch.device:
    """Join the default process group: gloo for a CPU `device`, NCCL (or RCCL) for a GPU.

    Returns the device this rank shall use, with its index. `timeout_seconds` bounds the meeting and
    later every collective. The group is ended at exit at the latest: a process that leaves without
    may abort in a communication thread and turn a good run into a failed one.

    Raises UserError when the ranks do not meet.
    """
    if info.is_on_one_machine:
        _stay_on_loopback()
    if device.type == "cuda":
        device = torch.device("cuda", _device_index(info, torch.cuda.device_count()))
        torch.cuda.set_device(device)
    atexit.register(stop)
    try:
        distributed.init_process_group(
            backend="gloo" if device.type == "cpu" else "nccl",
            store=_open_store(info, timeout_seconds),
            rank=info.rank,
            world_size=info.world_size,
            timeout=timedelta(seconds=timeout_seconds),
            device_id=None if device.type == "cpu" else device,
        )
    except distributed.DistError as error:
        raise UserError(
            f"rank {info.rank} of {info.world_size} did not meet the others within "
            f"{timeout_seconds:.0f} s ({_describe(info)}): {error}"
        ) from error
    return device


def stop() -> None:
    """Leave the process group; does nothing where there is none."""
    atexit.unregister(stop)
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _stay_on_loopback() -> None:
    loopback = "lo" if sys.platform == "linux" else "lo0"
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, loopback)


def _device_index(info: RankInfo, num_devices: int) -> int:
    if num_devices == 1 and (info.source == "srun" or info.local_world_size == 1):
        # The launcher (srun --gpus-per-task=1) shows each rank its own device only.
        return 0
    if info.local_rank >= num_devices:
        raise UserError(
            f"rank {info.rank} is number {info.local_rank} on this machine, which has "
            f"{num_devices} GPU(s); start at most {num_devices} ranks a machine "
            f"(--ranks {num_devices}), or use --device cpu"
        )
    return info.local_rank


def _open_store(info: RankInfo, timeout_seconds: float) -> distributed.Store:
    match info.store:
        case None:
            return distributed.HashStore()
        case FileStoreAddress(path):
            return distributed.FileStore(str(path), info.world_size)
        case TcpStoreAddress() as address:
            store = _open_tcp_store(info, address, timedelta(seconds=timeout_seconds))
            store = distributed.PrefixStore(f"megatron-ext/{address.prefix}", store)
            if not address.is_kept_by_agent:
                # Rank 0's store is as young as rank 0.
                return store
            attempt = agree_on_attempt(
                distributed.PrefixStore("attempt", store),
                rank=info.rank,
                world_size=info.world_size,
                timeout_seconds=timeout_seconds,
            )
            return distributed.PrefixStore(attempt, store)


def _open_tcp_store(
    info: RankInfo, address: TcpStoreAddress, timeout: timedelta
) -> distributed.Store:
    if address.is_kept_by_agent or info.rank > 0:
        return distributed.TCPStore(address.host, address.port, is_master=False, timeout=timeout)
    listener = _listen(address, is_on_one_machine=info.is_on_one_machine)
    return distributed.TCPStore(
        listener.getsockname()[0],
        address.port,
        is_master=True,
        wait_for_workers=False,
        timeout=timeout,
        # The store takes the socket over; its libuv server cannot.
        master_listen_fd=listener.detach(),
        use_libuv=False,
    )


def _listen(address: TcpStoreAddress, *, is_on_one_machine: bool) -> socket.socket:
    """A socket bound to the one address that `address.host` stands for."""
    try:
        family, _, _, _, target = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM
        )[0]
    except OSError as error:
        raise UserError(
            f"rank 0: host {address.host!r} has no address ({error}); set MASTER_ADDR to the "
            "address of rank 0's machine"
        ) from error
    is_spelt_loopback = address.host in ("localhost", str(target[0]))
    is_loopback = ipaddress.ip_address(str(target[0]).partition("%")[0]).is_loopback
    if is_loopback and not is_on_one_machine and not is_spelt_loopback:
        raise UserError(
            f"rank 0: host {address.host!r} means {target[0]} here, which other machines cannot "
            "reach; set MASTER_ADDR to the address of rank 0's machine on the common network"
        )
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(target)
        listener.listen(_LISTEN_BACKLOG)
    except OSError as error:
        listener.close()
        raise UserError(
            f"rank 0: cannot listen at {target[0]} port {address.port} ({error}); set MASTER_ADDR "
            "to an address of rank 0's machine and MASTER_PORT to a free port"
        ) from error
    return listener


def _describe(info: RankInfo) -> str:
    match info.store:
        case FileStoreAddress(path):
            return f"store: {path}"
        case TcpStoreAddress(host, port):
            return f"store: {host} port {port}; is rank 0 alive, is the port open between machines?"
        case None:
            return "alone"
