"""The comparison of all ranks before the first step: what passes, what stops, who is named."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_ext.errors import UserError
from megatron_ext.launch.link_trial import LinkSpeeds, try_links, value_of
from megatron_ext.launch.preflight import RankReport, judge, preflight, table
from megatron_ext.launch.rank_facts import RankFacts, collect, loaded_plugin
from megatron_ext.launch.ranks import RankInfo
from tests.rank_pool import Ranks

CPU = torch.device("cpu")
FACTS = RankFacts(
    rank=0,
    host="node000",
    local_rank=0,
    versions={"torch": "2.13.0", "rccl": "2.27.7"},
    device="AMD Instinct MI250X",
    architecture="gfx90a:sramecc+:xnack-",
    device_id="0:c1:0",
    network="librccl-net (NCCL_NET=OFI)",
)


def reports(num_hosts: int, per_host: int = 8) -> list[RankReport]:
    return [
        RankReport(
            facts=replace(
                FACTS,
                rank=rank,
                host=f"node{rank // per_host:03}",
                local_rank=rank % per_host,
                device_id=f"0:{rank % per_host:x}:0",
            ),
            clock_seconds=0.01,
            sees_run_dir=True,
            speeds=LinkSpeeds(20e9, 10e9, 9e9),
        )
        for rank in range(num_hosts * per_host)
    ]


def changed(all_reports: list[RankReport], rank: int, **fields: Any) -> list[RankReport]:
    report = all_reports[rank]
    own = {name: fields.pop(name) for name in list(fields) if hasattr(report.facts, name)}
    report = replace(report, facts=replace(report.facts, **own), **fields)
    return [*all_reports[:rank], report, *all_reports[rank + 1 :]]


def test_ranks_that_are_alike_pass() -> None:
    assert list(judge(reports(4))) == []


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        (
            {"versions": {"torch": "2.12.0", "rccl": "2.27.7"}},
            "version of torch: node002 (rank 17): 2.12.0; the others have 2.13.0",
        ),
        ({"versions": {"torch": "2.13.0"}}, "version of rccl: node002 (rank 17): none"),
        ({"device": "AMD Instinct MI300X"}, "device: node002 (rank 17): AMD Instinct MI300X"),
        ({"architecture": "gfx942"}, "architecture: node002 (rank 17): gfx942; the others have"),
        ({"network": "built in (NCCL_NET=OFI)"}, "network plug-in: node002 (rank 17): built in"),
        ({"clock_seconds": -61.0}, "clock: node002 (rank 17): up to -61.0 s"),
        ({"sees_run_dir": False}, "run folder: node002 (rank 17) cannot see"),
        ({"device_id": "0:0:0"}, "node002: 2 ranks compute on the GPU at 0:0:0"),
    ],
)
def test_the_host_that_differs_is_named(fields: dict[str, Any], named: str) -> None:
    (problem,) = judge(changed(reports(4), 17, **fields))
    assert problem.startswith(named)


def test_a_thousand_hosts_are_told_in_a_few_lines() -> None:
    some = reports(1000)
    slow = changed(some, 4321, speeds=LinkSpeeds(20e9, 10e9, 1e9))
    lines = list(table(slow))
    assert len(lines) < 10
    (line,) = [line for line in lines if line.endswith(" slow")]
    assert "node540" in line
    assert any("999 more" in line for line in lines)
    assert any("librccl-net (NCCL_NET=OFI)" in line for line in lines)
    # A slow link is told of, not refused.
    assert list(judge(slow)) == []


def test_plug_ins_are_seen_where_they_are_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NCCL_NET", raising=False)
    maps = tmp_path / "maps"
    maps.write_text("7f00-7f01 r-xp 0 00:00 1 /lib/libc.so.6\n")
    assert loaded_plugin(maps) == "built in"
    maps.write_text("7f00-7f01 r-xp 0 00:00 1 /opt/x/librccl-net.so\n" * 2)
    monkeypatch.setenv("NCCL_NET", "OFI")
    assert loaded_plugin(maps) == "librccl-net (NCCL_NET=OFI)"


# --------------------------------------------------------------------------------- on real ranks


def together(run_dir: Path, liar: int, lie: str) -> tuple[list[str], str]:
    """What rank 0 printed, and the error; `liar` is not what it should be."""
    rank, size = dist.get_rank(), dist.get_world_size()
    store = None if size == 1 else "unused"
    info = RankInfo(rank, size, rank, size, "local", store)  # type: ignore[arg-type]
    facts = collect(info, CPU)
    facts = replace(facts, host=f"host{rank}")
    clock, folder = time.time, run_dir
    if rank == liar:
        if lie == "version":
            facts = replace(facts, versions=facts.versions | {"torch": "1.0"})
        elif lie == "clock":

            def clock() -> float:
                return time.time() + 3600

        elif lie == "folder":
            folder = run_dir / "elsewhere"
    said: list[str] = []
    try:
        found = preflight(info, CPU, folder, facts=facts, clock=clock, say=said.append)
    except UserError as error:
        return said, str(error)
    assert len(found) == size
    assert all(each.speeds.ring > 0 for each in found)
    return said, ""


@pytest.mark.parametrize(
    ("lie", "named"),
    [
        ("", ""),
        ("version", "version of torch: host1 (rank 1): 1.0; the others have"),
        ("clock", "clock: host1 (rank 1): up to +3600."),
        ("folder", "run folder: host1 (rank 1) cannot see what rank 0 writes"),
    ],
)
def test_all_ranks_come_to_one_verdict(
    lie: str, named: str, ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = ranks.run(3, judged_soon, tmp_path, 1, lie)
    said, errors = [each[0] for each in results], [each[1] for each in results]
    assert len(set(errors)) == 1
    assert named in errors[0]
    assert bool(errors[0]) == bool(lie)
    # Ranks that differ are not tried further, so there is no table.
    assert bool(said[0]) == (lie != "version")
    assert not said[1]
    assert not said[2]
    assert not said[0] or any("host1" in line for line in said[0])
    assert not list(tmp_path.glob(".preflight-*"))


def judged_soon(run_dir: Path, liar: int, lie: str) -> tuple[list[str], str]:
    from megatron_ext.launch import preflight as module

    patience = module._FILE_PATIENCE_SECONDS
    module._FILE_PATIENCE_SECONDS = 0.5
    try:
        return together(run_dir, liar, lie)
    finally:
        module._FILE_PATIENCE_SECONDS = patience


def test_data_that_arrives_wrong_is_an_error(ranks: Ranks) -> None:
    errors = ranks.run(2, with_a_faulty_ring)
    assert errors[0] == ""
    assert "rank 1" in errors[1]
    assert "values of the ring are wrong" in errors[1]


@pytest.mark.parametrize("num_ranks", [2, 8_000, 100_000])
def test_sums_of_what_ranks_send_are_exact_in_any_order(num_ranks: int) -> None:
    # Whole numbers of at most 2^24 lose nothing in float32, nor does any part of their sum.
    sent = [value_of(rank) for rank in range(num_ranks)]
    assert all(value.is_integer() and value > 0 for value in sent)
    assert sum(sent) <= 2**24
    assert all(one != other for one, other in itertools.pairwise(sent))


def with_a_faulty_ring() -> str:
    real = torch.equal
    if dist.get_rank() == 1:
        calls = iter(range(100))

        def equal(input: torch.Tensor, other: torch.Tensor) -> bool:
            # The last exchange of the trial arrives with a flipped value.
            if next(calls) == 11:
                input[0] += 1
            return real(input, other)

        torch.equal = equal
    try:
        try_links(CPU, num_bytes=4096, timeout_seconds=30.0)
        return ""
    except UserError as error:
        return str(error)
    finally:
        torch.equal = real
