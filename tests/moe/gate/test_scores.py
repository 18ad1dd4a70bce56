"""Scores, probabilities and weights against their formulas."""

from __future__ import annotations

import pytest
import torch

from moe.gate.scores import ScoreFunction, chosen_weights, gate_probabilities, gate_scores


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_probabilities_are_scores_made_to_sum_to_one(score_function: ScoreFunction) -> None:
    logits = torch.randn(20, 6, dtype=torch.float64, requires_grad=True)
    scores = gate_scores(logits, score_function)
    expected = scores / scores.sum(dim=-1, keepdim=True)
    found = gate_probabilities(logits, score_function)
    torch.testing.assert_close(found, expected)
    grad = torch.randn_like(found)
    torch.testing.assert_close(
        torch.autograd.grad(found, logits, grad, retain_graph=True),
        torch.autograd.grad(expected, logits, grad),
    )


def test_sigmoid_probabilities_of_scores_that_are_too_small() -> None:
    logits = torch.tensor([[-200.0, -200.0, -201.0]])
    assert float(gate_scores(logits, "sigmoid").max()) == 0.0
    torch.testing.assert_close(gate_probabilities(logits, "sigmoid"), logits.softmax(dim=-1))
    weights = chosen_weights(
        gate_scores(logits, "sigmoid"),
        torch.tensor([[0, 2]]),
        is_renormalised=True,
        scaling_factor=1.0,
    )
    assert weights.tolist() == [[0.0, 0.0]], "no NaN"


def test_weights_are_the_scores_of_the_chosen() -> None:
    scores = torch.tensor([[0.5, 0.25, 0.125]])
    experts = torch.tensor([[2, 0]])

    def weights(*, is_renormalised: bool, scaling_factor: float) -> list[float]:
        found = chosen_weights(
            scores, experts, is_renormalised=is_renormalised, scaling_factor=scaling_factor
        )
        return found[0].tolist()

    assert weights(is_renormalised=False, scaling_factor=1.0) == [0.125, 0.5]
    assert weights(is_renormalised=False, scaling_factor=2.0) == [0.25, 1.0]
    assert weights(is_renormalised=True, scaling_factor=2.5) == pytest.approx([0.5, 2.0])
