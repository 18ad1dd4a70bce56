"""A rank that is killed under torchrun: the run goes on in place, with the same bits.

`python scripts/bench/restarts.py` does it 20 times at random moments.
"""

from __future__ import annotations

from pathlib import Path

from scripts.bench.restarts import PATIENCE_SECONDS, configuration, kill_once, losses, start


def test_a_killed_rank_is_started_again_and_goes_on_exactly(tmp_path: Path) -> None:
    config = configuration(tmp_path, steps=16, save_interval=5)
    undisturbed = start(config, tmp_path / "undisturbed", num_ranks=2)
    assert undisturbed.wait(timeout=PATIENCE_SECONDS) == 0
    expected = losses(tmp_path / "undisturbed")
    assert [step for step, *_ in expected] == list(range(1, 17))
    found = kill_once(
        config,
        tmp_path / "killed",
        expected,
        number=0,
        rank=1,
        num_ranks=2,
        at_step=7,
        delay_seconds=0.0,
    )
    output = (tmp_path / "killed" / "output").read_text(errors="replace")
    assert found.has_gone_on, output
    assert found.is_equal, output
    assert 7 <= found.killed_at_step < 16
