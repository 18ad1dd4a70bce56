"""Rows on the wire in 8 bits a value: int8 or float8_e4m3fn, with a float32 scale for each row.

    scale = max |x| / top        top: 127 for int8, 448 for float8_e4m3fn
    sent  = round(x / scale)     and back: x' = sent * scale

Error of a value: int8 at most scale / 2 = max |x| / 254; float8 has 3 bits behind its first one, so
at most |x| / 16, and for values below 2^-6 scale at most 2^-10 scale. The scale stands behind the
values of its row, so that one message takes both: hidden_size + 4 bytes a row. The gradient of
rounding is taken as that of the identity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Payload = Literal["none", "int8", "float8_e4m3fn"]
Kind = Literal["rows", "gradients", "numbers"]
"""What travels: rows of hidden_size, their gradients, or the few numbers that say where they
belong."""
SCALE_BYTES = 4
_TOPS = {"int8": 127.0, "float8_e4m3fn": 448.0}


@dataclass(frozen=True, slots=True)
class Wire:
    """How a link writes what travels over it; numbers always as they are.

    Attributes:
        payload: of rows.
        gradient_payload: of gradients.
    """

    payload: Payload = "none"
    gradient_payload: Payload = "none"

    def payload_of(self, kind: Kind) -> Payload:
        if kind == "numbers":
            return "none"
        return self.payload if kind == "rows" else self.gradient_payload


def row_bytes(hidden_size: int, *, payload: Payload, dtype: torch.dtype) -> int:
    """Bytes of one row on the wire."""
    return hidden_size * dtype.itemsize if payload == "none" else hidden_size + SCALE_BYTES


def pack_rows(rows: Tensor, *, payload: Payload) -> Tensor:
    """uint8 [num_rows, hidden_size + 4] of rows [num_rows, hidden_size]: values, then scales."""
    top = _TOPS[payload]
    values = rows.float()
    largest = values.abs().amax(dim=1, keepdim=True) if rows.shape[1] else values.sum(1, True)
    # A row of zeros stays one; inf and nan come out as nan.
    scale = (largest / top).clamp_min(torch.finfo(torch.float32).tiny)
    scaled = values / scale
    coded = scaled.round().to(torch.int8) if payload == "int8" else scaled.to(torch.float8_e4m3fn)
    return torch.cat([coded.view(torch.uint8), scale.view(torch.uint8)], dim=1)


def unpack_rows(packed: Tensor, *, payload: Payload, dtype: torch.dtype) -> Tensor:
    """Rows [num_rows, hidden_size] of what `pack_rows` made."""
    hidden_size = packed.shape[1] - SCALE_BYTES
    coded = packed[:, :hidden_size].contiguous()
    # Copied in any case, for its bytes may stand at no multiple of 4.
    scale = packed[:, hidden_size:].clone(memory_format=torch.contiguous_format)
    scale = scale.view(torch.float32)
    coded = coded.view(torch.int8 if payload == "int8" else torch.float8_e4m3fn)
    return (coded.float() * scale).to(dtype)


def rounded_rows(rows: Tensor, *, payload: Payload) -> Tensor:
    """Rows as they arrive."""
    if payload == "none":
        return rows
    return unpack_rows(pack_rows(rows, payload=payload), payload=payload, dtype=rows.dtype)
