"""Runs whose linear layers multiply few bits: layouts, resuming, and what is refused."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.errors import UserError
from megatron_ext.precision.chosen_recipe import chosen_recipe, kept_layers
from megatron_ext.precision.linear_recipe import OPERANDS
from megatron_ext.precision.quantizer import Quantizer
from tests.megatron_ext.layout_settings import EP2, PLAIN, SP, TP2, ZERO1
from tests.megatron_ext.test_resume import resume_train, train_save_train
from tests.megatron_ext.tiny_run import tiny_config, tiny_tree, train_and_report
from tests.rank_pool import RankError, Ranks

# All groups divide the dims of two tensor-parallel ranks.
MODEL = {
    "num_layers": 2,
    "hidden_size": 64,
    "ffn_hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "qk_layernorm": True,
}


def recipe(name: str, **others: Any) -> dict[str, Any]:
    return {"dtype": "fp32", "recipe": name} | others


def distance(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """Between all gradients of the first step, over their size."""
    pairs = [(found["grads"][0][name], wanted) for name, wanted in expected["grads"][0].items()]
    difference = sum(float((one - wanted).square().sum()) for one, wanted in pairs)
    return math.sqrt(difference / sum(float(wanted.square().sum()) for _, wanted in pairs))


@pytest.mark.parametrize("name", ["fp8_tensorwise", "mxfp8", "mxfp4", "quartet"])
def test_two_tensor_parallel_ranks_equal_one(ranks: Ranks, corpus: Path, name: str) -> None:
    """Codes are the same (`test_linear.py`), products too up to the order of float32 sums.

    Such a difference, 1e-7, moves a value over a rounding threshold once in about 1e-7 / step
    values, and that value then by a step: of all values a share of 1e-5 is off by a tenth. So
    gradients agree to about 1e-3, two orders below what the recipe itself changes.
    """
    reports = {}
    for world_size, parallel in ((1, PLAIN), (2, TP2 | SP | ZERO1)):
        tree = tiny_tree(corpus, corpus.parent / name, parallel=parallel)
        tree |= {"model": MODEL, "precision": recipe(name)}
        parts = ranks.run(world_size, train_and_report, tree, 1, megatron=True)
        reports[world_size] = parts[0]
    plain = tiny_tree(corpus, corpus.parent / "plain", parallel=PLAIN)
    (exact,) = ranks.run(1, train_and_report, plain | {"model": MODEL}, 1, megatron=True)
    assert reports[2]["losses"][0] == pytest.approx(reports[1]["losses"][0], abs=1e-4)
    assert distance(reports[2], reports[1]) < 2e-3
    assert distance(reports[1], exact) > 1e-2


@pytest.mark.parametrize(
    ("name", "parallel"),
    [
        ("nvfp4", ZERO1),
        ("quartet2", ZERO1),
        ("fp8_tensorwise", ZERO1 | TP2 | SP),
    ],
)
def test_a_resumed_run_draws_the_same_numbers(
    ranks: Ranks, corpus: Path, tmp_path: Path, name: str, parallel: dict[str, Any]
) -> None:
    """Rounding and signs follow from the step; the largest magnitude is that of the moment."""
    tree = tiny_tree(corpus, tmp_path / "run", parallel=parallel)
    tree |= {"precision": recipe(name, keep_last_share=0.0)}
    tree["model"] = MODEL | {"hidden_size": 128, "ffn_hidden_size": 128}
    expected = ranks.run(2, train_save_train, tree, 2, 2, megatron=True)[0]
    for losses in ranks.run(2, resume_train, tree, 2, megatron=True):
        assert losses == expected


def test_another_recipe_is_refused_unless_asked_for(
    ranks: Ranks, corpus: Path, tmp_path: Path
) -> None:
    """Another name, another operand or other kept layers; who computes may change."""

    def tree(**precision: Any) -> dict[str, Any]:
        settings = recipe("mxfp8") | precision
        made = tiny_tree(corpus, tmp_path / "run", parallel=PLAIN, precision=settings)
        return made | {"model": MODEL}

    ranks.run(1, train_save_train, tree(), 1, 0, megatron=True)
    nearest = {"dgrad_grad": {"rounding": "stochastic"}}
    for precision, now in (
        ({"recipe": "bf16"}, "bf16"),
        ({"operands": nearest}, "mxfp8"),
        ({"keep_layers": [1]}, "mxfp8"),
    ):
        with pytest.raises(RankError, match=rf"recipe mxfp8:\w{{12}}, this run has {now}:\w{{12}}"):
            ranks.run(1, resume_train, tree(**precision), 1, megatron=True)
    ranks.run(1, resume_train, tree(backend="reference"), 1, megatron=True)
    allowed = tree(recipe="mxfp4") | {
        "checkpoint": {"save_interval": 0, "allow_precision_change": True}
    }
    ((loss,),) = ranks.run(1, resume_train, allowed, 1, megatron=True)
    assert math.isfinite(loss)


def test_recomputation_and_kept_layers(ranks: Ranks, corpus: Path) -> None:
    """A layer computed twice stores the same; all layers kept is no recipe at all."""
    found = {}
    for name, parallel, precision in (
        ("whole", PLAIN, recipe("mxfp8")),
        ("again", PLAIN | {"recompute_granularity": "full"}, recipe("mxfp8")),
        ("kept", PLAIN, recipe("mxfp8", keep_layers=[0, 1])),
        ("half", PLAIN, recipe("mxfp8", keep_last_share=0.5)),
        ("none", PLAIN, recipe("bf16")),
    ):
        tree = tiny_tree(corpus, corpus.parent / "again", parallel=parallel)
        tree |= {"model": MODEL, "precision": precision}
        (found[name],) = ranks.run(1, train_and_report, tree, 2, megatron=True)
    assert found["again"]["losses"] == found["whole"]["losses"]
    assert distance(found["again"], found["whole"]) == 0.0
    assert distance(found["kept"], found["none"]) == 0.0
    half = distance(found["half"], found["none"])
    assert 0 < half < distance(found["whole"], found["none"])


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        (recipe("quartet"), r"linear_fc2: forward_input .* groups of 32 .* 48"),
        # A Hadamard transform counts in formats, too, whose last block may be partly filled.
        (
            recipe(
                "fp8_blockwise",
                operands={
                    name: {"block_format": "fp8_1x128", "hadamard_group": 64}
                    for name in ("dgrad_grad", "dgrad_weight")
                },
            ),
            r"linear_qkv: dgrad_grad .* groups of 64 .* 96",
        ),
    ],
)
def test_groups_that_do_not_divide_are_named(
    ranks: Ranks, corpus: Path, precision: dict[str, Any], message: str
) -> None:
    tree = tiny_tree(corpus, corpus.parent / "wrong", parallel=TP2 | PLAIN)
    tree |= {"precision": precision}
    tree["model"] = MODEL | {"ffn_hidden_size": 96, "num_query_groups": 4}
    with pytest.raises(RankError, match=message):
        ranks.run(2, train_and_report, tree, 1, megatron=True)


def test_luq_is_refused_over_tensor_parallel_ranks(corpus: Path) -> None:
    tree = tiny_tree(corpus, corpus.parent / "luq", parallel=TP2, precision=recipe("luq"))
    with pytest.raises(UserError, match="moments of whole tensors"):
        tiny_config(tree, 2)


def test_layers_are_kept_by_list_or_by_share(corpus: Path) -> None:
    """Of four layers; a share is rounded up, and the recipe's own is what nvfp4 has."""
    for precision, expected in (
        ({"keep_layers": [0, 2]}, {0, 2}),
        ({"keep_layers": []}, set()),
        ({"keep_last_share": 0.5}, {2, 3}),
        ({"keep_last_share": 0.3}, {2, 3}),
        ({"keep_last_share": 0.0}, set()),
        ({}, {3}),
    ):
        tree = tiny_tree(corpus, corpus.parent / "kept", precision=recipe("nvfp4") | precision)
        config = tiny_config(tree, 1)
        assert kept_layers(config, chosen_recipe(config)) == expected


