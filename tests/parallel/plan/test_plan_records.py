"""A plan's own rules: each token once, limits kept, one digest everywhere, JSON there and back."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.errors import PlanError
from parallel.plan.records import MicroBatch, Piece, StepPlan

ROOT = Path(__file__).parents[3]

# Sequence 0 on one rank; sequence 1 over two ranks, head and tail together, as hybrid data
# parallelism cuts it; sequence 2 has no tokens.
PLAN = StepPlan(
    lengths=(5, 8, 0, 3),
    tokens_per_rank=9,
    micro_batches=(
        (MicroBatch((Piece(0, 0, 5), Piece(1, 0, 2), Piece(1, 6, 8))), MicroBatch()),
        (MicroBatch((Piece(1, 2, 4), Piece(1, 4, 6)), 0.5), MicroBatch((Piece(3, 0, 3),))),
        (),
    ),
)


def _with_first_batch(*pieces: Piece, offload_ratio: float = 0.0) -> StepPlan:
    first, *rest = PLAN.micro_batches
    return replace(PLAN, micro_batches=((MicroBatch(pieces, offload_ratio), *first[1:]), *rest))


def test_counts() -> None:
    PLAN.check()
    assert PLAN.num_ranks == 3
    assert PLAN.num_tokens == 16
    assert PLAN.micro_batches[0][0].num_tokens == 9
    assert PLAN.micro_batches[0][1].num_tokens == 0
    assert Piece(1, 2, 4).num_tokens == 2


WHOLE = (Piece(0, 0, 5), Piece(1, 0, 2), Piece(1, 6, 8))


@pytest.mark.parametrize(
    ("plan", "complaint"),
    [
        (_with_first_batch(*WHOLE[1:]), "sequence 0 is not computed at all"),
        (_with_first_batch(*WHOLE[:2]), "token 6 of sequence 1 is not computed"),
        (_with_first_batch(WHOLE[0], WHOLE[2]), "token 0 of sequence 1 is not computed"),
        (_with_first_batch(Piece(0, 0, 4), *WHOLE[1:]), "token 4 of sequence 0 is not computed"),
        (_with_first_batch(Piece(0, 1, 5), *WHOLE[1:]), "token 0 of sequence 0 is not computed"),
        (_with_first_batch(*WHOLE, Piece(0, 4, 5)), "token 4 of sequence 0 is computed twice"),
        (_with_first_batch(*WHOLE, Piece(1, 5, 6)), "token 5 of sequence 1 is computed twice"),
        (_with_first_batch(*WHOLE, Piece(0, 0, 5)), "token 0 of sequence 0 is computed twice"),
        (_with_first_batch(*WHOLE, Piece(4, 0, 1)), "names sequence 4; there are 4"),
        (_with_first_batch(*WHOLE, Piece(-1, 0, 1)), "names sequence -1"),
        (_with_first_batch(Piece(0, 0, 6), *WHOLE[1:]), r"0\.\.6 does not lie in sequence 0"),
        (_with_first_batch(Piece(0, -1, 5), *WHOLE[1:]), r"-1\.\.5 does not lie in sequence 0"),
        (_with_first_batch(*WHOLE, Piece(0, 2, 2)), r"2\.\.2 does not lie in sequence 0"),
        (_with_first_batch(*WHOLE, Piece(2, 0, 0)), r"0\.\.0 does not lie in sequence 2"),
        (
            replace(PLAN, tokens_per_rank=8),
            "micro-batch 0 of rank 0 holds 9 tokens; tokens_per_rank is 8",
        ),
        (_with_first_batch(*WHOLE, offload_ratio=1.5), "offload_ratio 1.5"),
        (replace(PLAN, micro_batches=()), "no rank"),
        (replace(PLAN, offloadable=1.0), r"offloadable is 1\.0"),
        (replace(PLAN, ulysses=(1, 4)), "ulysses names 4; there are 4"),
        (
            replace(PLAN, tokens_per_rank=6, offloadable=0.5),
            "micro-batch 0 of rank 0 holds 9 tokens; tokens_per_rank is 6",
        ),
        (
            replace(
                _with_first_batch(*WHOLE, offload_ratio=0.5), tokens_per_rank=6, offloadable=0.5
            ),
            "holds 9 tokens, 2 of them offloaded; tokens_per_rank is 6",
        ),
    ],
)
def test_a_broken_plan_is_refused_with_the_place(plan: StepPlan, complaint: str) -> None:
    with pytest.raises(PlanError, match=complaint):
        plan.check()


def test_a_plan_of_nothing_is_sound() -> None:
    StepPlan(lengths=(), tokens_per_rank=1, micro_batches=((), ())).check()
    StepPlan(lengths=(0, 0), tokens_per_rank=1, micro_batches=((MicroBatch(),),)).check()


def test_what_is_offloaded_makes_room() -> None:
    plan = replace(
        _with_first_batch(*WHOLE, offload_ratio=0.75), tokens_per_rank=6, offloadable=0.5
    )
    # 9 (1 - 0.75 x 0.5) = 5.6 stay.
    plan.check()
    assert plan.most_tokens == 12
    assert plan.longest_micro_batch == 9


def test_a_record_of_before_has_neither_heads_nor_offloading() -> None:
    record = PLAN.to_dict()
    del record["ulysses"], record["offloadable"]
    assert StepPlan.from_dict(record) == PLAN


@st.composite
def _cut_plans(draw: st.DrawFn) -> StepPlan:
    """Sequences cut anywhere, their pieces on any rank in any order."""
    lengths = draw(st.lists(st.integers(0, 30), max_size=6))
    num_ranks = draw(st.integers(1, 4))
    pieces = []
    for sequence, length in enumerate(lengths):
        cuts = sorted(draw(st.sets(st.integers(1, length - 1))) if length > 1 else ())
        edges = [0, *cuts, length] if length else []
        pieces += [Piece(sequence, start, end) for start, end in pairwise(edges)]
    batches: list[list[MicroBatch]] = [[] for _ in range(num_ranks)]
    for piece in draw(st.permutations(pieces)):
        rank = draw(st.integers(0, num_ranks - 1))
        ratio = draw(st.floats(0, 1))
        batches[rank].append(MicroBatch((piece,), ratio))
    return StepPlan(
        lengths=tuple(lengths),
        tokens_per_rank=30,
        micro_batches=tuple(tuple(rank) for rank in batches),
        ulysses=draw(st.sampled_from(((), tuple(range(len(lengths)))))),
        offloadable=draw(st.sampled_from((0.0, 0.5))),
    )


@given(_cut_plans())
def test_any_cut_that_covers_is_sound_and_survives_json(plan: StepPlan) -> None:
    plan.check()
    again = StepPlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    assert again.digest() == plan.digest()


@given(_cut_plans(), st.data())
def test_losing_or_repeating_a_piece_is_found(plan: StepPlan, data: st.DataObject) -> None:
    places = [(r, m) for r, batches in enumerate(plan.micro_batches) for m in range(len(batches))]
    if not places:
        return
    rank, index = data.draw(st.sampled_from(places))
    batches = plan.micro_batches[rank]
    kept = data.draw(st.sampled_from((0, 2)))
    changed = (*batches[:index], *(batches[index],) * kept, *batches[index + 1 :])
    broken = replace(
        plan,
        micro_batches=(*plan.micro_batches[:rank], changed, *plan.micro_batches[rank + 1 :]),
    )
    with pytest.raises(PlanError):
        broken.check()


CHANGES: tuple[Callable[[StepPlan], StepPlan], ...] = (
    lambda plan: replace(plan, tokens_per_rank=10),
    lambda plan: replace(plan, lengths=(5, 8, 3, 3)),
    lambda plan: replace(plan, micro_batches=plan.micro_batches[::-1]),
    lambda plan: replace(plan, micro_batches=(*plan.micro_batches, ())),
    lambda _: _with_first_batch(*WHOLE, offload_ratio=0.25),
    lambda _: _with_first_batch(*WHOLE[::-1]),
    lambda plan: replace(plan, ulysses=(1,)),
    lambda plan: replace(plan, ulysses=(1, 2)),
    lambda plan: replace(plan, offloadable=0.5),
    # The same pieces in the same order, with another border between micro-batches.
    lambda plan: replace(
        plan,
        micro_batches=(
            (MicroBatch(WHOLE[:1]), MicroBatch(WHOLE[1:])),
            *plan.micro_batches[1:],
        ),
    ),
)


def test_every_field_is_in_the_digest() -> None:
    digests = {PLAN.digest(), *(change(PLAN).digest() for change in CHANGES)}
    assert len(digests) == 1 + len(CHANGES)


def test_digest_is_the_same_in_another_process() -> None:
    code = (
        "import json, sys\n"
        "from parallel.plan.records import StepPlan\n"
        "print(StepPlan.from_dict(json.load(sys.stdin)).digest())\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(PLAN.to_dict()),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == PLAN.digest()
    assert len(PLAN.digest()) == 64


def test_json_form_is_the_documented_one() -> None:
    record = PLAN.to_dict()
    assert record["ranks"] == 3
    assert record["micro_batches"][1][0] == {
        "pieces": [
            {"sequence": 1, "start": 2, "end": 4},
            {"sequence": 1, "start": 4, "end": 6},
        ],
        "offload_ratio": 0.5,
    }


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"ranks": 4}, "ranks is 4, but micro_batches has 3"),
        ({"lengths": ["five"]}, "not a step plan"),
        ({"micro_batches": [[{"pieces": [{"sequence": 0}]}]]}, "not a step plan"),
        ({"micro_batches": None}, "not a step plan"),
    ],
)
def test_a_malformed_record_is_refused(change: dict[str, object], complaint: str) -> None:
    with pytest.raises(PlanError, match=complaint):
        StepPlan.from_dict({**PLAN.to_dict(), **change})


def test_large_plans_stay_quick() -> None:
    num_ranks, per_rank = 256, 200
    length = 64
    plan = StepPlan(
        lengths=(length,) * (num_ranks * per_rank),
        tokens_per_rank=length,
        micro_batches=tuple(
            tuple(MicroBatch((Piece(rank * per_rank + i, 0, length),)) for i in range(per_rank))
            for rank in range(num_ranks)
        ),
    )
    start = time.perf_counter()
    plan.check()
    plan.digest()
    seconds = time.perf_counter() - start
    # 0.06 s where it was written; the limit is for loaded machines.
    assert seconds < 1.0, f"{seconds:.2f} s for 51,200 pieces"
