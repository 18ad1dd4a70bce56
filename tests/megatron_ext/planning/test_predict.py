"""Predicted speed: FLOPs as counted elsewhere, published runs, and what each change must do."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.config_file import load_config
from megatron_ext.model_shape import model_shape
from megatron_ext.planning.device_profile import load_profile
from megatron_ext.planning.layout import Layout, ModelSize, Recompute
from megatron_ext.planning.predict import model_flops_per_token, predict
from megatron_ext.planning.subject import config_model
from parallel.plan.flops import model_flops
from scripts.bench.planning import Published, predicted_tflops, published_runs

RUNS = {run.name: run for run in published_runs()}
FRONTIER = ("22B", "175B", "1T")


@pytest.mark.parametrize("name", RUNS)
def test_published_speeds_are_met_within_15_percent(name: str) -> None:
    assert predicted_tflops(RUNS[name]) == pytest.approx(RUNS[name].tflops, rel=0.15)


def smaller(run: Published) -> list[Layout]:
    """Half as many ranks for a model, as many models side by side."""
    tensor, pipeline = run.layout.tensor_size, run.layout.pipeline_size
    sizes = [(tensor, pipeline // 2), (tensor // 2, pipeline)]
    return [
        replace(run.layout, num_ranks=run.layout.num_ranks // 2, tensor_size=t, pipeline_size=p)
        for t, p in sizes
        if t
    ]


@pytest.mark.parametrize("name", FRONTIER)
def test_frontier_models_fit_where_they_ran_and_not_one_step_smaller(name: str) -> None:
    run, device = RUNS[name], load_profile("mi250x")
    assert predict(run.model, run.layout, device).fits
    for layout in smaller(run):
        assert not predict(run.model, layout, device).fits


@pytest.mark.parametrize("name", FRONTIER)
def test_recipes_have_the_layouts_of_the_paper(name: str) -> None:
    config = load_config(f"frontier-{name.lower()}")
    layout = RUNS[name].layout
    assert config.launch.num_ranks == layout.num_ranks
    assert config.parallel.tensor_model_parallel_size == layout.tensor_size
    assert config.parallel.pipeline_model_parallel_size == layout.pipeline_size
    assert config.train.global_batch_tokens == layout.tokens_per_step
    assert config.parallel.use_distributed_optimizer == bool(layout.zero_stage)
    assert config.parallel.recompute_granularity == layout.recompute


@pytest.mark.parametrize("name", ["quickstart", "moe-quickstart", "7b", "deepseek-moe-16b"])
def test_flops_are_those_that_training_reports(name: str) -> None:
    config = load_config(name)
    model = config_model(config, vocab_size=4096)
    length = model.sequence_length
    expected = model_flops(model_shape(config, 4096), lengths=[length]) / length
    assert model_flops_per_token(model) == pytest.approx(expected, rel=1e-12)


def layouts() -> st.SearchStrategy[Layout]:
    return st.builds(
        make_layout,
        tensor=st.sampled_from([1, 2, 4, 8]),
        pipeline=st.sampled_from([1, 2, 4]),
        data=st.sampled_from([1, 2, 16]),
        micro_batches=st.integers(4, 64),
        recompute=st.sampled_from(["none", "selective", "full"]),
    )


def make_layout(
    *, tensor: int, pipeline: int, data: int, micro_batches: int, recompute: Recompute
) -> Layout:
    base = RUNS["Llama 3 70B FP8, 256"].layout
    return replace(
        base,
        num_ranks=tensor * pipeline * data,
        tensor_size=tensor,
        pipeline_size=pipeline,
        virtual_size=1,
        sequence_parallel=tensor > 1,
        num_micro_batches=micro_batches,
        recompute=recompute,
        number_format="bf16",
    )


MODEL: ModelSize = RUNS["Llama 3 70B FP8, 256"].model


@given(layouts())
def test_parts_add_up_and_no_run_beats_the_peak(layout: Layout) -> None:
    found = predict(MODEL, layout, load_profile("h100"))
    parts = found.seconds.to_dict()
    assert min(parts.values()) >= 0
    assert sum(parts.values()) == pytest.approx(found.step_seconds)
    assert 0 < found.mfu < load_profile("h100").gemm_efficiency
    assert found.tokens_per_second * found.step_seconds == pytest.approx(layout.tokens_per_step)


@given(layouts())
def test_recomputation_trades_time_for_memory(layout: Layout) -> None:
    device = load_profile("h100")
    none, full = (
        predict(MODEL, replace(layout, recompute=each), device) for each in ("none", "full")
    )
    assert full.step_seconds > none.step_seconds
    assert full.memory.activations < none.memory.activations


@given(layouts())
def test_the_bubble_is_p_less_1_of_m(layout: Layout) -> None:
    # Equal stages: the output layer's share is taken out by a vocabulary of one row a rank.
    model = replace(MODEL, vocab_size=layout.tensor_size)
    seconds = predict(model, layout, load_profile("h100")).seconds
    busy = seconds.total - seconds.bubble - seconds.data - seconds.optimizer - seconds.pipeline
    expected = busy * (layout.pipeline_size - 1) / layout.num_micro_batches
    assert seconds.bubble == pytest.approx(expected, rel=0.01)


@given(layouts(), st.floats(0.3, 1.0))
def test_balance_divides_the_speed(layout: Layout, balance: float) -> None:
    device = load_profile("h100")
    even, uneven = (predict(MODEL, layout, device, balance=b).seconds for b in (1.0, balance))
    assert even.imbalance == 0
    assert uneven.total - uneven.imbalance == pytest.approx(even.total)
    busy = even.total - even.bubble - even.data - even.optimizer - even.pipeline
    assert uneven.imbalance == pytest.approx(busy * (1 / balance - 1), abs=1e-9)


def test_fp8_is_faster_where_the_device_has_it() -> None:
    layout = make_layout(tensor=4, pipeline=4, data=2, micro_batches=16, recompute="none")
    few = replace(layout, number_format="fp8")
    gains = {
        name: predict(MODEL, few, load_profile(name)).tokens_per_second
        / predict(MODEL, layout, load_profile(name)).tokens_per_second
        for name in ("h100", "mi250x")
    }
    assert gains["h100"] > 1.2
    assert gains["mi250x"] < 1.0
