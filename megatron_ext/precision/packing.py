"""Several numbers in one byte, the first in the lowest bits: two 4-bit codes, as torch's
`float4_e2m1fn_x2` and Blackwell's matrix instructions have them, or eight bits of a mask."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(codes: Tensor) -> Tensor:
    """uint8 [..., n] with values below 16 -> uint8 [..., n / 2]. ValueError if n is odd."""
    if codes.shape[-1] % 2:
        raise ValueError(f"4-bit codes are packed in pairs; the last dim is {codes.shape[-1]}")
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """uint8 [..., n / 2] -> uint8 [..., n]."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


def pack_bits(mask: Tensor) -> Tensor:
    """bool [..., n] -> uint8 [..., n / 8]. ValueError if 8 does not divide n."""
    if mask.shape[-1] % 8:
        raise ValueError(f"bits are packed by eight; the last dim is {mask.shape[-1]}")
    places = torch.arange(8, dtype=torch.uint8, device=mask.device)
    eights = mask.to(torch.uint8).reshape(*mask.shape[:-1], -1, 8) << places
    return eights.sum(dim=-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor) -> Tensor:
    """uint8 [..., n / 8] -> bool [..., n]."""
    eights = _bits_of_bytes(packed.device).index_select(0, packed.reshape(-1).to(torch.int32))
    return eights.view(torch.bool).view(*packed.shape[:-1], -1)


def _bits_of_bytes(device: torch.device) -> Tensor:
    """The eight bits of every byte as eight bytes in one word: int64 [256]."""
    bits = (torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)) & 1
    return bits.to(torch.uint8).view(torch.int64).view(-1)
