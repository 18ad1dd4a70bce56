"""A rank told on the command line, for launchers that are neither torchrun nor srun (mpirun, ssh).

What stands there is believed before anything in the environment. All of it or none: a rank that
guessed half of its place would wait for others that do not come.
"""

import argparse
import ipaddress
import re

from megatron_ext.errors import UserError
from megatron_ext.launch.ranks import RankInfo, TcpStoreAddress

_FLAGS = ("--rank", "--world-size", "--local-rank", "--local-world-size", "--master")


def add_rank_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "this process is one rank", "before what torchrun or srun say; all of these or none"
    )
    group.add_argument("--rank", type=int, metavar="N", help="number among all")
    group.add_argument("--world-size", type=int, metavar="N", help="how many in all")
    group.add_argument("--local-rank", type=int, metavar="N", help="number on this machine")
    group.add_argument("--local-world-size", type=int, metavar="N", help="how many on this machine")
    group.add_argument("--master", metavar="HOST:PORT", help="where rank 0 listens")


def explicit_rank(arguments: argparse.Namespace) -> RankInfo | None:
    """What the flags say; None where there are none.

    Raises UserError naming the flag that is missing, impossible or in another's way.
    """
    values = {flag: getattr(arguments, flag[2:].replace("-", "_")) for flag in _FLAGS}
    missing = [flag for flag in _FLAGS if values[flag] is None]
    if len(missing) == len(_FLAGS):
        return None
    given = [flag for flag in _FLAGS if flag not in missing]
    if missing:
        raise UserError(f"{', '.join(given)} without {', '.join(missing)}: give all five or none")
    if arguments.ranks is not None:
        raise UserError(
            f"--ranks {arguments.ranks} starts ranks, --rank {arguments.rank} says that this is "
            "one; leave one of them out"
        )
    return RankInfo(
        arguments.rank,
        arguments.world_size,
        arguments.local_rank,
        arguments.local_world_size,
        "explicit",
        _address(arguments.master),
    )


def _address(text: str) -> TcpStoreAddress:
    # [::1]:29500, as in a URL.
    found = re.fullmatch(
        r"(?:\[([0-9A-Fa-f:.%]+)\]|([A-Za-z0-9][A-Za-z0-9._-]*)):([0-9]{1,5})", text
    )
    if found is None or not 0 < int(found[3]) < 2**16:
        raise UserError(f"--master {text!r}: expected HOST:PORT, such as node01:29500")
    host = found[2] or found[1]
    if found[1]:
        try:
            ipaddress.ip_address(host)
        except ValueError:
            raise UserError(f"--master {text!r}: [{host}] is no IP address") from None
    return TcpStoreAddress(host, int(found[3]), prefix="explicit", is_kept_by_agent=False)
