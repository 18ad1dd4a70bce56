"""One order of all sequences for the whole run, held as one small cursor.

Each corpus is an endless stream: in epoch e its sequences come in the order of a permutation that
is seeded by (seed, corpus, e). The streams are blended by tokens: next comes a sequence of the
corpus with the smallest

    tokens of it consumed so far / its weight,

the one that lags most behind its share; of equals the first. A step takes sequences while their
sum stays within the global batch. All of this depends on the seed, the corpora and the weights
alone, so every rank computes the same batches, any number of ranks may go on from a cursor, and a
cursor is no more than how much of each corpus has been consumed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ext.data.permutation import derive_seed, mix, permute
from megatron_ext.data.sequences import SequenceIndex
from megatron_ext.errors import UserError

# Sequences that each stream looks ahead.
_BLOCK = 2048

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Cursor:
    """How much has been consumed.

    Args:
        step: batches taken.
        sequences: by corpus, over all epochs.
        tokens: by corpus, over all epochs.
        order: fingerprint of the order that this is a place in.
    """

    step: int
    sequences: tuple[int, ...]
    tokens: tuple[int, ...]
    order: str

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "step": self.step,
            "sequences": list(self.sequences),
            "tokens": list(self.tokens),
            "order": self.order,
        }

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Cursor:
        """From `to_dict`.

        Raises:
            UserError: a key is missing or holds something else.
        """
        try:
            sequences, tokens = tree["sequences"], tree["tokens"]
            numbers = [tree["step"], *sequences, *tokens]
            if len(sequences) != len(tokens) or not all(map(_is_count, numbers)):
                raise ValueError(f"expected counts, found {dict(tree)}")
            return cls(tree["step"], tuple(sequences), tuple(tokens), str(tree["order"]))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"not a data cursor: {error!r}") from None


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


@dataclass(frozen=True, slots=True, eq=False)
class GlobalBatch:
    """The sequences of one step, in the order in which they were drawn.

    Args:
        step: number of the step, from 0.
        corpora: corpus of each sequence, [num_sequences].
        sequences: its number in that corpus, [num_sequences].
        lengths: its predictions, [num_sequences].
    """

    step: int
    corpora: Int64s
    sequences: Int64s
    lengths: Int64s

    @property
    def num_tokens(self) -> int:
        """Predictions of all sequences."""
        return int(self.lengths.sum())


@dataclass(slots=True)
class _Ahead:
    """Sequences in the order in which they will come, [n] each."""

    corpora: Int64s
    sequences: Int64s
    lengths: Int64s


class GlobalOrder:
    """Draws batches from blended corpora.

    Args:
        indices: the corpora.
        weights: share of the tokens of each, in any unit; None takes each as often as all others.
        seed: of all permutations.

    Raises:
        UserError: a corpus is empty, or the weights do not fit.
    """

    def __init__(
        self,
        indices: Sequence[SequenceIndex],
        weights: Sequence[float] | None = None,
        *,
        seed: int,
    ) -> None:
        if weights is None:
            weights = [float(index.num_tokens) for index in indices]
        _check(indices, weights)
        self._indices = tuple(indices)
        self._weights = tuple(float(weight) for weight in weights)
        self._seed = seed
        self._fingerprint = self._compute_fingerprint()
        none = (0,) * len(self._indices)
        self.seek(Cursor(0, none, none, self._fingerprint))

    @property
    def cursor(self) -> Cursor:
        """The place after the last batch."""
        sequences, tokens = tuple(self._num_sequences), tuple(self._num_tokens)
        return Cursor(self._step, sequences, tokens, self._fingerprint)

    @property
    def epochs(self) -> tuple[float, ...]:
        """How often each corpus has been seen."""
        pairs = zip(self._num_sequences, self._indices, strict=True)
        return tuple(count / index.num_sequences for count, index in pairs)

    def seek(self, cursor: Cursor) -> None:
        """Go to a place: the next batch is the one that came after `cursor` was taken.

        Raises:
            UserError: the cursor belongs to other corpora, weights, lengths or another seed.
        """
        if cursor.order != self._fingerprint:
            raise UserError(
                f"the data cursor belongs to order {cursor.order}, this run has "
                f"{self._fingerprint}: the corpora, their weights, max_sequence_length or the seed "
                "were changed. Restore them to go on, or start the data anew with a new run"
            )
        self._step = cursor.step
        self._num_sequences = list(cursor.sequences)
        self._num_tokens = list(cursor.tokens)
        self._streams = [
            _Stream(index, weight, derive_seed("corpus", self._seed, corpus), first, tokens)
            for corpus, (index, weight, first, tokens) in enumerate(
                zip(self._indices, self._weights, cursor.sequences, cursor.tokens, strict=True)
            )
        ]
        empty = np.empty(0, np.int64)
        self._ahead = _Ahead(empty, empty, empty)
        self._head = 0
        self._ends = empty

    def next_batch(self, global_batch_tokens: int) -> GlobalBatch:
        """Take sequences while their sum stays within `global_batch_tokens`, at least one."""
        count = self._count_fitting(global_batch_tokens)
        while self._head + count == len(self._ends):
            self._look_further()
            count = self._count_fitting(global_batch_tokens)
        taken = slice(self._head, self._head + max(count, 1))
        ahead = self._ahead
        batch = GlobalBatch(
            self._step,
            ahead.corpora[taken].copy(),
            ahead.sequences[taken].copy(),
            ahead.lengths[taken].copy(),
        )
        self._head = taken.stop
        self._step += 1
        for corpus in range(len(self._streams)):
            mine = batch.corpora == corpus
            self._num_sequences[corpus] += int(mine.sum())
            self._num_tokens[corpus] += int(batch.lengths[mine].sum())
        return batch

    def _count_fitting(self, num_tokens: int) -> int:
        before = int(self._ends[self._head - 1]) if self._head else 0
        return int(np.searchsorted(self._ends, before + num_tokens, side="right")) - self._head

    def _look_further(self) -> None:
        """Append to what lies ahead all sequences whose turn is certain by now."""
        for stream in self._streams:
            stream.fill()
        # A sequence behind the nearest unseen one of another corpus may have to wait for it.
        horizon = min(stream.end_key for stream in self._streams)
        drawn = [stream.take_until(horizon) for stream in self._streams]
        corpora = np.repeat(np.arange(len(drawn)), [len(part[0]) for part in drawn])
        keys, sequences, lengths = (np.concatenate(column) for column in zip(*drawn, strict=True))
        turn = np.argsort(keys, kind="stable")  # of equals the first corpus
        old, rest = self._ahead, slice(self._head, None)
        self._ahead = _Ahead(
            np.concatenate([old.corpora[rest], corpora[turn]]),
            np.concatenate([old.sequences[rest], sequences[turn]]),
            np.concatenate([old.lengths[rest], lengths[turn]]),
        )
        self._ends = np.cumsum(self._ahead.lengths)
        self._head = 0

    def _compute_fingerprint(self) -> str:
        sizes = [
            (index.num_sequences, index.num_tokens, index.max_sequence_length)
            for index in self._indices
        ]
        text = repr((self._seed, self._weights, sizes))
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


class _Stream:
    """One corpus, epoch after epoch, looking ahead in blocks.

    Args:
        index: its sequences.
        weight: its share of the tokens.
        seed: of its permutations.
        position: sequences consumed over all epochs.
        num_tokens: tokens consumed over all epochs.
    """

    def __init__(
        self, index: SequenceIndex, weight: float, seed: int, position: int, num_tokens: int
    ) -> None:
        self._index = index
        self._weight = weight
        self._seed = np.array([seed], np.uint64)
        self._position = position
        self._num_tokens = num_tokens
        self._keys = np.empty(0, np.float64)
        self._sequences = np.empty(0, np.int64)
        self._lengths = np.empty(0, np.int64)

    @property
    def end_key(self) -> float:
        """Turn of the first sequence that has not been looked at."""
        return self._num_tokens / self._weight

    def fill(self) -> None:
        """Look a block ahead, unless half a block is still there."""
        if len(self._keys) > _BLOCK // 2:
            return
        size = self._index.num_sequences
        positions = np.arange(self._position, self._position + _BLOCK, dtype=np.int64)
        epochs = (positions // size).astype(np.uint64)
        seeds = self._seed + epochs if epochs[0] != epochs[-1] else self._seed + epochs[:1]
        sequences = permute(positions % size, size, mix(seeds))
        lengths = self._index.lengths(sequences)
        starts = self._num_tokens + np.cumsum(lengths) - lengths
        self._keys = np.concatenate([self._keys, starts / self._weight])
        self._sequences = np.concatenate([self._sequences, sequences])
        self._lengths = np.concatenate([self._lengths, lengths])
        self._position += _BLOCK
        self._num_tokens += int(lengths.sum())

    def take_until(self, horizon: float) -> tuple[npt.NDArray[np.float64], Int64s, Int64s]:
        """Keys, sequences and lengths of those before the horizon."""
        count = int(np.searchsorted(self._keys, horizon, side="left"))
        taken = self._keys[:count], self._sequences[:count], self._lengths[:count]
        self._keys = self._keys[count:]
        self._sequences = self._sequences[count:]
        self._lengths = self._lengths[count:]
        return taken


def _check(indices: Sequence[SequenceIndex], weights: Sequence[float]) -> None:
    if not indices or len(indices) != len(weights):
        raise UserError(f"{len(indices)} corpora with {len(weights)} weights: expected one each")
    for index, weight in zip(indices, weights, strict=True):
        prefix = index.token_file.prefix
        if index.num_sequences == 0:
            raise UserError(f"{prefix} has no documents: nothing can be drawn from it")
        if not (math.isfinite(weight) and weight > 0):
            raise UserError(f"{prefix}: weight {weight}, expected a number above 0")
