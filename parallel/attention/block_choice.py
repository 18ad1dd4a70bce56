"""Which kernels compute the blocks of shared sequences on this device."""

from functools import cache

import torch

from parallel.attention.block import BlockKernels
from parallel.attention.block_loop import LoopBlocks
from parallel.attention.block_varlen import varlen_blocks
from parallel.attention.flash_attn_door import has_flash_attn_blocks
from parallel.attention.local import Backend, choose_kernel


@cache
def choose_blocks(
    backend: Backend,
    *,
    device_type: str,
    dtype: torch.dtype,
    head_dim: int,
    softmax_scale: float,
) -> BlockKernels:
    """The kernels for `backend`, which means the same as for whole documents.

    "auto" replaces what has no log-sum-exp: `sdpa` by `blocked`, and versions of flash-attn that
    hide theirs by torch's kernels. Raises ValueError, with the reason, for a name that cannot
    compute shared sequences here.
    """
    kernel = choose_kernel(backend, device_type=device_type, dtype=dtype, head_dim=head_dim)
    if kernel == "flash_attn" and not has_flash_attn_blocks():
        if backend != "auto":
            raise ValueError(
                f"attention backend {backend!r} cannot compute shared sequences: "
                f"{has_flash_attn_blocks().reason}"
            )
        kernel = "torch_flash"
    if kernel == "sdpa":
        if backend != "auto":
            raise ValueError(
                "attention backend 'sdpa' cannot compute shared sequences, since it gives no "
                "log-sum-exp; 'blocked' and 'reference' run on any device"
            )
        kernel = "blocked"
    if kernel == "flash_attn" or (kernel == "torch_flash" and device_type == "cuda"):
        return varlen_blocks(kernel, softmax_scale=softmax_scale)
    return LoopBlocks(kernel, softmax_scale)
