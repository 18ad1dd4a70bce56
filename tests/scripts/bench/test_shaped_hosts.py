"""Hosts with links of given speed: as slow as asked, in both directions at once, and gone."""

import subprocess
import sys
from pathlib import Path

import pytest

from scripts.bench.shaped_hosts import run_ranks, shaped_hosts, why_no_shaped_hosts

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(bool(why_no_shaped_hosts()), reason=f"netns: {why_no_shaped_hosts()}"),
]

_NUM_BYTES = 2_000_000
_JOB = f"""
import sys, time, torch
from torch import distributed as dist
from parallel.comm.exchange import Exchange, Message
dist.init_process_group("gloo")
other = 1 - dist.get_rank()
sent = torch.zeros({_NUM_BYTES}, dtype=torch.uint8)
received = torch.empty_like(sent)
for _ in range(2):
    dist.barrier()
    began = time.perf_counter()
    messages = [Message(sent, other, is_sent=True), Message(received, other, is_sent=False)]
    Exchange(None).post(messages).wait()
    seconds = time.perf_counter() - began
if other:
    open(sys.argv[1], "w").write(str(seconds))
dist.destroy_process_group()
"""


def test_a_link_carries_its_bytes_in_both_directions_at_once(tmp_path: Path) -> None:
    megabits_per_second = 100.0
    with shaped_hosts(2, megabits_per_second=megabits_per_second) as hosts:
        job = [sys.executable, "-c", _JOB, str(tmp_path / "seconds")]
        root = str(Path(__file__).resolve().parents[3])
        code = run_ranks(
            hosts, job, ranks_per_host=1, timeout_seconds=60, environment={"PYTHONPATH": root}
        )
    assert code == 0
    fastest = _NUM_BYTES * 8e-6 / megabits_per_second
    seconds = float((tmp_path / "seconds").read_text())
    # A few percent leave early in a burst; one direction after the other would take twice as long.
    assert 0.8 * fastest < seconds < 1.7 * fastest


def test_a_failing_rank_ends_the_others_and_nothing_stays() -> None:
    with shaped_hosts(2, megabits_per_second=100.0) as hosts:
        job = "import os, sys, time; time.sleep(60) if os.environ['RANK'] == '0' else sys.exit(7)"
        code = run_ranks(hosts, [sys.executable, "-c", job], ranks_per_host=1, timeout_seconds=30)
        names = [host.name for host in hosts]
    assert code == 7
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    assert not any(name in left for name in names)