def test_everything_in_a_recipe_can_be_changed(corpus: Path) -> None:
    """Each field of each operand, and what backward reads, through the configuration."""
    values = {
        "block_format": "mxfp8",
        "rounding": "stochastic",
        "scale_rule": "headroom",
        "hadamard_group": 64,
        "signs": "random",
        "rounds_scale_up": True,
        "power_of_two_scales": True,
        "keeps_mask": True,
    }
    operands = {name: dict(values) for name in OPERANDS}
    precision = recipe("nvfp4", operands=operands, backward_reads="stored", backend="reference")
    changed = chosen_recipe(tiny_config(tiny_tree(corpus, corpus, precision=precision), 1))
    assert changed.backward_reads == "stored"
    assert changed.backend == "reference"
    fields = {field.name for field in dataclasses.fields(Quantizer)}
    assert fields - values.keys() == {"tries_four"}
    for quantizer in changed.operands().values():
        assert quantizer is not None
        assert quantizer.block_format.name == "mxfp8"
        for name in values.keys() - {"block_format"}:
            assert getattr(quantizer, name) == values[name]
    four = recipe("nvfp4", operands={"forward_input": {"tries_four": True}})
    quantizer = chosen_recipe(
        tiny_config(tiny_tree(corpus, corpus, precision=four), 1)
    ).forward_input
    assert quantizer is not None
    assert quantizer.tries_four


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        ({"operands": {"dgrad": {}}}, "no operand 'dgrad'"),
        ({"operands": {"dgrad_grad": {"block_format": "fp5"}}}, "no block format 'fp5'"),
        ({"operands": {"dgrad_grad": {"rounding": "up"}}}, "use nearest, stochastic"),
        ({"operands": {"wgrad_grad": {"hadamard_group": 24}}}, "use a power of two"),
        ({"operands": {"wgrad_grad": {"keeps_mask": 3}}}, "use true or false"),
        ({"operands": {"wgrad_grad": {"hadamard_group": 32}}}, "wgrad: .* cancel only where both"),
        (
            {"operands": {"forward_input": {"block_format": "mxfp8", "tries_four": True}}},
            "forward_input: tries_four corrects scales in E4M3",
        ),
        ({"keep_layers": [0, 4]}, "4 is no layer; there are 0 to 3"),
        ({"keep_layers": [0], "keep_last_share": 0.5}, "exclude each other"),
        ({"keep_last_share": 1.5}, "less than or equal to 1"),
    ],
)
def test_what_makes_no_sense_is_refused(
    corpus: Path, precision: dict[str, Any], message: str
) -> None:
    tree = tiny_tree(corpus, corpus.parent / "refused", precision=recipe("nvfp4") | precision)
    with pytest.raises(UserError, match=message):
        tiny_config(tree, 1)


