"""The search: whole, right about the Frontier paper's case, and honest about the rest."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.config_check import check_config
from megatron_ext.config_file import load_config
from megatron_ext.planning.predict import predict
from megatron_ext.planning.search import Choice, SearchResult, choice_of, search
from megatron_ext.planning.sensitivity import knob_effects, shapley_values
from megatron_ext.planning.subject import subject_of


def searched(name: str, *words: str, ranks: int, device: str) -> tuple[SearchResult, Choice]:
    config = check_config(load_config(name, words), world_size=ranks)
    subject = subject_of(config, num_ranks=ranks, device_name=device)
    tokens, longest = config.train.global_batch_tokens, config.data.max_sequence_length
    assert tokens is not None
    result = search(
        subject.model,
        subject.layout,
        subject.device,
        global_batch_tokens=tokens,
        max_sequence_length=longest,
    )
    choice = choice_of(subject.layout, max_sequence_length=longest)
    assert choice is not None
    return result, choice


@pytest.fixture(scope="module")
def frontier() -> tuple[SearchResult, Choice, float]:
    began = time.perf_counter()
    result, given_choice = searched("frontier-175b", ranks=128, device="mi250x")
    return result, given_choice, time.perf_counter() - began


def test_the_papers_sizes_are_found_within_seconds(
    frontier: tuple[SearchResult, Choice, float],
) -> None:
    result, paper, seconds = frontier
    best = result.best(1)[0]
    assert seconds < 5
    # Their tensor, pipeline and micro-batch sizes; less recomputation, as sequence parallelism
    # leaves memory for it.
    same = ("tensor", "pipeline", "sequences", "zero")
    assert [getattr(best.choice, knob) for knob in same] == [getattr(paper, k) for k in same]
    own = result.find(paper)
    assert own is not None
    assert own.is_good
    assert best.tflops > own.tflops > 0


def test_the_best_fit_and_are_in_order(frontier: tuple[SearchResult, Choice, float]) -> None:
    result = frontier[0]
    best = result.best()
    assert len(best) == 5
    assert [each.tflops for each in best] == sorted((e.tflops for e in best), reverse=True)
    assert all(each.prediction is not None and each.prediction.fits for each in best)
    assert max(outcome.tflops for outcome in result.outcomes) == best[0].tflops
    assert result.rank(best[2].choice) == 3


def test_every_layout_is_told_of(frontier: tuple[SearchResult, Choice, float]) -> None:
    result = frontier[0]
    good = sum(outcome.is_good for outcome in result.outcomes)
    assert good + sum(result.failures().values()) == len(result.outcomes)
    assert len(result.outcomes) == np.prod([len(values) for values in result.knobs.values()])
    missed = result.nearest_miss()
    assert missed is not None
    assert (
        0
        < missed.missing_bytes
        == min(outcome.missing_bytes for outcome in result.outcomes if outcome.missing_bytes)
    )


def test_changes_of_one_knob_change_only_it(frontier: tuple[SearchResult, Choice, float]) -> None:
    result = frontier[0]
    choice = result.best(1)[0].choice
    for knob, values in result.knobs.items():
        found = [outcome.choice for outcome in result.changed(choice, knob)]
        assert len(found) == len(values) - 1
        for other in found:
            assert [k for k in result.knobs if other.value(k) != choice.value(k)] == [knob]


def test_experts_are_spread_too() -> None:
    result, _ = searched("deepseek-moe-16b", "launch.num_ranks=64", ranks=64, device="h100")
    best = result.best(1)[0]
    assert best.choice.expert > 1
    assert len(result.knobs["expert"]) > 3


def test_what_matters_in_the_papers_case(frontier: tuple[SearchResult, Choice, float]) -> None:
    effects = knob_effects(frontier[0])
    assert list(effects.values()) == sorted(effects.values(), reverse=True)
    # As in their figure: ZeRO-1 matters least.
    assert list(effects)[-1] == "zero"


@given(
    st.lists(st.integers(1, 3), min_size=1, max_size=4).flatmap(
        lambda shape: st.lists(
            st.floats(-10, 10), min_size=int(np.prod(shape)), max_size=int(np.prod(shape))
        ).map(lambda values: np.array(values).reshape(shape))
    )
)
def test_shapley_values_add_up(grid: np.ndarray) -> None:
    values = shapley_values(grid)
    np.testing.assert_allclose(sum(values), grid - grid.mean(), atol=1e-9)
    for axis, phi in enumerate(values):
        if grid.shape[axis] == 1:
            np.testing.assert_allclose(phi, 0, atol=1e-9)


def test_shapley_values_of_a_sum_are_its_terms() -> None:
    first, second = np.array([0.0, 3.0]), np.array([1.0, 2.0, 6.0])
    phi = shapley_values(first[:, None] + second[None, :])
    np.testing.assert_allclose(phi[0], np.broadcast_to((first - 1.5)[:, None], (2, 3)))
    np.testing.assert_allclose(phi[1], np.broadcast_to((second - 3.0)[None, :], (2, 3)))


@pytest.mark.parametrize("name", ["7b", "mixtral-8x7b"])
def test_the_search_says_of_a_layout_what_plan_says(name: str) -> None:
    result, _ = searched(name, ranks=64, device="h100")
    for outcome in [*result.best(3), result.nearest_miss()]:
        assert outcome is not None
        assert outcome.prediction is not None
        choice, found = outcome.choice, outcome.prediction
        words = {
            "tensor_model_parallel_size": choice.tensor,
            "sequence_parallel": choice.tensor > 1,
            "pipeline_model_parallel_size": choice.pipeline,
            "expert_model_parallel_size": choice.expert,
            "recompute_granularity": choice.recompute,
            "use_distributed_optimizer": choice.zero == 1,
        }
        overrides = [f"parallel.{key}={str(value).lower()}" for key, value in words.items()]
        overrides.append(f"data.tokens_per_rank={found.layout.tokens_per_rank}")
        config = check_config(load_config(name, overrides), world_size=64)
        subject = subject_of(config, num_ranks=64, device_name="h100")
        planned = predict(subject.model, subject.layout, subject.device)
        assert planned.memory.to_dict() == found.memory.to_dict()
        assert planned.step_seconds == pytest.approx(found.step_seconds, rel=1e-12)
