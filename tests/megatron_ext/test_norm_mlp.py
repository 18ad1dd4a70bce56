"""RMSNorm and SwiGLU, whose backward is written by hand, against torch's own differentiation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.megatron_ext.tolerance import assert_as_good_as_plain
from tests.rank_pool import Ranks

SHAPES = ((1, 1, 8), (5, 1, 64), (0, 1, 16), (7, 3, 129), (130, 1, 256))
EPS = 1e-5


def plain_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + EPS) * weight


def plain_swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def outputs(function: Callable[..., Tensor], leaves: list[Tensor], grad: Tensor) -> list[Tensor]:
    """The output and the gradient of each leaf."""
    copies = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    output = function(*copies)
    return [output.detach(), *torch.autograd.grad(output, copies, grad)]


def compare(
    ours: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    leaves: list[Tensor],
    grad: Tensor,
    what: str,
) -> None:
    found = outputs(ours, leaves, grad)
    in_same_precision = outputs(plain, leaves, grad)
    exact = outputs(plain, [leaf.double() for leaf in leaves], grad.double())
    names = ["output", *(f"gradient {index}" for index in range(len(leaves)))]
    for name, value, plain_value, exact_value in zip(
        names, found, in_same_precision, exact, strict=True
    ):
        assert value.dtype == grad.dtype
        assert_as_good_as_plain(value, plain=plain_value, exact=exact_value, what=f"{what}: {name}")


def check_rms_norm(dtype: torch.dtype) -> None:
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_ext.norm import RMSNorm

    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=1, params_dtype=dtype
    )
    for shape in SHAPES:
        for scale in (1e-3, 1.0, 300.0):
            norm = RMSNorm(config, shape[-1], eps=EPS)
            assert norm.weight.dtype == dtype
            assert torch.equal(norm.weight, torch.ones_like(norm.weight))

            def ours(x: Tensor, weight: Tensor, norm: RMSNorm = norm) -> Tensor:
                return torch.func.functional_call(norm, {"weight": weight}, (x,))  # type: ignore[no-any-return]

            x = (torch.randn(shape) * scale).to(dtype)
            weight = (1 + torch.randn(shape[-1]) / 10).to(dtype)
            grad = torch.randn(shape).to(dtype)
            compare(ours, plain_rms_norm, [x, weight], grad, f"RMSNorm {shape} times {scale}")


def check_swiglu(dtype: torch.dtype) -> None:
    from moe.swiglu import swiglu

    for shape in SHAPES:
        for scale in (1e-3, 1.0, 30.0):
            gate_up = (torch.randn(*shape[:-1], 2 * shape[-1]) * scale).to(dtype)
            grad = torch.randn(shape).to(dtype)
            compare(swiglu, plain_swiglu, [gate_up], grad, f"SwiGLU {shape} times {scale}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("check", [check_rms_norm, check_swiglu])
def test_equals_plain_differentiation(
    ranks: Ranks, check: Callable[[torch.dtype], None], dtype: torch.dtype
) -> None:
    ranks.run(1, check, dtype, megatron=True)


def mark_of_sequence_parallel(sequence_parallel: bool) -> bool:
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_ext.norm import RMSNorm

    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=2,
        tensor_model_parallel_size=2,
        sequence_parallel=sequence_parallel,
    )
    return bool(vars(RMSNorm(config, 8).weight)["sequence_parallel"])


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_weight_is_marked_for_sequence_parallelism(ranks: Ranks, sequence_parallel: bool) -> None:
    found = ranks.run(1, mark_of_sequence_parallel, sequence_parallel, megatron=True)
    assert found == [sequence_parallel]
