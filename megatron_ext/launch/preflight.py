"""Before the first step: are all ranks alike, do they see one folder, does the network carry data?

A job that trains for hours on one node with another driver, or over TCP because a plug-in was not
found, costs more than these seconds. Every rank tells what it is (`rank_facts`), all exchange some
data (`link_trial`), and each comes to the same verdict from the same facts, so that a mismatch ends
all ranks with an error that names the host. Nothing is pickled: facts travel as JSON.
"""

from __future__ import annotations

import secrets
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_ext.errors import UserError
from megatron_ext.launch.link_trial import LinkSpeeds, try_links
from megatron_ext.launch.rank_facts import RankFacts, collect
from megatron_ext.launch.ranks import RankInfo

_FACTS_BYTES = 2048
_TRIAL_BYTES = {"cpu": 1 << 20, "cuda": 64 << 20}
_TRIAL_TIMEOUT_SECONDS = 120.0
# Logs of hosts that differ by more cannot be read together, and certificates and caches go wrong.
_MOST_CLOCK_SECONDS = 5.0
# Shared file systems show a new file to other nodes after some time.
_FILE_PATIENCE_SECONDS = 30.0
# A rank below this share of the median is told of, not refused.
_SLOW_SHARE = 0.4
_MOST_ROWS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class RankReport:
    """What all ranks know of one."""

    facts: RankFacts
    clock_seconds: float
    """Ahead of rank 0's clock."""
    sees_run_dir: bool
    speeds: LinkSpeeds


def preflight(
    info: RankInfo,
    device: torch.device,
    run_dir: Path,
    *,
    facts: RankFacts | None = None,
    clock: Callable[[], float] = time.time,
    say: Callable[[str], None] = print,
) -> list[RankReport]:
    """Compare all ranks; the process group is running.

    Args:
        facts: of this rank, if not those of this process.
        clock: seconds since the epoch.
        say: takes the table, on rank 0.

    Raises:
        UserError: on every rank, naming hosts that differ and what they have.
    """
    # The first collective loads the network's plug-in.
    dist.barrier()
    all_facts = _gathered_facts(facts or collect(info, device), device)
    # Ranks that differ may not get through what follows.
    _refuse(judge_facts(all_facts))
    speeds = try_links(
        device, num_bytes=_TRIAL_BYTES[device.type], timeout_seconds=_TRIAL_TIMEOUT_SECONDS
    )
    sees_run_dir = _sees_one_folder(run_dir, device)
    dist.barrier()
    # Doubles: a clock in float32 has steps of minutes.
    numbers = torch.tensor(
        [clock(), float(sees_run_dir), speeds.all_reduce, speeds.all_to_all, speeds.ring],
        dtype=torch.float64,
        device=device,
    )
    reports = _reports(all_facts, _gathered(numbers))
    if info.rank == 0:
        for line in table(reports):
            say(line)
    _refuse(judge(reports))
    return reports


def _refuse(found: Iterable[str]) -> None:
    if problems := list(found):
        raise UserError("preflight: the ranks cannot train together:\n  " + "\n  ".join(problems))


def judge_facts(facts: Sequence[RankFacts]) -> Iterator[str]:
    """What must not differ, and GPUs that are used twice: each names the hosts."""
    for name in sorted({name for each in facts for name in each.versions}):
        yield from _odd_ones(f"version of {name}", facts, _version_of(name))
    yield from _odd_ones("device", facts, lambda each: each.device)
    yield from _odd_ones("architecture", facts, lambda each: each.architecture)
    yield from _odd_ones("network plug-in", facts, lambda each: each.network)
    used = Counter((each.host, each.device_id) for each in facts if each.device_id)
    for (host, device_id), count in used.items():
        if count > 1:
            yield (
                f"{host}: {count} ranks compute on the GPU at {device_id}; each must have its own "
                "(srun --gpus-per-task=1, or as many ranks a node as GPUs)"
            )


def judge(reports: Sequence[RankReport]) -> Iterator[str]:
    """What must not be: each names the hosts, what they have and what the others have."""
    yield from judge_facts([report.facts for report in reports])
    late = [r for r in reports if abs(r.clock_seconds) > _MOST_CLOCK_SECONDS]
    if late:
        worst = max(late, key=lambda r: abs(r.clock_seconds))
        yield (
            f"clock: {_hosts([r.facts for r in late])}: up to {worst.clock_seconds:+.1f} s from "
            f"rank 0's; at most {_MOST_CLOCK_SECONDS:.0f} s are allowed"
        )
    blind = [r.facts for r in reports if not r.sees_run_dir]
    if blind:
        yield (
            f"run folder: {_hosts(blind)} cannot see what rank 0 writes there; log.run_dir must "
            "lie on a file system that all hosts share"
        )


