"""A prediction as lines for the terminal and as a tree for machines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from megatron_ext.planning.memory import MemoryBytes
from megatron_ext.planning.parameters import num_parameters
from megatron_ext.planning.predict import Prediction
from megatron_ext.planning.search import Choice, Outcome, SearchResult, long_name
from megatron_ext.planning.sensitivity import knob_effects
from megatron_ext.planning.step_time import StepSeconds
from megatron_ext.planning.subject import Subject

_GIB = 2**30
_SECONDS_WORDS = {
    "products": "matrix products",
    "attention": "attention",
    "memory": "norms, activation, sums",
    "overhead": "launching kernels",
    "recomputation": "recomputation",
    "tensor": "tensor-parallel messages",
    "experts": "experts' all-to-alls",
    "ring": "ring attention's messages",
    "pipeline": "messages between stages",
    "bubble": "pipeline's fill and drain",
    "data": "gradients and weights",
    "optimizer": "optimizer",
    "imbalance": "ranks that wait",
}


def tree(subject: Subject, found: Prediction, tokens: float) -> dict[str, Any]:
    """For --json."""
    layout = found.layout
    return {
        "memory_bytes": found.memory.to_dict(),
        "usable_memory_bytes": round(found.usable_bytes),
        "stage_memory_bytes": [stage.to_dict() for stage in found.stages],
        "step_seconds": found.step_seconds,
        "step_parts_seconds": found.seconds.to_dict(),
        "tokens_per_second": found.tokens_per_second,
        "model_tflops_per_device": found.model_tflops_per_device,
        "executed_tflops_per_device": found.executed_tflops_per_device,
        "mfu": found.mfu,
        "peak_tflops": found.peak_flops / 1e12,
        "fits": found.fits,
        "ranks": layout.num_ranks,
        "data_parallel_size": layout.data_size,
        "tokens_per_step": layout.tokens_per_step,
        "micro_batches_per_rank": layout.num_micro_batches,
        "tokens_in_all_steps": round(tokens),
        "parameters": num_parameters(subject.model),
        "days": found.days(tokens),
        "device_hours": found.device_hours(tokens),
        "balance": subject.balance,
        "device": subject.device_name,
        "assumptions": list(subject.assumptions),
    }


def describe(subject: Subject, found: Prediction, tokens: float) -> Iterator[str]:
    """Sizes, memory by stage, time by part, what a token budget costs."""
    layout = found.layout
    rows = {
        "parameters": f"{num_parameters(subject.model):,}",
        "ranks": f"{layout.num_ranks:,} = TP {layout.tensor_size} x PP {layout.pipeline_size} x DP "
        f"{layout.data_size}" + (f", EP {layout.expert_size}" if layout.expert_size > 1 else ""),
        "tokens per step": f"{layout.tokens_per_step:,} in {layout.num_micro_batches} micro-batches"
        f" of {layout.tokens_per_rank:,} a rank",
        "device": f"{subject.device.title}, {found.peak_flops / 1e12:g} TFLOP/s at most",
    }
    yield from (f"{name:24} {value}" for name, value in rows.items())
    yield ""
    yield from memory_lines(found)
    yield ""
    yield from time_lines(found.seconds)
    yield ""
    rows = {
        "tokens/s": f"{found.tokens_per_second:,.0f}",
        "model TFLOP/s a device": f"{found.model_tflops_per_device:.4g} (MFU {found.mfu:.1%})",
        f"{tokens:.3g} tokens": f"{_duration(found.days(tokens))}, "
        f"{found.device_hours(tokens):,.1f} device hours",
    }
    if found.executed_flops > found.model_flops:
        rows["counting recomputation"] = f"{found.executed_tflops_per_device:.4g} TFLOP/s a device"
    if subject.balance < 1.0:
        rows["balance"] = f"{subject.balance:.1%} of the bound for these lengths"
    yield from (f"{name:24} {value}" for name, value in rows.items())
    yield from (f"assumed: {sentence}" for sentence in subject.assumptions)


def _duration(days: float) -> str:
    if days >= 1:
        return f"{days:,.1f} days"
    return f"{days * 24:.1f} hours" if days * 24 >= 1 else f"{days * 86_400:.0f} s"


def memory_lines(found: Prediction) -> Iterator[str]:
    names = [name for name in MemoryBytes.__dataclass_fields__]
    yield "GiB of one rank  " + "".join(f"{name:>13}" for name in [*names, "total"])
    for numbers, stage in _alike(found.stages):
        values = [getattr(stage, name) for name in names] + [stage.total]
        yield f"stage {numbers:10} " + "".join(f"{value / _GIB:13.2f}" for value in values)
    usable, total = found.usable_bytes / _GIB, found.memory.total / _GIB
    if found.fits:
        yield f"fits: {total:.1f} of {usable:.1f} GiB that tensors may fill"
    else:
        yield f"DOES NOT FIT: {total:.1f} GiB, {total - usable:.1f} more than tensors may fill"


def time_lines(seconds: StepSeconds) -> Iterator[str]:
    yield f"{'step':24} {seconds.total:10.4g} s"
    for name, value in seconds.to_dict().items():
        if value > 0:
            yield f"  {_SECONDS_WORDS[name]:22} {value:10.4g} s {value / seconds.total:7.1%}"


def describe_search(
    result: SearchResult, *, given: Choice | None, seconds: float, tokens: float
) -> Iterator[str]:
    """The best five, why the rest failed, what each knob does."""
    best = result.best()
    yield f"{len(result.outcomes):,} layouts in {seconds:.2f} s; the fastest that fit:"
    for number, outcome in enumerate(best, start=1):
        yield f"{number}. {_outcome_line(outcome, tokens)}"
    if not best:
        yield "none fits; more ranks, or a device with more memory"
    yield from _beside_given(result, given, best)
    yield ""
    yield "why the others are out:"
    for reason, count in result.failures().most_common():
        yield f"  {count:6,} {reason}"
    missed = result.nearest_miss()
    if missed is not None:
        yield f"  nearest miss: {missed.choice}: {missed.missing_bytes / _GIB:.1f} GiB too much"
    if best:
        yield ""
        yield from _sensitivity(result, best[0].choice)


def search_tree(result: SearchResult, *, given: Choice | None, seconds: float) -> dict[str, Any]:
    """For --json."""
    missed = result.nearest_miss()
    return {
        "search_seconds": seconds,
        "num_layouts": len(result.outcomes),
        "best": [_outcome_tree(outcome) for outcome in result.best()],
        "given": None if given is None else {"choice": str(given), "place": result.rank(given)},
        "failures": dict(result.failures()),
        "nearest_miss": None
        if missed is None
        else {"choice": str(missed.choice), "missing_bytes": round(missed.missing_bytes)},
        "mean_shapley_tflops": dict(knob_effects(result)),
    }


def _outcome_tree(outcome: Outcome) -> dict[str, Any]:
    found = outcome.prediction
    assert found is not None
    choice = outcome.choice
    return {
        "tensor_model_parallel_size": choice.tensor,
        "pipeline_model_parallel_size": choice.pipeline,
        "expert_model_parallel_size": choice.expert,
        "tokens_per_rank": found.layout.tokens_per_rank,
        "recompute_granularity": choice.recompute,
        "use_distributed_optimizer": choice.zero == 1,
        "sequence_parallel": found.layout.sequence_parallel,
        "step_seconds": found.step_seconds,
        "model_tflops_per_device": found.model_tflops_per_device,
        "mfu": found.mfu,
        "memory_bytes": found.memory.to_dict(),
    }


def _outcome_line(outcome: Outcome, tokens: float) -> str:
    found = outcome.prediction
    assert found is not None
    return (
        f"{outcome.choice}: {found.step_seconds:.4g} s, {found.model_tflops_per_device:.1f} "
        f"TFLOP/s (MFU {found.mfu:.1%}), {found.memory.total / _GIB:.1f} GiB, "
        f"{_duration(found.days(tokens))}"
    )


def _beside_given(
    result: SearchResult, given: Choice | None, best: Sequence[Outcome]
) -> Iterator[str]:
    """Where the configuration's own layout stands, and what the best one saves."""
    if not best:
        return
    if given is None:
        yield "the configuration's own layout is not among them: it spreads sequences over ranks"
        return
    outcome = result.find(given)
    if outcome is None or outcome.prediction is None:
        reason = outcome.reason if outcome else "its values are not in the space"
        yield f"the configuration's {given}: not among them ({reason})"
        return
    own, first = outcome.prediction, best[0].prediction
    assert first is not None
    if best[0].choice == given:
        yield f"the configuration's {given} is the best of them"
        return
    place = result.rank(given)
    standing = f"number {place}" if place else "does not fit"
    yield (
        f"the configuration's {given} (sequence parallel where TP > 1): {standing}, "
        f"{own.step_seconds:.4g} s; of its step the best one changes"
    )
    before, after = own.seconds.to_dict(), first.seconds.to_dict()
    changes = {name: (after[name] - before[name]) / own.step_seconds for name in before}
    for name, change in sorted(changes.items(), key=lambda item: -abs(item[1])):
        if abs(change) >= 0.005:
            yield f"    {_SECONDS_WORDS[name]:24} {change:+.1%}"