MOE = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 64}


def test_experts_are_of_few_bits_wherever_they_are(ranks: Ranks, corpus: Path) -> None:
    """Two expert-parallel ranks equal one; see the tolerance above."""
    found = {}
    for name, world_size, parallel, precision in (
        ("one", 1, PLAIN, recipe("mxfp8")),
        ("two", 2, EP2 | PLAIN, recipe("mxfp8")),
        ("none", 1, PLAIN, recipe("bf16")),
        ("kept", 1, PLAIN, recipe("mxfp8", keep_last_share=1.0)),
    ):
        tree = tiny_tree(corpus, corpus.parent / "experts", parallel=parallel, moe=MOE)
        tree |= {"model": MODEL, "precision": precision}
        found[name] = ranks.run(world_size, train_and_report, tree, 1, megatron=True)[0]
    assert found["two"]["losses"][0] == pytest.approx(found["one"]["losses"][0], abs=1e-4)
    assert distance(found["kept"], found["none"]) == 0.0
    experts = {n for n in found["one"]["grads"][0] if "experts" in n}
    assert experts
    for report, least, most in (("two", 0.0, 3e-3), ("none", 1e-2, 0.2)):
        only = {
            which: {"grads": [{n: found[which]["grads"][0][n] for n in experts}]}
            for which in (report, "one")
        }
        assert least <= distance(only[report], only["one"]) < most


def test_experts_in_chunks_keep_their_dtype_so_they_are_refused(corpus: Path) -> None:
    tree = tiny_tree(corpus, corpus.parent / "refused", moe=MOE | {"moe_num_chunks": 2})
    with pytest.raises(UserError, match=r"set moe\.moe_num_chunks=1"):
        tiny_config(tree | {"precision": recipe("mxfp8")}, 1)
