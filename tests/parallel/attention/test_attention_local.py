"""Every kernel that runs here against the formula: values, gradients, borders and padding."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from parallel.attention import blocked, local
from parallel.attention.attention import varlen_attention
from parallel.attention.documents import CuSeqlens
from parallel.attention.flash_attn_door import has_flash_attn
from parallel.attention.local import Backend, Kernel, choose_kernel
from parallel.attention.reference import reference_attention
from parallel.attention.torch_flash import torch_flash_attention
from parallel.host_cpu import cpu_has_bf16_hardware
from tests.parallel.attention.packed_case import (
    CASES,
    Attention,
    PackedCase,
    assert_as_good_as_plain,
    results,
    yardsticks,
)

CPU_BACKENDS: tuple[Backend, ...] = ("auto", "blocked", "torch_flash", "sdpa", "reference")
MIXED = PackedCase("mixed", (300, 64, 300, 17), 4, 2, 32, padding=9)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small products: more threads only get in each other's way."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def _ours(
    case: PackedCase, backend: Backend = "auto", cu_seqlens: CuSeqlens | None = None
) -> Attention:
    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return varlen_attention(
            query,
            key,
            value,
            cu_seqlens=case.cu_seqlens if cu_seqlens is None else cu_seqlens,
            max_seqlen=case.max_seqlen,
            backend=backend,
        )

    return attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernel_is_as_good_as_its_precision(
    case: PackedCase, backend: Backend, dtype: torch.dtype
) -> None:
    found = results(_ours(case, backend), case, case.tensors(dtype=dtype))
    assert [x.dtype for x in found] == [dtype] * 4
    assert_as_good_as_plain(found, yardsticks(case, dtype), what=f"{backend}, {case.name}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("lengths", [(96, 200), (200, 200), (2, 300)], ids=str)
def test_another_document_changes_no_bit(
    lengths: tuple[int, int], backend: Backend, dtype: torch.dtype
) -> None:
    case = PackedCase("two", lengths, 4, 2, 32)
    first = lengths[0]
    tensors = case.tensors(dtype=dtype)
    others = case.tensors(dtype=dtype, seed=1)
    changed = [
        torch.cat((other[:first], mine[first:])).detach().requires_grad_()
        for mine, other in zip(tensors, others, strict=True)
    ]
    before = results(_ours(case, backend), case, tensors)
    after = results(_ours(case, backend), case, tuple(changed))
    for mine, theirs in zip(before, after, strict=True):
        assert not torch.equal(mine[:first], theirs[:first])
        assert torch.equal(mine[first:], theirs[first:])


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_later_token_changes_no_bit_of_an_earlier_output(backend: Backend) -> None:
    case = PackedCase("one", (400,), 2, 2, 32)
    query, key, value, _ = case.tensors(dtype=torch.float32)
    before = _ours(case, backend)(query, key, value)
    with torch.no_grad():
        for x in (query, key, value):
            x[250:] = 3.0
        after = _ours(case, backend)(query, key, value)
    assert torch.equal(before[:250], after[:250])
    assert not torch.equal(before[250:], after[250:])


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_padding_is_zero_and_cannot_spread(backend: Backend) -> None:
    query, key, value, grad = MIXED.tensors(dtype=torch.float32)
    real = MIXED.cu_seqlens[-1]
    with torch.no_grad():
        for x in (query, key, value, grad):
            x[real:] = torch.nan
    for name, found in zip(
        ("output", "dquery", "dkey", "dvalue"),
        results(_ours(MIXED, backend), MIXED, (query, key, value, grad)),
        strict=True,
    ):
        assert found[:real].isfinite().all(), name
        assert not found[real:].any(), name


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_boundaries_may_be_a_tensor(backend: Backend, dtype: torch.dtype) -> None:
    tensors = MIXED.tensors(dtype=torch.float32)
    from_host = results(_ours(MIXED, backend), MIXED, tensors)
    tensor = torch.tensor(MIXED.cu_seqlens, dtype=dtype)
    from_tensor = results(_ours(MIXED, backend, tensor), MIXED, tensors)
    for host, device in zip(from_host, from_tensor, strict=True):
        assert torch.equal(host, device)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_views_of_one_projection_are_taken_as_they_are(backend: Backend) -> None:
    """query, key and value as slices of one tensor, and a gradient that is no real memory."""
    groups, heads_per_group, head_dim = 2, 3, 16
    projection = torch.randn(60, groups, heads_per_group + 2, head_dim, requires_grad=True)
    query, key, value = torch.split(projection, [heads_per_group, 1, 1], dim=2)
    case = PackedCase("views", (25, 35), groups * heads_per_group, groups, head_dim)
    attention = _ours(case, backend)

    viewed = attention(query.flatten(1, 2), key.squeeze(2), value.squeeze(2))
    (found,) = torch.autograd.grad(viewed.sum(), projection)
    copied = attention(
        query.flatten(1, 2).contiguous(), key.squeeze(2).contiguous(), value.squeeze(2).contiguous()
    )
    (expected,) = torch.autograd.grad(copied, projection, torch.ones_like(copied))
    # Strides may choose another matrix kernel, so equal to rounding and not to the bit.
    torch.testing.assert_close(viewed, copied)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("max_scores", [1, 3 * 128 * 300])
def test_groups_taken_few_at_a_time_give_the_same(
    max_scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = PackedCase("many groups", (300,), 9, 3, 16)
    tensors = case.tensors(dtype=torch.float32)
    together = results(_ours(case, "blocked"), case, tensors)
    monkeypatch.setattr(blocked, "MAX_SCORES", max_scores)
    apart = results(_ours(case, "blocked"), case, tensors)
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other)


def test_large_scores_do_not_overflow() -> None:
    case = PackedCase("large", (200,), 2, 2, 32)
    query, key, value, grad = case.tensors(dtype=torch.float32)
    tensors = (query.detach().mul(300).requires_grad_(), key, value, grad)
    for backend in CPU_BACKENDS:
        assert all(x.isfinite().all() for x in results(_ours(case, backend), case, tensors))


@pytest.mark.parametrize(
    ("shapes", "complaint"),
    [
        (((4, 2, 8), (4, 2, 8), (4, 1, 8)), "three times"),
        (((4, 2, 8), (5, 2, 8), (5, 2, 8)), "must agree"),
        (((4, 2, 8), (4, 2, 9), (4, 2, 9)), "must agree"),
        (((4, 3, 8), (4, 2, 8), (4, 2, 8)), "multiple of key/value groups"),
    ],
)
def test_shapes_that_do_not_fit_are_named(
    shapes: tuple[tuple[int, ...], ...], complaint: str
) -> None:
    query, key, value = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=complaint):
        varlen_attention(query, key, value, cu_seqlens=(0, 4), max_seqlen=4)


def test_no_tokens_at_all() -> None:
    empty = torch.zeros(0, 2, 8, requires_grad=True)
    output = varlen_attention(empty, empty, empty, cu_seqlens=(0,), max_seqlen=0)
    assert output.shape == (0, 2, 8)


def _choose(backend: Backend, device_type: str, dtype: torch.dtype) -> Kernel:
    choose_kernel.cache_clear()
    return choose_kernel(backend, device_type=device_type, dtype=dtype, head_dim=64)


def test_a_name_never_falls_back() -> None:
    with pytest.raises(ValueError, match="it needs CUDA or ROCm, and the tensors are on cpu"):
        _choose("flash_attn", "cpu", torch.bfloat16)
    with pytest.raises(ValueError, match="float16 and bfloat16 only"):
        _choose("torch_flash", "cuda", torch.float32)
    with pytest.raises(ValueError, match="for the CPU"):
        _choose("per_document", "cuda", torch.bfloat16)
    with pytest.raises(ValueError, match="'flush' does not exist; there are auto, flash_attn"):
        _choose("flush", "cpu", torch.float32)  # type: ignore[arg-type]


def test_the_choice_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    choose_kernel.cache_clear()
    with caplog.at_level(logging.INFO, logger="megatron_ext.attention"):
        for _ in range(3):
            kernel = choose_kernel("auto", device_type="cuda", dtype=torch.float32, head_dim=64)
            assert kernel == "sdpa"
    assert len(caplog.records) == 1
    assert "not torch_flash: it computes in float16" in caplog.text


def test_cpu_takes_the_loop_over_documents() -> None:
    assert _choose("auto", "cpu", torch.float32) == "per_document"


def test_missing_library_says_why() -> None:
    availability = has_flash_attn()
    assert availability.reason
    if not availability:
        assert "flash-attn" in availability.reason


@pytest.mark.parametrize("head_dim", [64, 33])
def test_torch_flash_operators_take_our_arguments(head_dim: int) -> None:
    """On the meta device: shapes alone, through the operators that CUDA and ROCm have."""
    query = torch.empty(50, 6, head_dim, dtype=torch.bfloat16, device="meta", requires_grad=True)
    key, value = (
        torch.empty(50, 2, head_dim, dtype=torch.bfloat16, device="meta", requires_grad=True)
        for _ in range(2)
    )
    output = torch_flash_attention(
        query,
        key,
        value,
        cu_seqlens=torch.empty(4, dtype=torch.int32, device="meta"),
        max_seqlen=1,
        softmax_scale=0.1,
    )
    assert output.shape == query.shape
    grads = torch.autograd.grad(output, (query, key, value), torch.empty_like(output))
    assert [grad.shape for grad in grads] == [query.shape, key.shape, value.shape]


class _WritesItsDocumentsOnly(torch.autograd.Function):
    """What the flash kernels of accelerators do: other rows, of gradients too, hold anything."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scale: float
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, cu_seqlens)
        ctx.scale = scale
        output, _ = reference_attention(
            query, key, value, cu_seqlens=cu_seqlens, softmax_scale=scale
        )
        output[int(cu_seqlens[-1]) :] = torch.nan
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        *saved, cu_seqlens = ctx.saved_tensors
        leaves = [x.detach().requires_grad_() for x in saved]
        with torch.enable_grad():
            output, _ = reference_attention(
                leaves[0], leaves[1], leaves[2], cu_seqlens=cu_seqlens, softmax_scale=ctx.scale
            )
        grads = torch.autograd.grad(output, leaves, grad_output)
        for grad in grads:
            grad[int(cu_seqlens[-1]) :] = torch.nan
        return *grads, None, None


