"""Every layout of a number of ranks, predicted: the fastest that fit, and why the others fail.

The space is small once memory and time are formulas (hundreds to a few thousand layouts, a second),
so it is searched whole: no sampler can find better, and effects of single knobs are exact.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from megatron_ext.planning.device_profile import DeviceProfile
from megatron_ext.planning.layout import Layout, ModelSize, Recompute
from megatron_ext.planning.predict import Prediction, predict

Knob = Literal["tensor", "pipeline", "expert", "sequences", "recompute", "zero"]
Value = int | str
_MOST_SEQUENCES = 16
_LONG_NAMES: dict[Knob, str] = {
    "tensor": "tensor parallel",
    "pipeline": "pipeline parallel",
    "expert": "expert parallel",
    "sequences": "micro-batch (sequences)",
    "recompute": "recomputation",
    "zero": "ZeRO stage",
}


@dataclass(frozen=True, slots=True)
class Choice:
    """One value of each knob; sequences: of the greatest length in a micro-batch of a rank."""

    tensor: int
    pipeline: int
    expert: int
    sequences: int
    recompute: Recompute
    zero: int

    def value(self, knob: Knob) -> Value:
        found: Value = getattr(self, knob)
        return found

    def __str__(self) -> str:
        words = [f"TP {self.tensor}", f"PP {self.pipeline}"]
        if self.expert > 1:
            words.append(f"EP {self.expert}")
        return ", ".join(
            [*words, f"MBS {self.sequences}", f"recompute {self.recompute}", f"ZeRO-{self.zero}"]
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a choice: a prediction, or the reason why there is none."""

    choice: Choice
    prediction: Prediction | None
    reason: str = ""

    @property
    def is_good(self) -> bool:
        return self.prediction is not None and self.prediction.fits

    @property
    def missing_bytes(self) -> float:
        """By how much it does not fit; 0 where it does."""
        if self.prediction is None or self.prediction.fits:
            return 0.0
        return self.prediction.memory.total - self.prediction.usable_bytes

    @property
    def tflops(self) -> float:
        """Of a device; 0 for what cannot run, as in the Frontier paper's search."""
        return self.prediction.model_tflops_per_device if self.is_good and self.prediction else 0.0


@dataclass(frozen=True, slots=True)
class SearchResult:
    """All outcomes, in the order of the grid (the last knob changes fastest)."""

    knobs: dict[Knob, tuple[Value, ...]]
    outcomes: tuple[Outcome, ...]

    def best(self, count: int = 5) -> list[Outcome]:
        """The fastest that fit."""
        good = [outcome for outcome in self.outcomes if outcome.is_good]
        return sorted(good, key=lambda outcome: -outcome.tflops)[:count]

    def rank(self, choice: Choice) -> int | None:
        """Place among those that fit, from 1; None where it is not among them."""
        order = [outcome.choice for outcome in self.best(len(self.outcomes))]
        return order.index(choice) + 1 if choice in order else None

    def find(self, choice: Choice) -> Outcome | None:
        return next((each for each in self.outcomes if each.choice == choice), None)

    def failures(self) -> Counter[str]:
        """How many failed for each reason."""
        return Counter(
            outcome.reason or "out of memory" for outcome in self.outcomes if not outcome.is_good
        )

    def nearest_miss(self) -> Outcome | None:
        """Out of memory by the least."""
        missed = [outcome for outcome in self.outcomes if outcome.missing_bytes > 0]
        return min(missed, key=lambda outcome: outcome.missing_bytes, default=None)

    def changed(self, choice: Choice, knob: Knob) -> Iterator[Outcome]:
        """The choice with this knob at each of its other values."""
        for outcome in self.outcomes:
            other = outcome.choice
            same = all(other.value(k) == choice.value(k) for k in self.knobs if k != knob)
            if same and other.value(knob) != choice.value(knob):
                yield outcome


def long_name(knob: Knob) -> str:
    return _LONG_NAMES[knob]


