"""X-MoE's logits are cosines over a temperature, whatever the lengths of the vectors."""

from __future__ import annotations

import torch

from moe.gate.cosine import cosine_logits, first_temperature


def test_logits_are_cosines_over_the_temperature() -> None:
    tokens, projection = torch.randn(6, 16, dtype=torch.bfloat16), torch.randn(3, 16)
    embeddings, scale = torch.randn(5, 3), torch.tensor([2.0])
    logits = cosine_logits(tokens, projection, embeddings, scale, temperature=0.3)
    assert logits.dtype == torch.float32
    projected = tokens.float() @ projection.T
    expected = torch.nn.functional.cosine_similarity(projected[:, None], embeddings[None], dim=-1)
    torch.testing.assert_close(logits, expected * 2.0 / 0.3)
    longer = cosine_logits(tokens * 4, projection, embeddings * 9, scale, temperature=0.3)
    torch.testing.assert_close(longer, logits)


def test_everything_is_learned() -> None:
    leaves = [
        torch.randn(shape, dtype=torch.float64).float().requires_grad_()
        for shape in ((4, 8), (2, 8), (3, 2), (1,))
    ]
    tokens, projection, embeddings, scale = leaves
    logits = cosine_logits(
        tokens, projection, embeddings, scale, temperature=first_temperature("sigmoid")
    )
    grads = torch.autograd.grad(logits.square().sum(), leaves)
    assert all(bool(grad.any()) for grad in grads)


def test_a_token_of_zeros_prefers_nobody() -> None:
    logits = cosine_logits(
        torch.zeros(1, 4), torch.randn(2, 4), torch.randn(3, 2), torch.ones(1), temperature=0.3
    )
    assert logits.tolist() == [[0.0, 0.0, 0.0]]
