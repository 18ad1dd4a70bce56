"""How long the documents of a corpus are: `data stats`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ext.data.corpus import Corpus
from megatron_ext.data.indexed import TokenFile
from megatron_ext.data.workplace import SPLITS
from megatron_ext.errors import UserError

PERCENTILES = (50.0, 90.0, 99.0, 99.9)
LONG_TOKENS = (2048, 8192, 32768, 131072)
_BAR_WIDTH = 40

Int32s = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class SplitStats:
    """One split. Lengths are in tokens, the end of the document included.

    Args:
        num_documents: documents.
        num_tokens: their lengths together.
        num_bytes: UTF-8 bytes of their texts.
        bytes_per_token: `num_bytes` / `num_tokens`.
        length_percentiles: length that so many percent of the documents do not exceed.
        max_length: of the longest document.
        token_share_longer_than: share of the tokens in documents longer than so many tokens.
        histogram: by lower border 2^k, documents with a length below 2^(k+1).
    """

    num_documents: int
    num_tokens: int
    num_bytes: int
    bytes_per_token: float
    length_percentiles: dict[str, int]
    max_length: int
    token_share_longer_than: dict[str, float]
    histogram: dict[str, int]


@dataclass(frozen=True, slots=True)
class CorpusStats:
    """Both splits of a corpus, its tokenizer, and what was left out when it was prepared."""

    corpus: str
    tokenizer: dict[str, Any]
    counts: dict[str, int]
    splits: dict[str, SplitStats]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def measure(path: str | Path) -> CorpusStats:
    """Read the lengths of a corpus.

    Raises:
        UserError: there is no corpus, or it is damaged.
    """
    corpus = Corpus.open(path)
    splits = {name: _measure_split(getattr(corpus, name)) for name in SPLITS}
    return CorpusStats(str(path), corpus.metadata["tokenizer"], corpus.metadata["counts"], splits)


def describe_stats(stats: CorpusStats) -> str:
    """The statistics as text, with a histogram of the training documents."""
    lines = [f"{stats.corpus}: vocabulary of {stats.tokenizer['vocab_size']:,} ids"]
    for name, split in stats.splits.items():
        lines.append(
            f"{name:<11}{split.num_documents:>13,} documents {split.num_tokens:>17,} tokens "
            f"{split.num_bytes:>19,} bytes  {split.bytes_per_token:.2f} bytes a token"
        )
    left_out = [f"{count} {name.replace('_', ' ')}" for name, count in stats.counts.items()]
    lines.append(f"left out   {', '.join(left_out)}")
    train = stats.splits["train"]
    lengths = [f"p{name} {value:,.0f}" for name, value in train.length_percentiles.items()]
    lines.append(f"length     {'  '.join(lengths)}  max {train.max_length:,} (train, in tokens)")
    shares = [
        f"> {_short(int(limit))}: {share:.1%}"
        for limit, share in train.token_share_longer_than.items()
    ]
    lines.append(f"tokens in documents  {'  '.join(shares)}")
    return "\n".join(lines + _draw(train.histogram))


def plot_lengths(path: str | Path, file: Path) -> None:
    """Draw how many documents and how many tokens have which length, to a picture file.

    Raises:
        UserError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    lengths = Corpus.open(path).train.document_lengths
    borders = [2.0**k for k in range(int(lengths.max(initial=1)).bit_length() + 1)]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.hist(
        lengths, borders, alpha=0.6, label="documents", weights=_shares(np.ones_like(lengths))
    )
    axes.hist(lengths, borders, alpha=0.6, label="tokens", weights=_shares(lengths))
    axes.set_xscale("log", base=2)
    axes.set_xlabel("length of the document in tokens")
    axes.set_ylabel("share")
    axes.set_title(str(path))
    axes.legend()
    try:
        figure.savefig(file)
    except (OSError, ValueError) as error:
        raise UserError(f"--plot {file}: {error}") from None


def _measure_split(tokens: TokenFile) -> SplitStats:
    lengths = tokens.document_lengths
    num_bytes = int(tokens.document_bytes.sum())
    num_tokens = max(tokens.num_tokens, 1)
    points = _percentiles(lengths)
    return SplitStats(
        num_documents=tokens.num_documents,
        num_tokens=tokens.num_tokens,
        num_bytes=num_bytes,
        bytes_per_token=num_bytes / num_tokens,
        length_percentiles={f"{p:g}": x for p, x in zip(PERCENTILES, points, strict=True)},
        max_length=int(lengths.max(initial=0)),
        token_share_longer_than={
            str(limit): int(lengths[lengths > limit].sum(dtype=np.int64)) / num_tokens
            for limit in LONG_TOKENS
        },
        histogram=_histogram(lengths),
    )


def _percentiles(lengths: Int32s) -> list[int]:
    if len(lengths) == 0:
        return [0] * len(PERCENTILES)
    return [int(x) for x in np.percentile(lengths, PERCENTILES, method="inverted_cdf")]


def _histogram(lengths: Int32s) -> dict[str, int]:
    """Documents by power of two, without the empty ends."""
    counts = np.bincount(np.frexp(lengths.astype(np.float64))[1] - 1)
    filled = np.flatnonzero(counts)
    if len(filled) == 0:
        return {}
    return {str(2**k): int(counts[k]) for k in range(int(filled[0]), int(filled[-1]) + 1)}


def _draw(histogram: dict[str, int]) -> list[str]:
    largest = max(histogram.values(), default=1)
    return [
        f"  {_short(int(border)):>6}+ {count:>12,} {'#' * round(_BAR_WIDTH * count / largest)}"
        for border, count in histogram.items()
    ]


def _short(num_tokens: int) -> str:
    for size, letter in ((2**20, "M"), (2**10, "K")):
        if num_tokens >= size:
            return f"{num_tokens // size}{letter}"
    return str(num_tokens)


def _shares(weights: Int32s) -> npt.NDArray[np.float64]:
    return weights / max(int(weights.sum(dtype=np.int64)), 1)
