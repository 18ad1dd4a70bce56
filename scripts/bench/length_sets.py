"""Sequence lengths of published training sets, drawn from what their papers say of them.

Each set is a quantile function, linear in (log of the share above, log of the length) between the
published points: that is a Pareto law piece by piece. Sources: Wikipedia as tokenized by FlexSP
(arXiv 2412.01523); ProLong and WLB-LLM as published with DistCA (arXiv 2510.18121); MagiAttention's
histogram; ByteScale's GitHub and Byted sets (arXiv 2502.21231) from their quoted shares of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class LengthSet:
    """A quantile function of lengths."""

    name: str
    above: tuple[float, ...]
    """Shares of sequences that are longer, falling from 1."""
    tokens: tuple[float, ...]
    """The lengths at these shares, rising."""
    quoted: str
    """What the source says, to compare with `describe`."""

    def draw(self, uniform: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Lengths at these quantiles, given as shares above in (0, 1]."""
        # np.interp wants rising places.
        places = -np.log(np.asarray(self.above))
        values = np.log(np.asarray(self.tokens))
        found = np.interp(-np.log(np.asarray(uniform)), places, values)
        tokens: npt.NDArray[np.float64] = np.rint(np.exp(found))
        return np.maximum(1, tokens.astype(np.int64))

    def batch(self, num_tokens: int, *, longest: int, seed: int) -> list[int]:
        """Sequences of at most `longest` tokens (cut there) until `num_tokens` are reached."""
        generator = np.random.default_rng(seed)
        lengths: list[int] = []
        missing = num_tokens
        while missing > 0:
            drawn = np.minimum(self.draw(1 - generator.random(4096)), longest)
            total = np.cumsum(drawn)
            used = min(int(np.searchsorted(total, missing)) + 1, len(drawn))
            lengths += drawn[:used].tolist()
            missing -= int(total[used - 1])
        return lengths

    def describe(self, num: int = 1_000_000) -> dict[str, float]:
        """Mean, quantiles and shares of tokens, from evenly spaced quantiles."""
        lengths = self.draw((np.arange(num) + 0.5) / num).astype(np.float64)
        total = lengths.sum()
        shares = {
            f"tokens_above_{kilo}K": float(lengths[lengths > kilo * 1024].sum() / total)
            for kilo in (8, 32, 128, 256)
        }
        quantiles = {f"p{q}": float(np.quantile(lengths, q / 100)) for q in (50, 80, 90, 99, 99.9)}
        return {
            "mean": float(lengths.mean()),
            **quantiles,
            **shares,
            "tokens_at_2M": float(lengths[lengths >= 2 * 1024**2 * 0.999].sum() / total),
        }


def _histogram(
    bins: list[tuple[float, float]], shortest: float
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Points of a quantile function from (upper border, share in percent) pairs."""
    share = np.array([percent for _, percent in bins])
    above = 1 - np.cumsum(share) / share.sum()
    # The last sequence of all is as long as the last border.
    above = np.clip(above, 1e-7, 1.0)
    return (1.0, *above.tolist()), (shortest, *(border for border, _ in bins))


_MAGI = _histogram(
    [
        *((50, 3.1), (200, 15.4), (500, 28.2), (1024, 24.6), (2048, 15.7), (4096, 7.3)),
        *((8192, 3.0), (16384, 1.3), (32768, 0.8), (65536, 0.1), (131072, 0.2), (196608, 0.1)),
    ],
    shortest=10,
)

LENGTH_SETS = (
    LengthSet(
        "wikipedia",
        (1.0, 0.85, 0.5, 0.1, 0.01, 1e-3, 1e-4, 1e-5, 1e-6),
        (30, 80, 347, 2112, 10_919, 37_353, 82_000, 220_000, 1_823_777),
        "mean 1,014; tokens >8K .275, >32K .076, >128K .011",
    ),
    LengthSet(
        "prolong",
        (1.0, 0.9, 0.5, 0.1, 0.01, 1e-3, 2e-4, 8e-5, 1.3e-5),
        (100, 500, 1913, 6051, 16_269, 47_397, 131_072, 240_000, 340_149),
        "mean 3,052; tokens >8K .254, >32K .049, >128K .017",
    ),
    LengthSet(
        "wlb_llm",
        (1.0, 0.9, 0.5, 0.1, 0.03, 0.01, 0.006, 0.003, 1e-3, 1e-5),
        (300, 1300, 3227, 5784, 7500, 26_058, 60_000, 100_000, 119_793, 124_913),
        "mean 3,962; tokens >8K .224, >32K .170, >128K 0",
    ),
    LengthSet("magi_attention", *_MAGI, "the histogram itself"),
    LengthSet(
        "bytescale_github",
        (1.0, 0.9, 0.5, 0.1, 0.01, 0.0019, 6.5e-4, 2e-5, 5e-6),
        (20, 150, 900, 6000, 33_000, 131_072, 262_144, 1_200_000, 2_097_152),
        "tokens >128K .162, >256K .098",
    ),
    LengthSet(
        "bytescale_byted",
        (1.0, 0.9, 0.5, 0.2, 0.0095, 0.0058, 0.00056, 0.00045, 1e-7),
        (100, 250, 1200, 4096, 131_072, 262_144, 524_288, 2_097_152, 2_097_152),
        "80 % of samples <=4K; tokens >=128K .443, >256K .37, >=2M .121",
    ),
)
