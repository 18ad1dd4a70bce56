"""Runs whose linear layers multiply few bits: layouts, resuming, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.errors import UserError
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


@pytest.mark.parametrize("name", ["nvfp4", "quartet2"])
def test_a_resumed_run_draws_the_same_numbers(
    ranks: Ranks, corpus: Path, tmp_path: Path, name: str
) -> None:
    tree = tiny_tree(corpus, tmp_path / "run", parallel=ZERO1)
    tree |= {"precision": recipe(name, keep_last_share=0.0)}
    tree["model"] = MODEL | {"hidden_size": 128, "ffn_hidden_size": 128}
    expected = ranks.run(2, train_save_train, tree, 2, 2, megatron=True)[0]
    for losses in ranks.run(2, resume_train, tree, 2, megatron=True):
        assert losses == expected


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


def test_groups_that_do_not_divide_are_named(ranks: Ranks, corpus: Path) -> None:
    tree = tiny_tree(corpus, corpus.parent / "wrong", parallel=TP2 | PLAIN)
    tree |= {"precision": recipe("quartet")}
    tree["model"] = MODEL | {"ffn_hidden_size": 96}
    with pytest.raises(RankError, match=r"linear_fc2: forward_input .* groups of 32 .* 48"):
        ranks.run(2, train_and_report, tree, 1, megatron=True)


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        ({"operands": {"dgrad": {}}}, "no operand 'dgrad'"),
        ({"operands": {"dgrad_grad": {"block_format": "fp5"}}}, "no block format 'fp5'"),
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