def search(
    model: ModelSize,
    base: Layout,
    device: DeviceProfile,
    *,
    global_batch_tokens: int,
    max_sequence_length: int,
    balance: float = 1.0,
) -> SearchResult:
    """Predict every layout of base.num_ranks.

    Args:
        base: what is not searched (formats, overlap, chunks a stage).
        global_batch_tokens: of a step; a layout that cannot divide it is refused.
        max_sequence_length: tokens; a micro-batch is a multiple of it.
    """
    knobs = _space(model, base, device)
    outcomes = []
    for values in itertools.product(*knobs.values()):
        choice = Choice(**dict(zip(knobs, values, strict=True)))  # type: ignore[arg-type]
        reason = refusal(
            choice,
            model,
            base,
            device,
            round_tokens=choice.sequences * max_sequence_length,
            global_batch_tokens=global_batch_tokens,
        )
        found = None
        if not reason:
            layout = _layout(choice, base, max_sequence_length, global_batch_tokens)
            found = predict(model, layout, device, balance=balance)
        outcomes.append(Outcome(choice, found, reason))
    return SearchResult(knobs, tuple(outcomes))


def choice_of(layout: Layout, *, max_sequence_length: int) -> Choice | None:
    """The knobs of a layout; None where a micro-batch holds no whole number of the longest."""
    if layout.tokens_per_rank % max_sequence_length:
        return None
    return Choice(
        tensor=layout.tensor_size,
        pipeline=layout.pipeline_size,
        expert=layout.expert_size,
        sequences=layout.tokens_per_rank // max_sequence_length,
        recompute=layout.recompute,
        zero=layout.zero_stage,
    )


def _space(model: ModelSize, base: Layout, device: DeviceProfile) -> dict[Knob, tuple[Value, ...]]:
    sequences = [2**k for k in range(_MOST_SEQUENCES.bit_length())]
    return {
        "tensor": tuple(_powers_of_two(max(device.ranks_per_node, base.tensor_size))),
        "pipeline": tuple(
            n
            for n in range(1, model.num_layers + 1)
            if model.num_layers % (n * base.virtual_size) == 0 and base.num_ranks % n == 0
        ),
        "expert": tuple(_powers_of_two(min(model.num_experts, base.num_ranks)))
        if model.num_experts
        else (1,),
        "sequences": tuple(sequences),
        "recompute": ("none", "selective", "full"),
        "zero": (0, 1),
    }


def _powers_of_two(at_most: int) -> Sequence[int]:
    return [2**k for k in range(at_most.bit_length()) if 2**k <= at_most]


def refusal(
    choice: Choice,
    model: ModelSize,
    base: Layout,
    device: DeviceProfile,
    *,
    round_tokens: int,
    global_batch_tokens: int,
) -> str:
    """Why this cannot run, whatever the memory; empty where it can."""
    t, p, e = choice.tensor, choice.pipeline, choice.expert
    if t > device.ranks_per_node and t != base.tensor_size:
        return "tensor parallel leaves the node"
    if base.num_ranks % (t * p):
        return "ranks are no multiple of TP x PP"
    sizes = (model.num_attention_heads, model.num_query_groups, model.ffn_hidden_size)
    if any(size % t for size in (*sizes, model.vocab_size, model.shared_ffn_size)):
        return "TP does not divide heads, query groups, inner width or vocabulary"
    data = base.num_ranks // (t * p)
    if model.num_experts and (model.num_experts % e or (t * data) % e or (e % t and t % e)):
        return "EP does not divide the experts or the ranks"
    if choice.zero == 1 and data == 1:
        return "ZeRO-1 without data parallelism is ZeRO-0"
    if global_batch_tokens % (round_tokens * data):
        return "the batch is no multiple of micro-batch x data-parallel ranks"
    return ""


def _layout(
    choice: Choice, base: Layout, max_sequence_length: int, global_batch_tokens: int
) -> Layout:
    data = base.num_ranks // (choice.tensor * choice.pipeline)
    tokens = choice.sequences * max_sequence_length
    return replace(
        base,
        tensor_size=choice.tensor,
        pipeline_size=choice.pipeline,
        virtual_size=base.virtual_size if choice.pipeline > 1 else 1,
        expert_size=choice.expert,
        sequence_parallel=choice.tensor > 1,
        tokens_per_rank=tokens,
        num_micro_batches=global_batch_tokens // (tokens * data),
        recompute=choice.recompute,
        zero_stage=choice.zero,
        context_size=1,
    )