def table(reports: Sequence[RankReport]) -> Iterator[str]:
    """A line a host; of many hosts only those that stand out, and one for the rest."""
    first = reports[0].facts
    versions = ", ".join(f"{name} {text}" for name, text in first.versions.items())
    yield f"preflight: {len(reports)} ranks; {versions}"
    rows = _rows(reports)
    slow = {row[0] for row in rows if row[-1]}
    width = max(4, *(len(row[0]) for row in rows))
    yield (
        f"  {'host':<{width}} {'ranks':>11} {'device':<24} {'clock':>8} {'all-reduce':>11} "
        f"{'all-to-all':>11} {'ring GB/s':>10}"
    )
    shown = rows if len(rows) <= _MOST_ROWS else [r for r in rows if r[0] in slow][:_MOST_ROWS]
    for host, ranks, device, clock, speeds, note in shown:
        yield (
            f"  {host:<{width}} {ranks:>11} {device:<24.24} {clock:>+7.2f}s {speeds[0]:>11.2f} "
            f"{speeds[1]:>11.2f} {speeds[2]:>10.2f}{note}"
        )
    if len(rows) > len(shown):
        rest = [row for row in rows if row not in shown]
        median = [statistics.median(row[4][kind] for row in rest) for kind in range(3)]
        yield (
            f"  {f'{len(rest)} more':<{width}} {'':>11} {rest[0][2]:<24.24} {'':>8} "
            f"{median[0]:>11.2f} {median[1]:>11.2f} {median[2]:>10.2f} (medians)"
        )
    if first.network:
        yield f"  network: {first.network}"


def _version_of(name: str) -> Callable[[RankFacts], str]:
    return lambda facts: facts.versions.get(name, "none")


Row = tuple[str, str, str, float, tuple[float, float, float], str]


def _rows(reports: Sequence[RankReport]) -> list[Row]:
    by_host: dict[str, list[RankReport]] = {}
    for report in reports:
        by_host.setdefault(report.facts.host, []).append(report)
    median = statistics.median(report.speeds.ring for report in reports)
    rows: list[Row] = []
    for host, of_host in by_host.items():
        slowest = [
            min(getattr(r.speeds, kind) for r in of_host) / 1e9
            for kind in ("all_reduce", "all_to_all", "ring")
        ]
        is_slow = min(r.speeds.ring for r in of_host) < _SLOW_SHARE * median
        ranks = [r.facts.rank for r in of_host]
        rows.append(
            (
                host,
                f"{ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else str(ranks[0]),
                of_host[0].facts.device,
                max((r.clock_seconds for r in of_host), key=abs),
                (slowest[0], slowest[1], slowest[2]),
                " slow" if is_slow else "",
            )
        )
    return rows


def _odd_ones(
    what: str, facts: Sequence[RankFacts], value: Callable[[RankFacts], str]
) -> Iterator[str]:
    counts = Counter(value(each) for each in facts)
    # The most frequent; where two are, rank 0's.
    most = max(counts.values())
    common = next(value(each) for each in facts if counts[value(each)] == most)
    for other in sorted(set(counts) - {common}):
        odd = [each for each in facts if value(each) == other]
        yield f"{what}: {_hosts(odd)}: {other}; the others have {common}"


def _hosts(facts: Sequence[RankFacts]) -> str:
    hosts = list(dict.fromkeys(each.host for each in facts))
    named = ", ".join(hosts[:8]) + (f" and {len(hosts) - 8} more" if len(hosts) > 8 else "")
    ranks = [str(each.rank) for each in facts[:8]]
    return f"{named} (rank {', '.join(ranks)}{', ...' if len(facts) > 8 else ''})"


def _reports(facts: Sequence[RankFacts], numbers: torch.Tensor) -> list[RankReport]:
    values = numbers.tolist()
    return [
        RankReport(
            facts=each,
            clock_seconds=row[0] - values[0][0],
            sees_run_dir=bool(row[1]),
            speeds=LinkSpeeds(*row[2:]),
        )
        for each, row in zip(facts, values, strict=True)
    ]


def _gathered_facts(own: RankFacts, device: torch.device) -> list[RankFacts]:
    data = own.to_json().encode("ascii")
    if len(data) > _FACTS_BYTES:
        raise UserError(f"preflight: rank {own.rank} has {len(data)} bytes to tell of itself")
    padded = torch.zeros(_FACTS_BYTES, dtype=torch.uint8)
    padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    rows = _gathered(padded.to(device)).cpu()
    return [RankFacts.from_json(bytes(row.tolist()).rstrip(b"\0").decode("ascii")) for row in rows]


def _gathered(tensor: torch.Tensor) -> torch.Tensor:
    """[ranks, ...]."""
    rows = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, tensor)
    return torch.stack(rows)


def _sees_one_folder(run_dir: Path, device: torch.device) -> bool:
    """Rank 0 writes a file that no earlier run can have written; does this rank read it?"""
    token = torch.tensor(list(secrets.token_bytes(8)), dtype=torch.uint8, device=device)
    dist.broadcast(token, src=0)
    text = bytes(token.tolist()).hex()
    file = run_dir / f".preflight-{text}"
    if dist.get_rank() == 0:
        file.write_text(text, encoding="ascii")
    dist.barrier()
    deadline = time.monotonic() + _FILE_PATIENCE_SECONDS
    while not (is_there := _reads(file, text)) and time.monotonic() < deadline:
        time.sleep(0.2)
    dist.barrier()
    if dist.get_rank() == 0:
        file.unlink(missing_ok=True)
    return is_there


def _reads(file: Path, text: str) -> bool:
    try:
        return file.read_text(encoding="ascii") == text
    except OSError:
        return False
