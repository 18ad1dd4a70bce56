"""The one call for attention over packed documents; everything else in this folder serves it."""

from torch import Tensor

from parallel.attention.documents import CuSeqlens
from parallel.attention.local import Backend, choose_kernel, local_attention


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cu_seqlens: CuSeqlens,
    max_seqlen: int,
    softmax_scale: float | None = None,
    backend: Backend = "auto",
    num_document_tokens: int | None = None,
) -> Tensor:
    """Causal self-attention in which no token sees another document.

    query: [num_tokens, num_heads, head_dim]; key, value: [num_tokens, num_query_groups, head_dim],
    on one device and of one dtype; num_heads is a multiple of num_query_groups, and query head h
    reads group h // (num_heads // num_query_groups).
    cu_seqlens: [num_documents + 1] cumulative document lengths from 0, an int32 tensor or Python
    integers. The CPU's loop wants them on the host (integers, or a CPU tensor), accelerators as
    a tensor on the device. Documents may have no tokens; tokens behind cu_seqlens[-1] are padding,
    with output 0 and gradient 0.
    max_seqlen: tokens of the longest document, or more.
    softmax_scale: head_dim ** -0.5 where not given.
    backend: a name from `parallel.attention.local`; "auto" takes the fastest.
    num_document_tokens: cu_seqlens[-1], where the host knows it: saves accelerators four passes
    that clear the padding.

    Returns [num_tokens, num_heads, head_dim] in query's dtype. Raises ValueError for shapes that
    do not fit and for a backend that cannot run here.
    """
    check_shapes(query, key, value)
    if query.shape[0] == 0:
        return query.clone()
    kernel = choose_kernel(
        backend, device_type=query.device.type, dtype=query.dtype, head_dim=query.shape[-1]
    )
    return local_attention(
        query,
        key,
        value,
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
        softmax_scale=query.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale,
        kernel=kernel,
        num_document_tokens=num_document_tokens,
    )


def check_shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise ValueError, naming them, for shapes and dtypes that attention cannot take."""
    shapes = f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"
    if query.dim() != 3 or key.dim() != 3 or key.shape != value.shape:
        raise ValueError(f"expected [num_tokens, heads, head_dim] three times, found {shapes}")
    num_tokens, num_heads, head_dim = query.shape
    if key.shape[0] != num_tokens or key.shape[2] != head_dim:
        raise ValueError(f"tokens and head_dim must agree, found {shapes}")
    if key.shape[1] == 0 or num_heads % key.shape[1]:
        raise ValueError(f"query heads must be a multiple of key/value groups, found {shapes}")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"dtypes differ: {query.dtype}, {key.dtype}, {value.dtype}")
