"""The one door to the `flash-attn` library; nothing else imports it.

It is built from source and never required: where it is missing, torch's own flash kernels serve.
"""

from dataclasses import dataclass
from functools import cache

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Availability:
    """Whether an optional library can be used; true in a condition when it can."""

    available: bool
    reason: str
    """The version where it is there, and why it is not where it is not."""

    def __bool__(self) -> bool:
        return self.available


@cache
def has_flash_attn() -> Availability:
    """Import flash-attn once and say what came of it."""
    try:
        import flash_attn
    except ModuleNotFoundError as error:
        if error.name == "flash_attn":
            return Availability(False, "flash-attn is not installed (pip install flash-attn)")
        return Availability(False, f"flash-attn is installed but fails to import: {error}")
    except (ImportError, OSError) as error:
        # A build for another torch or CUDA fails to load its symbols.
        return Availability(False, f"flash-attn is installed but fails to import: {error}")
    if not hasattr(flash_attn, "flash_attn_varlen_func"):
        return Availability(False, "flash-attn has no flash_attn_varlen_func; version 2 has")
    version = getattr(flash_attn, "__version__", "of unknown version")
    return Availability(True, f"flash-attn {version}")


def flash_attn_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float,
) -> Tensor:
    """Packed causal attention by flash-attn; shapes as `varlen_attention`, cu_seqlens int32.

    Raises RuntimeError with the reason where the library is missing.
    """
    availability = has_flash_attn()
    if not availability:
        raise RuntimeError(availability.reason)
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(  # type: ignore[no-any-return]
        query,
        key,
        value,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen,
        dropout_p=0.0,
        softmax_scale=softmax_scale,
        causal=True,
    )