@pytest.mark.parametrize("end", ["in integers", "given", "on the device alone"])
@pytest.mark.parametrize("padding", [0, 9])
def test_rows_that_device_kernels_leave_are_cleared(
    padding: int, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clearing around the kernel, with the formula in the kernel's place."""

    def kernel(
        query: Tensor, key: Tensor, value: Tensor, *, softmax_scale: float, **sizes: Any
    ) -> Tensor:
        assert sizes["cu_seqlens"].dtype == torch.int32
        return _WritesItsDocumentsOnly.apply(  # type: ignore[no-any-return, no-untyped-call]
            query, key, value, sizes["cu_seqlens"], softmax_scale
        )

    monkeypatch.setattr(local, "torch_flash_attention", kernel)
    case = replace(MIXED, padding=padding)
    bounds = torch.tensor(case.cu_seqlens)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return local._device_flash(
            query,
            key,
            value,
            cu_seqlens=case.cu_seqlens if end == "in integers" else bounds,
            max_seqlen=case.max_seqlen,
            softmax_scale=case.softmax_scale,
            kernel="torch_flash",
            num_document_tokens=case.cu_seqlens[-1] if end == "given" else None,
        )

    tensors = case.tensors(dtype=torch.float32)
    found = results(attention, case, tensors)
    expected = results(_ours(case, "reference"), case, tensors)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
        assert not mine[case.cu_seqlens[-1] :].any()


@given(
    lengths=st.lists(st.integers(0, 150), max_size=5),
    num_query_groups=st.integers(1, 3),
    heads_per_group=st.integers(1, 3),
    head_dim=st.integers(1, 9),
    padding=st.integers(0, 4),
    backend=st.sampled_from(("auto", "blocked", "sdpa")),
)
@settings(max_examples=40)
def test_any_pack_equals_the_formula_in_float64(
    lengths: list[int],
    num_query_groups: int,
    heads_per_group: int,
    head_dim: int,
    padding: int,
    backend: Backend,
) -> None:
    num_heads = num_query_groups * heads_per_group
    case = PackedCase("any", tuple(lengths), num_heads, num_query_groups, head_dim, padding)
    tensors = case.tensors(dtype=torch.float64)
    found = results(_ours(case, backend), case, tensors)
    expected = results(_ours(case, "reference"), case, tensors)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.gpu
@pytest.mark.parametrize("known_end", [True, False], ids=["end on host", "end on device"])
@pytest.mark.parametrize("backend", get_args(Kernel))
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernel_on_a_gpu(case: PackedCase, backend: Kernel, known_end: bool) -> None:
    if backend == "per_document":
        pytest.skip("per_document is the CPU's")
    if backend == "flash_attn" and not has_flash_attn():
        pytest.skip(has_flash_attn().reason)
    bounds = torch.tensor(case.cu_seqlens, dtype=torch.int32, device="cuda")

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return varlen_attention(
            query,
            key,
            value,
            cu_seqlens=bounds,
            max_seqlen=case.max_seqlen,
            backend=backend,
            num_document_tokens=case.cu_seqlens[-1] if known_end else None,
        )

    found = results(attention, case, case.tensors(dtype=torch.bfloat16, device="cuda"))
    assert_as_good_as_plain(
        [x.cpu() for x in found], yardsticks(case, torch.bfloat16), what=f"{backend}, {case.name}"
    )


@pytest.mark.skipif(not cpu_has_bf16_hardware(), reason="this CPU has no bfloat16 hardware")
def test_bfloat16_documents_go_to_the_blocked_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    original = blocked.blocked_forward

    def counted(output: Tensor, *rest: Tensor, softmax_scale: float, mask: Tensor) -> None:
        calls.append(output.shape[0])
        original(output, *rest, softmax_scale=softmax_scale, mask=mask)

    monkeypatch.setattr("parallel.attention.per_document.blocked_forward", counted)
    results(_ours(MIXED), MIXED, MIXED.tensors(dtype=torch.bfloat16))
    assert calls == [300, 64, 300, 17]
