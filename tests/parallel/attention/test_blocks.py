"""The kernels of a ring's blocks against the formula, and which of them are chosen."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.attention.block_choice import choose_blocks
from parallel.attention.block_loop import LoopBlocks
from parallel.attention.block_varlen import VarlenBlocks
from parallel.attention.blocked_partial import blocked_block, blocked_block_backward
from parallel.attention.cpu_flash import flash_block, flash_block_backward
from parallel.attention.flash_attn_door import has_flash_attn, has_flash_attn_blocks
from parallel.attention.local import Backend, choose_kernel
from parallel.attention.packed import packed_attention
from parallel.attention.reference import (
    reference_attention,
    reference_block,
    reference_block_backward,
)
from parallel.attention.shared_rows import shared_rows
from parallel.attention.torch_flash import torch_flash_block, torch_flash_block_backward
from parallel.comm.exchange import Exchange
from parallel.optional_library import Availability
from tests.parallel.attention.shared_case import head_tail_case

Forward = Callable[..., tuple[Tensor, Tensor]]
Backward = Callable[..., tuple[Tensor, Tensor, Tensor]]
KERNELS: dict[str, tuple[Forward, Backward]] = {
    "flash": (flash_block, flash_block_backward),
    "blocked": (blocked_block, blocked_block_backward),
    "reference": (reference_block, reference_block_backward),
}
# (queries, keys, heads, groups, head_dim)
SIZES = ((1, 1, 1, 1, 8), (130, 130, 4, 2, 16), (7, 300, 3, 1, 33), (200, 65, 2, 2, 64))
BLOCKS = [(size, False) for size in SIZES] + [(size, True) for size in SIZES[:2]]


def _tensors(size: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """query, key, value, gradient; then more keys and values that the same queries see."""
    torch.manual_seed(0)
    num_queries, num_keys, heads, groups, head_dim = size
    shapes = [(num_queries, heads), (num_keys, groups), (num_keys, groups), (num_queries, heads)]
    shapes += [(40, groups), (40, groups)]
    return [torch.randn(*shape, head_dim).to(dtype) for shape in shapes]


def _over_all_keys(
    tensors: list[Tensor], *, softmax_scale: float, is_causal: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Output [num_queries, heads, head_dim] and log-sum-exp of a block and the keys beside it,
    and the gradients of the block's query, key and value, by autograd in float64.

    The query's gradient is only the block's share: through the other keys it goes separately.
    """
    query, key, value, grad, more_key, more_value = (x.clone().double() for x in tensors)
    leaves = (query.requires_grad_(), key.requires_grad_(), value.requires_grad_())
    per_group = query.shape[1] // key.shape[1]
    scores = []
    # Two copies of the query keep the two shares of its gradient apart.
    for queries, keys in ((query, key), (query.detach(), more_key)):
        shared = keys.repeat_interleave(per_group, dim=1)
        scores.append(softmax_scale * torch.einsum("ihd,jhd->hij", queries, shared))
    if is_causal:
        future = torch.ones(scores[0].shape[1:], dtype=torch.bool).triu(1)
        scores[0] = scores[0].masked_fill(future, -torch.inf)
    together = torch.cat(scores, dim=2)
    values = torch.cat((value, more_value)).repeat_interleave(per_group, dim=1)
    output = torch.einsum("hij,jhd->ihd", together.softmax(dim=-1), values)
    grads = torch.autograd.grad(output, leaves, grad)
    log_sum_exp = together.logsumexp(dim=-1).view(key.shape[1], per_group, -1)
    return output.detach(), log_sum_exp.detach(), list(grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("size", "is_causal"), BLOCKS, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_block_and_its_share_of_the_gradients(
    kernel: str, size: tuple[int, ...], is_causal: bool, dtype: torch.dtype
) -> None:
    forward, backward = KERNELS[kernel]
    tensors = _tensors(size, dtype)
    query, key, value, grad, *_ = tensors
    options: dict[str, Any] = {"softmax_scale": size[-1] ** -0.5, "is_causal": is_causal}

    exact, exact_lse = reference_block(query.double(), key.double(), value.double(), **options)
    output, log_sum_exp = forward(query, key, value, **options)
    # Each number is a weighted mean of values (or such a sum), rounded a few times on its way;
    # scores in the inputs' precision are rounded to their own size, in the exponent of weights.
    scores = float(exact_lse.abs().max()) + 1
    unit = torch.finfo(dtype).eps * scores
    torch.testing.assert_close(output.double(), exact, rtol=0, atol=2 * unit * _largest(value))
    torch.testing.assert_close(log_sum_exp.double(), exact_lse, rtol=0, atol=2 * unit)

    whole, whole_lse, exact_grads = _over_all_keys(tensors, **options)
    precision = torch.promote_types(dtype, torch.float32)
    grads = backward(grad, query, key, value, whole.to(dtype), whole_lse.to(precision), **options)
    by_token = grads[0].flatten(0, 1).transpose(0, 1)
    # What is rounded on the way to a gradient: dP and the row sums, as large as g . v.
    per_key = size[-1] ** 0.5 * _largest(grad) * _largest(value)
    allowed = [
        2 * unit * per_key * _largest(key),
        2 * unit * per_key * _largest(query) * size[2] / size[3],
        2 * unit * _largest(grad) * max(1.0, size[0] / size[1]) * size[2] / size[3],
    ]
    for name, found, expected, limit in zip(
        ("query", "key", "value"), (by_token, *grads[1:]), exact_grads, allowed, strict=True
    ):
        error = float((found.double() - expected).abs().max())
        assert error <= limit, f"gradient of {name}: off by {error:.3e}, allowed {limit:.3e}"


def _largest(x: Tensor) -> float:
    return float(x.abs().max())


def test_a_document_is_a_causal_block() -> None:
    query, key, value, *_ = _tensors((20, 20, 4, 2, 8), torch.float64)
    output, log_sum_exp = reference_attention(
        query, key, value, cu_seqlens=(0, 20), softmax_scale=0.3
    )
    block, block_lse = reference_block(query, key, value, softmax_scale=0.3, is_causal=True)
    torch.testing.assert_close(block.flatten(0, 1).transpose(0, 1), output)
    torch.testing.assert_close(block_lse.flatten(0, 1), log_sum_exp)


def _choose(backend: Backend, device_type: str, dtype: torch.dtype) -> object:
    choose_kernel.cache_clear()
    choose_blocks.cache_clear()
    return choose_blocks(
        backend, device_type=device_type, dtype=dtype, head_dim=64, softmax_scale=0.1
    )


def test_blocks_are_chosen_as_kernels_are() -> None:
    assert _choose("auto", "cpu", torch.float32) == LoopBlocks("per_document", 0.1)
    assert _choose("torch_flash", "cpu", torch.bfloat16) == LoopBlocks("torch_flash", 0.1)
    assert _choose("auto", "cuda", torch.float32) == LoopBlocks("blocked", 0.1)
    with pytest.raises(ValueError, match="'sdpa' cannot compute shared sequences, since it gives"):
        _choose("sdpa", "cpu", torch.float32)
    with pytest.raises(ValueError, match="it needs CUDA or ROCm"):
        _choose("flash_attn", "cpu", torch.bfloat16)


def test_a_library_without_log_sum_exps_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    lacks = Availability(False, "flash-attn 2.5 has older varlen operators")
    choice = "parallel.attention.block_choice"
    monkeypatch.setattr(f"{choice}.has_flash_attn_blocks", lambda: lacks)
    monkeypatch.setattr(f"{choice}.choose_kernel", lambda *_, **__: "flash_attn")
    blocks = _choose("auto", "cuda", torch.bfloat16)
    assert isinstance(blocks, VarlenBlocks)
    assert blocks.varlen_forward is torch_flash_block
    with pytest.raises(ValueError, match=r"shared sequences: flash-attn 2\.5 has older"):
        _choose("flash_attn", "cuda", torch.bfloat16)


def test_missing_library_has_no_blocks_either() -> None:
    if not has_flash_attn():
        assert has_flash_attn_blocks() == has_flash_attn()


@pytest.mark.parametrize("head_dim", [64, 33])
def test_torch_flash_operators_take_rectangles(head_dim: int) -> None:
    """On the meta device: shapes alone, through the operators that CUDA and ROCm have."""
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": "meta"}
    query, grad = (torch.empty(50, 6, head_dim, **options) for _ in range(2))
    key, value = (torch.empty(80, 2, head_dim, **options) for _ in range(2))
    borders = [torch.empty(4, dtype=torch.int32, device="meta") for _ in range(2)]
    arguments: dict[str, Any] = {
        "cu_seqlens": (borders[0], borders[1]),
        "max_seqlens": (1, 40),
        "softmax_scale": 0.1,
        "is_causal": False,
    }
    output, log_sum_exp = torch_flash_block(query, key, value, **arguments)
    assert output.shape == query.shape
    assert log_sum_exp.shape == (6, 50)
    grads = torch_flash_block_backward(grad, query, key, value, output, log_sum_exp, **arguments)
    assert [x.shape for x in grads] == [query.shape, key.shape, value.shape]


def test_what_does_not_fit_is_named() -> None:
    case = head_tail_case("three", {(0, 1, 2): (30,)}, heads=(4, 2, 8), ulysses=((0, 1, 2),))
    rows = shared_rows(case.layout(0), device=torch.device("cpu"))
    query, key = torch.zeros(10, 4, 8), torch.zeros(10, 2, 8)
    with pytest.raises(ValueError, match=r"the 3 ranks .* cannot exchange 2 query groups"):
        packed_attention(query, key, key, rows=rows, exchange=Exchange(None))
    with pytest.raises(ValueError, match="9 tokens are given, and 10 belong to pieces"):
        packed_attention(query[:9], key[:9], key[:9], rows=rows, exchange=Exchange(None))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch_flash", "flash_attn"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_rectangles_on_a_gpu(size: tuple[int, ...], backend: Backend) -> None:
    if backend == "flash_attn" and not has_flash_attn_blocks():
        pytest.skip(has_flash_attn_blocks().reason)
    blocks = _choose(backend, "cuda", torch.bfloat16)
    assert isinstance(blocks, VarlenBlocks)
    tensors = _tensors(size, torch.bfloat16)
    query, key, value, grad = (x.cuda() for x in tensors[:4])
    options: dict[str, Any] = {"softmax_scale": size[-1] ** -0.5, "is_causal": False}
    borders = [torch.tensor([0, n], dtype=torch.int32, device="cuda") for n in size[:2]]
    arguments = options | {"cu_seqlens": tuple(borders), "max_seqlens": size[:2]}
    output, log_sum_exp = blocks.varlen_forward(query, key, value, **arguments)
    exact, exact_lse = reference_block(*(x.double() for x in tensors[:3]), **options)
    unit = torch.finfo(torch.bfloat16).eps * (float(exact_lse.abs().max()) + 1)
    by_token = exact.flatten(0, 1).transpose(0, 1)
    torch.testing.assert_close(
        output.cpu().double(), by_token, rtol=0, atol=2 * unit * _largest(value)
    )
    torch.testing.assert_close(
        log_sum_exp.cpu().double(), exact_lse.flatten(0, 1), rtol=0, atol=2 * unit
    )
    whole, whole_lse, exact_grads = _over_all_keys(tensors, **options)
    grads = blocks.varlen_backward(
        grad,
        query,
        key,
        value,
        whole.cuda().bfloat16(),
        whole_lse.flatten(0, 1).cuda().float(),
        **arguments,
    )
    per_key = size[-1] ** 0.5 * _largest(grad) * _largest(value)
    for found, expected in zip(grads, exact_grads, strict=True):
        limit = 2 * unit * per_key * max(_largest(key), _largest(query)) * size[2] / size[3]
        torch.testing.assert_close(found.cpu().double(), expected, rtol=0, atol=limit)
