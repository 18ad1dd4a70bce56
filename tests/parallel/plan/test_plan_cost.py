"""FLOPs, cost and prediction against sums written out by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.errors import PlanError
from parallel.plan.cost import CostModel
from parallel.plan.flops import ModelShape, model_flops
from parallel.plan.predict import micro_batch_seconds, predict
from parallel.plan.records import MicroBatch, Piece, StepPlan

SHAPE = ModelShape(
    num_layers=3,
    hidden_size=16,
    ffn_hidden_size=40,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=100,
)
COST = CostModel(quadratic_seconds=2.0, linear_seconds=3.0, fixed_seconds=5.0)


def test_parameters_matrix_by_matrix() -> None:
    query, key, value, output = 16 * 32, 16 * 16, 16 * 16, 32 * 16
    gate, up, down = 16 * 40, 16 * 40, 40 * 16
    layer = query + key + value + output + gate + up + down
    assert SHAPE.matmul_parameters_per_layer == layer
    assert SHAPE.matmul_parameters == 3 * layer + 16 * 100


def test_llama_7b_has_its_parameters() -> None:
    shape = ModelShape(
        num_layers=32,
        hidden_size=4096,
        ffn_hidden_size=11008,
        num_attention_heads=32,
        num_query_groups=32,
        kv_channels=128,
        vocab_size=32000,
    )
    # 6,738,415,616 in all, less the embedding table and 65 norms of 4,096.
    assert shape.matmul_parameters == 6_738_415_616 - 32000 * 4096 - 65 * 4096


def test_model_flops_pair_by_pair() -> None:
    lengths = (5, 1, 9)
    pairs = sum(1 for length in lengths for i in range(length) for _ in range(i + 1))
    assert pairs == sum(length * (length + 1) // 2 for length in lengths)
    # Forward: two products of 8 channels (2 FLOPs each) for each pair, head and layer.
    attention = pairs * (2 * 2 * 8) * 4 * 3
    linear = 2 * SHAPE.matmul_parameters * sum(lengths)
    assert model_flops(SHAPE, lengths=lengths) == 3 * (attention + linear)


def test_packing_does_not_square_the_pack() -> None:
    apart = model_flops(SHAPE, lengths=[100] * 4)
    assert apart == pytest.approx(4 * model_flops(SHAPE, lengths=[100]))
    assert apart < model_flops(SHAPE, lengths=[400])
    assert model_flops(SHAPE, lengths=[]) == 0


def test_cost_from_model_counts_flops() -> None:
    model = CostModel.from_model(SHAPE, flops_per_second=1e3)
    length = 7
    forward_attention = length * (length + 1) // 2 * SHAPE.forward_flops_per_pair
    flops = 3 * 2 * SHAPE.matmul_parameters * length + 3.5 * forward_attention
    assert model.sequence_seconds(length) == pytest.approx(flops / 1e3)
    # Dearer than the model's FLOPs by attention's recomputed scores alone.
    difference = flops - model_flops(SHAPE, lengths=[length])
    assert difference == pytest.approx(0.5 * forward_attention)


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=8))
def test_pieces_add_up_to_their_sequence(places: list[int]) -> None:
    edges = sorted(places)
    pieces = COST.pieces_seconds(edges[:-1], edges[1:]).sum()
    assert pieces == pytest.approx(COST.pieces_seconds(edges[0], edges[-1]), abs=1e-6)
    assert COST.pieces_seconds(0, edges[-1]) == COST.sequence_seconds(edges[-1])


def test_cost_by_hand() -> None:
    assert COST.sequence_seconds(10) == 2 * 100 + 3 * 10
    assert COST.lengths_seconds([10, 1]).tolist() == [230, 5]
    batches = (MicroBatch((Piece(0, 0, 10), Piece(1, 0, 1))), MicroBatch())
    assert micro_batch_seconds(StepPlan((10, 1), 11, (batches,)), COST) == ((240, 5),)


PLAN = StepPlan(
    lengths=(10, 4, 4),
    tokens_per_rank=10,
    micro_batches=(
        (MicroBatch((Piece(0, 0, 10),)),),
        (MicroBatch((Piece(1, 0, 4),)), MicroBatch((Piece(2, 0, 4),))),
    ),
)


def test_prediction_by_hand() -> None:
    long, short = 230.0, 44.0
    found = predict(PLAN, COST)
    assert found.step_seconds == long + 5
    assert found.bound_seconds == long + 5
    assert found.efficiency == 1.0
    # Spread over both ranks the long sequence binds no more, but the mean does.
    assert predict(PLAN, COST, max_ranks_per_sequence=2).bound_seconds == pytest.approx(
        (long + 2 * short + 2 * 5) / 2
    )


def test_pipeline_adds_its_bubble_to_both() -> None:
    single = StepPlan(PLAN.lengths, PLAN.tokens_per_rank, (sum(PLAN.micro_batches, ()),))
    times = [235.0, 49.0, 49.0]
    found = predict(single, COST, num_pipeline_stages=4)
    # Stages exchange rows of one length: 6 tokens of padding in each of the short ones.
    padding = 2 * 6 * 3.0
    assert found.step_seconds == sum(times) + padding + 3 * 235.0
    assert found.padding_share == pytest.approx(padding / found.step_seconds)
    # The best plan has both short ones in one row; the bound knows of no whole sequences.
    best = 235.0 + (2 * 32 + 10 * 3 + 5) + 3 * 235.0
    assert 0.98 * best <= found.bound_seconds <= best
    assert found.idle_share == pytest.approx(3 * 235.0 / found.step_seconds)


def test_pipeline_of_equal_micro_batches() -> None:
    plan = StepPlan((4,) * 6, 4, (tuple(MicroBatch((Piece(i, 0, 4),)) for i in range(6)),))
    found = predict(plan, COST, num_pipeline_stages=3)
    assert found.step_seconds == (6 + 2) * 49
    assert found.bound_seconds == pytest.approx(found.step_seconds, rel=4e-3)
    assert found.bound_seconds <= found.step_seconds


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=12),
    num_ranks=st.integers(1, 4),
    stages=st.integers(1, 4),
    data=st.data(),
)
def test_no_plan_beats_the_bound(
    lengths: list[int], num_ranks: int, stages: int, data: st.DataObject
) -> None:
    ranks: list[list[MicroBatch]] = [[] for _ in range(num_ranks)]
    for sequence, length in enumerate(lengths):
        rank = data.draw(st.integers(0, num_ranks - 1))
        ranks[rank].append(MicroBatch((Piece(sequence, 0, length),)))
    plan = StepPlan(tuple(lengths), 50, tuple(tuple(rank) for rank in ranks))
    found = predict(plan, COST, num_pipeline_stages=stages)
    assert 0 < found.efficiency <= 1 + 1e-9


@pytest.mark.parametrize(
    ("constants", "complaint"),
    [
        ((float("nan"), 1.0, 0.0), "quadratic_seconds is nan"),
        ((0.0, -1.0, 0.0), "linear_seconds is -1.0"),
        ((0.0, 1.0, float("inf")), "fixed_seconds is inf"),
        ((0.0, 0.0, 1.0), "both 0"),
    ],
)
def test_constants_that_compare_no_plans_are_refused(
    constants: tuple[float, float, float], complaint: str
) -> None:
    with pytest.raises(PlanError, match=complaint):
        CostModel(*constants)
