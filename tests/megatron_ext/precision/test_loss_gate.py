"""A loss gate of seconds: recipes learn as bf16 does, in the order of their errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.megatron_ext.tiny_run import opened, tiny_tree
from tests.rank_pool import Ranks

NUM_STEPS = 30
MODEL = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 2}
# Relative square error of one operand (`test_reference.py`; FP8: E4M3's 2^-4 at worst, squared).
SQUARE_ERRORS = {"mxfp8": 2.0**-8, "quartet": 0.014}


def train_losses(tree: dict[str, Any], num_steps: int) -> list[float]:
    from megatron_ext.trainer import train_step

    with opened(tree) as run:
        return [float(str(train_step(run)["loss"])) for _ in range(num_steps)]


def tree_of(corpus: Path, name: str) -> dict[str, Any]:
    tree = tiny_tree(corpus, corpus.parent / name)
    tree["model"] |= MODEL
    tree["train"] |= {"train_iters": NUM_STEPS, "global_batch_tokens": 256}
    return tree | {"precision": {"dtype": "fp32", "recipe": name, "keep_last_share": 0.0}}


def test_recipes_learn_nearly_what_bf16_learns(ranks: Ranks, corpus: Path) -> None:
    """How much less a recipe learns in the same steps follows from the errors of its operands.

    To first order a step lowers the loss by <g, g'> / |g'|, g' the step's own gradient, and two
    operands with relative square errors e leave of it 1 / sqrt(1 + 2 e) >= 1 - e for each product
    that the gradient passed through: three of a layer's (forward, dgrad, wgrad) in each of two
    layers. So of what bf16 learns at least 1 - 6 e is learnt; twice that, for steps are not small
    and the losses of single batches are compared.
    """
    losses = {"bf16": ranks.run(1, train_losses, tree_of(corpus, "bf16"), NUM_STEPS, megatron=True)}
    for name in SQUARE_ERRORS:
        tree = tree_of(corpus, name)
        losses[name] = ranks.run(1, train_losses, tree, NUM_STEPS, megatron=True)
    learnt = {}
    for name, (values,) in losses.items():
        last = sum(values[-5:]) / 5
        learnt[name] = values[0] - last
    assert learnt["bf16"] > 1.0
    for name, error in SQUARE_ERRORS.items():
        share = learnt[name] / learnt["bf16"]
        assert share > 1 - 12 * error, (name, share)
        assert losses[name][0][-1] != losses["bf16"][0][-1]
