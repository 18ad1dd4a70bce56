"""The reference against independent formulations, since everything else is tested against it."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from parallel.attention.reference import reference_attention
from tests.parallel.attention.packed_case import CASES, PackedCase

SMALL = PackedCase("small", (3, 0, 4, 1), 4, 2, 3, padding=2)
TINY = PackedCase("tiny", (2, 3), 2, 1, 2)


def _reference(
    case: PackedCase, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor]:
    return reference_attention(
        query, key, value, cu_seqlens=case.cu_seqlens, softmax_scale=case.softmax_scale
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_dense_attention_under_a_block_diagonal_mask(case: PackedCase) -> None:
    query, key, value, _ = (x.detach().double() for x in case.tensors(dtype=torch.float64))
    document = torch.full((case.num_tokens,), -1)
    for number, (start, end) in enumerate(pairwise(case.cu_seqlens)):
        document[start:end] = number
    visible = (document[:, None] == document[None, :]).tril() & (document[:, None] >= 0)
    visible |= (document < 0).diag()  # Padding must see something; its rows are not compared.
    dense = functional.scaled_dot_product_attention(
        query.transpose(0, 1),
        key.transpose(0, 1),
        value.transpose(0, 1),
        attn_mask=visible,
        enable_gqa=True,
    ).transpose(0, 1)

    output, _ = _reference(case, query, key, value)

    num_real = case.cu_seqlens[-1]
    torch.testing.assert_close(output[:num_real], dense[:num_real], rtol=1e-12, atol=1e-12)
    assert not output[num_real:].any()


def test_log_sum_exp_by_hand() -> None:
    query, key, value, _ = (x.detach().double() for x in SMALL.tensors(dtype=torch.float64))
    _, log_sum_exp = _reference(SMALL, query, key, value)
    # The second document begins at token 3; its third token sees tokens 3, 4 and 5.
    for head in range(SMALL.num_heads):
        group = head // 2
        scores = [
            SMALL.softmax_scale * float(query[5, head] @ key[token, group]) for token in (3, 4, 5)
        ]
        expected = math.log(sum(math.exp(score) for score in scores))
        assert float(log_sum_exp[head, 5]) == pytest.approx(expected, abs=1e-12)
    assert log_sum_exp.shape == (SMALL.num_heads, SMALL.num_tokens)
    assert (log_sum_exp[:, 8:] == -torch.inf).all()


def test_gradients_are_those_of_the_formula() -> None:
    query, key, value, _ = TINY.tensors(dtype=torch.float64)
    # Both results: a merge of partial attentions differentiates the log-sum-exp as well.
    assert torch.autograd.gradcheck(
        lambda *inputs: _reference(TINY, *inputs), (query, key, value), fast_mode=True
    )


def test_low_precision_inputs_are_computed_in_float32() -> None:
    query, key, value, _ = SMALL.tensors(dtype=torch.bfloat16)
    output, log_sum_exp = _reference(SMALL, query, key, value)
    assert output.dtype == log_sum_exp.dtype == torch.float32


@pytest.mark.parametrize(
    ("cu_seqlens", "complaint"),
    [
        ((), "begin with 0"),
        ((1, 10), "begin with 0"),
        ((0, 5, 4, 10), "falls from 5 to 4 at document 1"),
        ((0, 11), "ends at 11, but there are 10 tokens"),
    ],
)
def test_impossible_boundaries_are_refused(cu_seqlens: tuple[int, ...], complaint: str) -> None:
    query, key, value, _ = SMALL.tensors(dtype=torch.float32)
    with pytest.raises(ValueError, match=complaint):
        reference_attention(query, key, value, cu_seqlens=cu_seqlens, softmax_scale=1.0)
