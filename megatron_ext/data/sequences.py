"""Documents as sequences to train on: every stored id is predicted exactly once.

A document with the ids t_0 .. t_{n-1} is stored with its end e and gives n + 1 predictions:

    inputs   e    t_0  ...  t_{n-1}
    labels   t_0  t_1  ...  e

The end-of-document id in front plays the beginning of the document, so the first id is predicted
too and bits per byte counts every byte. Predictions beyond `max_sequence_length` L go into further
sequences: piece k predicts the labels [k L, min((k + 1) L, n + 1)), and its first input is the id
before its first label. Nothing is dropped; a document has ceil((n + 1) / L) sequences.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from megatron_ext.data.indexed import MAX_DOCUMENT_TOKENS, TokenFile
from megatron_ext.errors import UserError

_GUIDE_STEP = 64

Int64s = npt.NDArray[np.int64]


class SequenceIndex:
    """The sequences of a token file, by number, in the order of its documents.

    Keeps 8 bytes a document (none where no document is cut), and no object a sequence.

    Args:
        token_file: the documents.
        max_sequence_length: longest sequence, in predictions.

    Attributes:
        num_sequences: all sequences.
        num_tokens: all predictions.
        num_documents_cut: documents that are longer than one sequence.
        num_pieces: the sequences that these are cut into.
    """

    def __init__(self, token_file: TokenFile, max_sequence_length: int) -> None:
        if max_sequence_length < 1:
            raise UserError(f"max_sequence_length = {max_sequence_length}: expected at least 1")
        self.token_file = token_file
        self.max_sequence_length = min(max_sequence_length, MAX_DOCUMENT_TOKENS)
        lengths = token_file.document_lengths
        self.num_tokens = int(lengths.sum(dtype=np.int64))
        if int(lengths.min(initial=1)) < 1 or self.num_tokens != token_file.num_tokens:
            raise UserError(
                f"{token_file.prefix}.idx: its lengths add up to {self.num_tokens} ids, the file "
                f"has {token_file.num_tokens}. It is damaged: restore it, or prepare again"
            )
        pieces = -(-lengths // self.max_sequence_length)
        self.num_sequences = int(pieces.sum(dtype=np.int64))
        self.num_documents_cut = int((pieces > 1).sum())
        self.num_pieces = self.num_sequences - (token_file.num_documents - self.num_documents_cut)
        self._first_sequences: Int64s | None = None
        if self.num_documents_cut:
            self._first_sequences = np.zeros(len(lengths) + 1, np.int64)
            np.cumsum(pieces, out=self._first_sequences[1:])
            marks = np.arange(0, self.num_sequences, _GUIDE_STEP)
            self._guide = np.searchsorted(self._first_sequences, marks, side="right") - 1
        self._eod = int(token_file.read(0)[-1]) if token_file.num_documents else 0

    def locate(self, indices: npt.ArrayLike) -> tuple[Int64s, Int64s, Int64s]:
        """Where sequences lie.

        Args:
            indices: numbers of sequences, [n].

        Returns:
            Their documents, and the half-open ranges of labels in these, each [n].
        """
        numbers = np.asarray(indices, np.int64)
        if len(numbers) and not (
            0 <= int(numbers.min()) <= int(numbers.max()) < self.num_sequences
        ):
            raise IndexError(f"a sequence of {self.num_sequences} in {self.token_file.prefix}")
        if self._first_sequences is None:
            documents, starts = numbers, np.zeros_like(numbers)
        else:
            documents = self._find_documents(numbers, self._first_sequences)
            starts = (numbers - self._first_sequences[documents]) * self.max_sequence_length
        ends = starts + self.max_sequence_length
        return documents, starts, np.minimum(ends, self.token_file.document_lengths[documents])

    def of_document(self, document: int) -> Int64s:
        """Numbers of the sequences of a document, in order; their bytes are its bytes.

        Raises:
            IndexError: there is no such document.
        """
        if not 0 <= document < self.token_file.num_documents:
            raise IndexError(f"document {document} of {self.token_file.prefix}")
        if self._first_sequences is None:
            return np.array([document], np.int64)
        first, end = self._first_sequences[document : document + 2]
        return np.arange(first, end, dtype=np.int64)

    def _find_documents(self, numbers: Int64s, first_sequences: Int64s) -> Int64s:
        """The last document that begins at or before each number, by bisection.

        The guide narrows it to the documents of 64 sequences, so that a look-up in a table that is
        larger than the cache touches a few of its lines and not a path through all of it.
        """
        low = self._guide[numbers // _GUIDE_STEP]
        high = np.minimum(low + _GUIDE_STEP - 1, len(first_sequences) - 2)
        for _ in range(_GUIDE_STEP.bit_length() - 1):
            middle = (low + high + 1) >> 1
            begins_before = first_sequences[middle] <= numbers
            low = np.where(begins_before, middle, low)
            high = np.where(begins_before, high, middle - 1)
        return low

    def lengths(self, indices: npt.ArrayLike) -> Int64s:
        """Predictions of each of these sequences, [n]."""
        _, starts, ends = self.locate(indices)
        return ends - starts

    def read(self, sequence: int, start: int = 0, end: int | None = None) -> tuple[Int64s, Int64s]:
        """Inputs and labels of a sequence, or of the part [start, end) of it, each [end - start].

        Raises:
            IndexError: there is no such sequence or part.
        """
        documents, starts, ends = self.locate([sequence])
        document, length = int(documents[0]), int(ends[0] - starts[0])
        end = length if end is None else end
        if not 0 <= start <= end <= length:
            raise IndexError(f"part {start} to {end} of sequence {sequence} of length {length}")
        first, last = int(starts[0]) + start, int(starts[0]) + end
        ids = self.token_file.read(document, max(first - 1, 0), last).astype(np.int64)
        if first > 0:
            return ids[:-1], ids[1:]
        # An empty part at the beginning has no input either.
        tokens = np.concatenate([np.array([self._eod], np.int64), ids])[: end - start]
        return tokens, ids