def _sensitivity(result: SearchResult, best: Choice) -> Iterator[str]:
    yield "what each knob moves (mean |Shapley value| over all layouts, TFLOP/s a device), and what"
    yield "the best layout loses when only it is changed:"
    most = result.best(1)[0].tflops
    for knob, effect in knob_effects(result).items():
        others = []
        for outcome in result.changed(best, knob):
            word = str(outcome.choice.value(knob))
            if outcome.is_good:
                others.append(f"{word}: {outcome.tflops / most - 1:+.0%}")
            elif outcome.missing_bytes:
                others.append(f"{word}: {outcome.missing_bytes / _GIB:.0f} GiB too much")
        beside = f"; {best.value(knob)} -> {', '.join(others)}" if others else ""
        yield f"  {long_name(knob):24} {effect:6.2f}{beside}"


def _alike(stages: Sequence[MemoryBytes]) -> Iterator[tuple[str, MemoryBytes]]:
    """The first two, the last, and the fullest; as many lines for a hundred stages."""
    last = len(stages) - 1
    fullest = max(range(len(stages)), key=lambda stage: stages[stage].total)
    for stage in sorted({0, min(1, last), fullest, last}):
        yield (f"{stage} of {len(stages)}" if len(stages) > 1 else "0"), stages[stage]
