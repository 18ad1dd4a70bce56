"""Which kernel computes packed attention on this device, and the call to it.

| name          | device            | what it is                                                  |
|---------------|-------------------|-------------------------------------------------------------|
| `flash_attn`  | CUDA, ROCm        | the flash-attn library                                      |
| `torch_flash` | CPU, CUDA, ROCm   | torch's own flash kernels                                   |
| `per_document`| CPU               | for each document the faster of `blocked` and `torch_flash` |
| `blocked`     | any               | blocks of queries and batched products                      |
| `sdpa`        | any               | torch's scaled_dot_product_attention, document by document  |
| `reference`   | any               | the formula                                                 |

`auto` takes the first that fits: flash kernels exist in half precision only, so float32 on an
accelerator goes to `sdpa`. A name that cannot be had is an error, never another kernel.
"""

import logging
from functools import cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from parallel.attention.documents import CuSeqlens, document_ranges, zeros_in_graph
from parallel.attention.flash_attn_door import flash_attn_attention, has_flash_attn
from parallel.attention.per_document import per_document_attention
from parallel.attention.reference import reference_attention
from parallel.attention.torch_flash import MAX_HEAD_DIM, torch_flash_attention

Kernel = Literal["flash_attn", "torch_flash", "per_document", "blocked", "sdpa", "reference"]
Backend = Literal["auto"] | Kernel

_log = logging.getLogger("megatron_ext.attention")
_HALF = (torch.float16, torch.bfloat16)


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cu_seqlens: CuSeqlens,
    max_seqlen: int,
    softmax_scale: float,
    kernel: Kernel,
    num_document_tokens: int | None = None,
) -> Tensor:
    """Packed causal self-attention by the named kernel; arguments as `varlen_attention`."""
    if kernel == "flash_attn" or (kernel == "torch_flash" and query.device.type == "cuda"):
        return _device_flash(
            query,
            key,
            value,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            softmax_scale=softmax_scale,
            kernel=kernel,
            num_document_tokens=num_document_tokens,
        )
    if kernel == "reference":
        output, _ = reference_attention(
            query, key, value, cu_seqlens=cu_seqlens, softmax_scale=softmax_scale
        )
        return output.to(query.dtype)
    ranges = document_ranges(cu_seqlens, num_tokens=query.shape[0])
    if kernel == "sdpa":
        return _sdpa_attention(query, key, value, ranges, softmax_scale)
    return per_document_attention(
        query,
        key,
        value,
        ranges=ranges,
        softmax_scale=softmax_scale,
        kernel=None if kernel == "per_document" else kernel,
    )


@cache
def choose_kernel(
    backend: Backend, *, device_type: str, dtype: torch.dtype, head_dim: int
) -> Kernel:
    """The kernel for `backend` on this device; says once what `auto` chose.

    Raises ValueError, with the reason, for a name that does not exist or cannot run here.
    """
    if backend != "auto":
        if backend not in get_args(Kernel):
            names = ", ".join(("auto", *get_args(Kernel)))
            raise ValueError(f"attention backend {backend!r} does not exist; there are {names}")
        obstacle = _obstacle(backend, device_type, dtype, head_dim)
        if obstacle:
            raise ValueError(f"attention backend {backend!r} cannot run here: {obstacle}")
        return backend
    preference: tuple[Kernel, ...] = (
        ("per_document",) if device_type == "cpu" else ("flash_attn", "torch_flash", "sdpa")
    )
    obstacles = {name: _obstacle(name, device_type, dtype, head_dim) for name in preference}
    chosen = next(name for name, obstacle in obstacles.items() if not obstacle)
    passed = "; ".join(f"not {name}: {why}" for name, why in obstacles.items() if why)
    _log.info("attention for %s on %s: %s %s", dtype, device_type, chosen, passed)
    return chosen


def _obstacle(kernel: Kernel, device_type: str, dtype: torch.dtype, head_dim: int) -> str:
    """Why the kernel cannot run, or nothing."""
    if kernel == "per_document" and device_type != "cpu":
        return f"it is for the CPU, and the tensors are on {device_type}"
    if kernel in ("blocked", "sdpa", "reference", "per_document"):
        return ""
    if kernel == "torch_flash" and device_type == "cpu":
        return ""
    if device_type != "cuda":
        return f"it needs CUDA or ROCm, and the tensors are on {device_type}"
    if dtype not in _HALF:
        return f"it computes in float16 and bfloat16 only, and the tensors are {dtype}"
    if head_dim > MAX_HEAD_DIM:
        return f"its heads have at most {MAX_HEAD_DIM} channels, and these have {head_dim}"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return "it needs compute capability 8.0"
    if kernel == "flash_attn" and not has_flash_attn():
        return has_flash_attn().reason
    return ""


def _sdpa_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ranges: tuple[tuple[int, int], ...],
    softmax_scale: float,
) -> Tensor:
    outputs = []
    for start, end in ranges:
        heads = [x[start:end].transpose(0, 1).unsqueeze(0) for x in (query, key, value)]
        output = functional.scaled_dot_product_attention(
            heads[0],
            heads[1],
            heads[2],
            is_causal=True,
            scale=softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        outputs.append(output.squeeze(0).transpose(0, 1))
    padding = query[ranges[-1][1] if ranges else 0 :]
    return torch.cat([*outputs, zeros_in_graph(padding)])


def _device_flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cu_seqlens: CuSeqlens,
    max_seqlen: int,
    softmax_scale: float,
    kernel: Kernel,
    num_document_tokens: int | None,
) -> Tensor:
    """Flash kernels leave rows outside every document unwritten: cut them off or clear them.

    Cutting needs the count on the host; where only the device knows it, four masked passes over
    the rows replace a device sync.
    """
    num_tokens = query.shape[0]
    if not isinstance(cu_seqlens, Tensor):
        num_document_tokens = cu_seqlens[-1]
        cu_seqlens = torch.tensor(cu_seqlens, dtype=torch.int32, device=query.device)
    bounds = cu_seqlens.to(device=query.device, dtype=torch.int32)
    if bounds.numel() < 2 or num_document_tokens == 0:
        return zeros_in_graph(query)
    attention = flash_attn_attention if kernel == "flash_attn" else torch_flash_attention
    outside = None
    if num_document_tokens is None:
        outside = torch.arange(num_tokens, device=query.device) >= bounds[-1]
        outside = outside.view(-1, 1, 1)
        query, key, value = (
            _ZeroGradient.apply(x, outside)  # type: ignore[no-untyped-call]
            for x in (query, key, value)
        )
    elif num_document_tokens < num_tokens:
        query, key, value = (x[:num_document_tokens] for x in (query, key, value))
    output = attention(
        query, key, value, cu_seqlens=bounds, max_seqlen=max_seqlen, softmax_scale=softmax_scale
    )
    if outside is not None:
        return output.masked_fill(outside, 0)
    return functional.pad(output, (0, 0, 0, 0, 0, num_tokens - output.shape[0]))


class _ZeroGradient(torch.autograd.Function):
    """The identity, whose gradient is 0 where `outside` is true, whatever (NaN too) came in."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, outside: Tensor) -> Tensor:
        ctx.save_for_backward(outside)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (outside,) = ctx.saved_tensors
        return grad.masked_fill(outside, 0), None
