"""A step as data: which rank computes which piece of which sequence in which micro-batch.

A `StepPlan` is made before the step from the lengths alone, is the same on every rank, and says
everything an executor needs to know. In plain data parallelism each sequence is one piece on one
rank; in hybrid data parallelism a sequence has pieces on several ranks, two of them (from its head
and from its tail) on each. Positions are tokens within the sequence, half-open; sequences are
numbered by their place in `lengths`.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from parallel.errors import PlanError

# Tokens by which a share of them may be off.
_ROUNDING = 1e-6


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens start..end (half-open) of one sequence."""

    sequence: int
    start: int
    end: int

    @property
    def num_tokens(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one rank runs forward and backward at once; may be empty."""

    pieces: tuple[Piece, ...] = ()
    offload_ratio: float = 0.0
    """Part of the saved activations' tokens that go to host memory, 0 to 1."""

    @property
    def num_tokens(self) -> int:
        return sum(piece.end - piece.start for piece in self.pieces)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step of all data-parallel ranks."""

    lengths: tuple[int, ...]
    """Tokens of each sequence of the global batch."""
    tokens_per_rank: int
    """The most tokens a micro-batch may hold."""
    micro_batches: tuple[tuple[MicroBatch, ...], ...]
    """For each rank, its micro-batches in the order in which it runs them."""
    ulysses: tuple[int, ...] = ()
    """Shared sequences whose ranks exchange heads instead of passing keys round a ring."""
    offloadable: float = 0.0
    """Share of a rank's activations that may leave the device, (l - 2) / l of l layers."""

    @property
    def num_ranks(self) -> int:
        return len(self.micro_batches)

    @property
    def num_tokens(self) -> int:
        """Tokens of the global batch."""
        return sum(self.lengths)

    @property
    def longest_micro_batch(self) -> int:
        """Tokens of the fullest micro-batch of any rank."""
        return max((batch.num_tokens for rank in self.micro_batches for batch in rank), default=0)

    @property
    def most_tokens(self) -> int:
        """Tokens that a micro-batch may hold if all that may leave the device does."""
        return most_tokens(self.tokens_per_rank, self.offloadable)

    def check(self) -> None:
        """Raise PlanError unless every token is computed exactly once and no limit is broken.

        A sequence of no tokens needs no piece; a piece or micro-batch may not be out of range.
        """
        if not self.micro_batches:
            raise PlanError("the plan has no rank")
        if not 0.0 <= self.offloadable < 1.0:
            raise PlanError(f"offloadable is {self.offloadable}; it must be at least 0 and below 1")
        table = self.piece_table()
        _check_ranges(table, self.lengths)
        _check_coverage(table, self.lengths)
        unknown = [i for i in self.ulysses if not 0 <= i < len(self.lengths)]
        if unknown:
            raise PlanError(f"ulysses names {unknown[0]}; there are {len(self.lengths)} sequences")
        for rank, index, batch in self._places():
            held = batch.num_tokens * (1 - batch.offload_ratio * self.offloadable)
            if batch.num_tokens > self.tokens_per_rank and held > self.tokens_per_rank + _ROUNDING:
                away = batch.num_tokens - held
                raise PlanError(
                    f"micro-batch {index} of rank {rank} holds {batch.num_tokens} tokens"
                    f"{f', {away:.0f} of them offloaded' if away else ''}; "
                    f"tokens_per_rank is {self.tokens_per_rank}"
                )
            if not 0.0 <= batch.offload_ratio <= 1.0:
                raise PlanError(
                    f"micro-batch {index} of rank {rank} has offload_ratio "
                    f"{batch.offload_ratio}; it must lie between 0 and 1"
                )

    def digest(self) -> str:
        """64 hexadecimal digits that are equal in two processes only if their plans are."""
        batches = [batch for rank in self.micro_batches for batch in rank]
        parts: tuple[npt.NDArray[np.generic], ...] = (
            _integers([self.tokens_per_rank, len(self.lengths), self.num_ranks, len(self.ulysses)]),
            _integers(self.lengths),
            _integers([len(rank) for rank in self.micro_batches]),
            _integers([len(batch.pieces) for batch in batches]),
            self.piece_table(),
            _integers(self.ulysses),
            np.array([self.offloadable, *(batch.offload_ratio for batch in batches)], dtype="<f8"),
        )
        # The counts in front say where each part ends, so no two plans share their bytes.
        return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON; `from_dict` reads them back."""
        return {
            "ranks": self.num_ranks,
            "lengths": list(self.lengths),
            "tokens_per_rank": self.tokens_per_rank,
            "ulysses": list(self.ulysses),
            "offloadable": self.offloadable,
            "micro_batches": [
                [
                    {
                        "pieces": [
                            {"sequence": piece.sequence, "start": piece.start, "end": piece.end}
                            for piece in batch.pieces
                        ],
                        "offload_ratio": batch.offload_ratio,
                    }
                    for batch in rank
                ]
                for rank in self.micro_batches
            ],
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "StepPlan":
        """The plan that `to_dict` described, not yet checked. Raises PlanError if malformed."""
        try:
            plan = cls(
                lengths=tuple(int(length) for length in record["lengths"]),
                tokens_per_rank=int(record["tokens_per_rank"]),
                micro_batches=tuple(
                    tuple(_micro_batch(batch) for batch in rank) for rank in record["micro_batches"]
                ),
                ulysses=tuple(int(sequence) for sequence in record.get("ulysses", ())),
                offloadable=float(record.get("offloadable", 0.0)),
            )
            num_ranks = int(record["ranks"])
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"not a step plan: {type(error).__name__} {error}") from error
        if num_ranks != plan.num_ranks:
            raise PlanError(f"ranks is {num_ranks}, but micro_batches has {plan.num_ranks} entries")
        return plan

    def _places(self) -> Iterator[tuple[int, int, MicroBatch]]:
        for rank, batches in enumerate(self.micro_batches):
            for index, batch in enumerate(batches):
                yield rank, index, batch

    def piece_table(self) -> npt.NDArray[np.int64]:
        """[num_pieces, 3]: sequence, start, end, in the plan's order."""
        flat = [
            number
            for rank in self.micro_batches
            for batch in rank
            for piece in batch.pieces
            for number in (piece.sequence, piece.start, piece.end)
        ]
        return _integers(flat).reshape(-1, 3)


def most_tokens(tokens_per_rank: int, offloadable: float) -> int:
    """Tokens that a micro-batch may hold if the share `offloadable` of them leaves the device."""
    return int((tokens_per_rank + _ROUNDING) / (1.0 - offloadable))


def _micro_batch(record: Mapping[str, Any]) -> MicroBatch:
    pieces = tuple(
        Piece(int(piece["sequence"]), int(piece["start"]), int(piece["end"]))
        for piece in record["pieces"]
    )
    return MicroBatch(pieces, float(record["offload_ratio"]))


def _integers(values: Sequence[int]) -> npt.NDArray[np.int64]:
    return np.array(values, dtype="<i8")


def _check_ranges(table: npt.NDArray[np.int64], lengths: Sequence[int]) -> None:
    sequence, start, end = table.T
    known = (sequence >= 0) & (sequence < len(lengths))
    if not known.all():
        number = int(sequence[~known][0])
        raise PlanError(f"a piece names sequence {number}; there are {len(lengths)} sequences")
    length = _integers(lengths)[sequence]
    wrong = (start < 0) | (start >= end) | (end > length)
    if wrong.any():
        first = int(np.flatnonzero(wrong)[0])
        raise PlanError(
            f"the piece {int(start[first])}..{int(end[first])} does not lie in sequence "
            f"{int(sequence[first])}, which has {int(length[first])} tokens"
        )


def _check_coverage(table: npt.NDArray[np.int64], lengths: Sequence[int]) -> None:
    """Sorted by sequence and start, each piece must begin where the one before it ended."""
    sequence, start, end = table[np.lexsort((table[:, 1], table[:, 0]))].T
    length = _integers(lengths)
    first = np.diff(sequence, prepend=-1) != 0
    last = np.diff(sequence, append=-1) != 0
    expected_start = np.where(first, 0, np.roll(end, 1))
    for bad, token, found in (
        (start < expected_start, start, "computed twice"),
        (start > expected_start, expected_start, "not computed"),
        (last & (end < length[sequence]), end, "not computed"),
    ):
        if bad.any():
            place = int(np.flatnonzero(bad)[0])
            raise PlanError(f"token {token[place]} of sequence {sequence[place]} is {found}")
    absent = (np.bincount(sequence, minlength=len(lengths)) == 0) & (length > 0)
    if absent.any():
        raise PlanError(f"sequence {int(np.flatnonzero(absent)[0])} is not computed at all")
