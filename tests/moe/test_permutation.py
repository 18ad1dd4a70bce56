"""Tokens to rows and back: equal to plain torch, gradients too, and nothing lost."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from moe.permutation import order_by_expert, permute, unpermute
from moe.reference import permute_reference, unpermute_reference
from tests.moe.routed_case import RoutedCase, cases


@given(case=cases())
def test_permute_equals_the_reference(case: RoutedCase) -> None:
    experts = case.experts()
    tokens = case.leaves(torch.float64)[0].requires_grad_()
    permutation = order_by_expert(experts)
    rows, expected = permute(tokens, permutation), permute_reference(tokens, experts)
    assert torch.equal(rows, expected)
    grad = torch.randn_like(rows)
    (found,) = torch.autograd.grad(rows, tokens, grad)
    (wanted,) = torch.autograd.grad(expected, tokens, grad)
    torch.testing.assert_close(found, wanted)


@given(case=cases())
def test_unpermute_equals_the_reference(case: RoutedCase) -> None:
    experts = case.experts()
    weights = case.leaves(torch.float64)[1].requires_grad_()
    rows = torch.randn(experts.numel(), case.hidden_size, dtype=torch.float64).requires_grad_()
    output = unpermute(rows, weights, order_by_expert(experts))
    expected = unpermute_reference(rows, weights, experts)
    torch.testing.assert_close(output, expected)
    grad = torch.randn_like(output)
    found = torch.autograd.grad(output, (rows, weights), grad)
    wanted = torch.autograd.grad(expected, (rows, weights), grad)
    torch.testing.assert_close(found, wanted)


@given(case=cases())
def test_rows_stand_by_expert_and_then_by_token(case: RoutedCase) -> None:
    experts = case.experts()
    permutation = order_by_expert(experts)
    of_row = experts.reshape(-1)[permutation.choices]
    pairs = list(zip(of_row.tolist(), permutation.sources.tolist(), strict=True))
    assert pairs == sorted(pairs)
    assert permutation.places.reshape(-1).sort().values.tolist() == list(range(experts.numel()))


def test_unpermute_undoes_permute() -> None:
    case = RoutedCase(num_tokens=7, num_experts=4, topk=2)
    permutation = order_by_expert(case.experts())
    tokens = torch.randn(7, 5)
    halves = torch.full((7, 2), 0.5)
    assert torch.equal(unpermute(permute(tokens, permutation), halves, permutation), tokens)


def test_sums_in_bf16_are_made_in_float32() -> None:
    # 256 + 1 + 1 is 256 in bf16 step by step, and 258 when it is rounded once.
    rows = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)
    permutation = order_by_expert(torch.tensor([[0, 1, 2]]))
    assert unpermute(rows, torch.ones(1, 3), permutation).item() == 258.0


@given(case=cases(), share=st.sampled_from([0.0, 0.3, 1.0]))
def test_choices_that_lead_nowhere_have_no_row(case: RoutedCase, share: float) -> None:
    experts = case.experts()
    is_nowhere = (
        torch.rand(experts.shape, generator=torch.Generator().manual_seed(case.seed)) < share
    )
    experts = experts.masked_fill(is_nowhere, case.num_experts)
    num_rows = int((~is_nowhere).sum())
    permutation = order_by_expert(experts, num_rows=num_rows)
    assert permutation.num_rows == num_rows
    assert permutation.has_nowhere == (num_rows < experts.numel())
    tokens, weights = (leaf.requires_grad_() for leaf in case.leaves(torch.float64)[:2])
    rows, expected = (
        permute(tokens, permutation),
        permute_reference(tokens, experts, num_rows=num_rows),
    )
    assert torch.equal(rows, expected)
    grad = torch.randn_like(rows)
    torch.testing.assert_close(
        torch.autograd.grad(rows, tokens, grad), torch.autograd.grad(expected, tokens, grad)
    )
    # Weights of choices that lead nowhere need not be 0 here.
    rows = torch.randn_like(rows).requires_grad_()
    output = unpermute(rows, weights, permutation)
    wanted = unpermute_reference(rows, weights, experts)
    torch.testing.assert_close(output, wanted)
    grad = torch.randn_like(output)
    torch.testing.assert_close(
        torch.autograd.grad(output, (rows, weights), grad),
        torch.autograd.grad(wanted, (rows, weights), grad),
    )


def test_a_row_that_is_not_finite_stays_with_its_token() -> None:
    experts = torch.tensor([[0], [1], [1]])
    permutation = order_by_expert(experts, num_rows=1)
    rows = torch.tensor([[float("nan")]])
    output = unpermute(rows, torch.tensor([[1.0], [0.0], [0.0]]), permutation)
    assert output[1:].tolist() == [[0.0], [0.0]]
