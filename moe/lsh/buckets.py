"""How many buckets hash functions can tell apart. No torch: configurations are checked without."""

from __future__ import annotations

# Codes and expert numbers share one int64.
_MAX_BUCKETS = 2**52


def num_buckets(num_hashes: int, hash_dim: int) -> int:
    """Codes that `hash_rows` can give.

    Raises:
        ValueError: so many that they do not fit in an integer.
    """
    buckets: int = (2 * hash_dim) ** num_hashes
    if buckets > _MAX_BUCKETS:
        raise ValueError(
            f"{num_hashes} hashes of {hash_dim} directions make {buckets:.1e} buckets; use fewer "
            f"of either, for at most {_MAX_BUCKETS:.1e}"
        )
    return buckets
