"""From the global document order to this rank's micro-batches.

Every rank walks the same order and makes the same plan from the lengths (`planners`); then each
reads only the pieces that the plan gives to its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import lcm
from pathlib import Path

import numpy as np
import torch

from megatron_ext.batch import HostBatch, IntArray, PackedBatch, pack, round_up
from megatron_ext.config import Config
from megatron_ext.data.corpus import Corpus
from megatron_ext.data.order import GlobalOrder
from megatron_ext.data.permutation import permute
from megatron_ext.data.sequences import SequenceIndex
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.errors import UserError
from megatron_ext.mesh import Mesh
from parallel.comm.exchange import Exchange
from parallel.plan.records import Piece, StepPlan
from parallel.plan.rings import RowLayout, row_layouts

# Rows are padded to a multiple of this. Each new shape of a matrix product is compiled and kept by
# the CPU's kernel library, and each new size leaves a hole in the heap.
_ROW_MULTIPLE = 128


@dataclass(frozen=True, slots=True)
class SequenceRef:
    """One sequence of one corpus."""

    corpus: int
    sequence: int


def open_corpora(config: Config) -> list[Corpus]:
    """Open all corpora of a run and check that one tokenizer serves them.

    Raises:
        UserError: a corpus is missing or unfinished, or was made with another tokenizer.
    """
    corpora = [Corpus.open(Path(entry.path)) for entry in config.data.corpora]
    first = corpora[0]
    for entry, corpus in zip(config.data.corpora, corpora, strict=True):
        if corpus.tokenizer.fingerprint != first.tokenizer.fingerprint:
            raise UserError(
                f"data.corpora: {entry.path} was prepared with another tokenizer than "
                f"{config.data.corpora[0].path}; prepare it with "
                f"--tokenizer {config.data.corpora[0].path}/tokenizer"
            )
    return corpora


class TrainingData:
    """The training stream and the held-out documents of a run."""

    def __init__(self, config: Config, corpora: Sequence[Corpus]) -> None:
        longest = config.data.max_sequence_length
        self.corpora = corpora
        self.tokenizer: Tokenizer = corpora[0].tokenizer
        self.train = [SequenceIndex(corpus.train, longest) for corpus in corpora]
        self.validation = [SequenceIndex(corpus.validation, longest) for corpus in corpora]
        self.order = GlobalOrder(
            self.train,
            weights=[entry.weight for entry in config.data.corpora],
            seed=config.train.seed,
        )

    @property
    def fingerprint(self) -> str:
        """Changes when any corpus changes."""
        return "+".join(corpus.fingerprint for corpus in self.corpora)

    def next_step(self, global_batch_tokens: int) -> tuple[list[SequenceRef], list[int]]:
        """Sequences of the next step and their lengths; moves the cursor."""
        batch = self.order.next_batch(global_batch_tokens)
        refs = [
            SequenceRef(corpus, sequence)
            for corpus, sequence in zip(
                batch.corpora.tolist(), batch.sequences.tolist(), strict=True
            )
        ]
        return refs, batch.lengths.tolist()

    def validation_documents(
        self, eval_tokens: int | None, *, seed: int
    ) -> tuple[list[SequenceRef], list[int], int]:
        """Whole held-out documents in a fixed order until `eval_tokens` predictions are reached.

        Returns:
            (sequences, their lengths, bytes of text in the documents).
        """
        refs: list[SequenceRef] = []
        lengths: list[int] = []
        num_bytes = 0
        share = None if eval_tokens is None else -(-eval_tokens // len(self.validation))
        for corpus, index in enumerate(self.validation):
            used = 0
            count = index.token_file.num_documents
            for document in permute(np.arange(count), count, seed).tolist():
                if share is not None and used >= share:
                    break
                sequences = index.of_document(document)
                document_lengths = index.lengths(sequences).tolist()
                refs += [SequenceRef(corpus, int(sequence)) for sequence in sequences]
                lengths += document_lengths
                used += sum(document_lengths)
                num_bytes += int(index.token_file.document_bytes[document])
        return refs, lengths, num_bytes


@dataclass(frozen=True, slots=True)
class BatchReader:
    """Reads this rank's micro-batches of a plan, and nothing else."""

    mesh: Mesh
    head_dim: int
    rotary_base: float
    device: torch.device
    exchange: Exchange
    """The way to the other data-parallel ranks."""

    @staticmethod
    def for_model(config: Config, *, mesh: Mesh, device: torch.device) -> BatchReader:
        """A reader with the rotary frequencies of a configuration."""
        return BatchReader(
            mesh=mesh,
            head_dim=config.model.head_dim,
            rotary_base=config.model.rotary_base,
            device=device,
            exchange=Exchange(mesh.data_group),
        )

    def read(
        self, plan: StepPlan, refs: Sequence[SequenceRef], indices: Sequence[SequenceIndex]
    ) -> list[HostBatch]:
        """The micro-batches of this data-parallel rank; an empty one where the plan has none."""
        layouts = row_layouts(plan, self.mesh.data_rank) or (
            RowLayout(whole=(), rings=(), rank=self.mesh.data_rank),
        )
        num_tokens = None
        if self.mesh.pipeline_size > 1:
            # Stages exchange rows of one length, which all ranks know from the plan.
            num_tokens = self.row_length(plan.longest_micro_batch)
        return [
            self._pack(
                [self._read_piece(piece, refs, indices) for piece in layout.pieces],
                layout,
                num_tokens=num_tokens,
            )
            for layout in layouts
        ]

    def single(self, tokens: IntArray) -> HostBatch:
        """One document alone, for sampling."""
        whole = (Piece(0, 0, len(tokens)),)
        layout = RowLayout(whole=whole, rings=(), rank=self.mesh.data_rank)
        return self._pack([(tokens, tokens)], layout)

    def to_device(self, batch: HostBatch) -> PackedBatch:
        """The tensors of a micro-batch, when its turn has come."""
        return batch.to(self.device, exchange=self.exchange)

    def _read_piece(
        self, piece: Piece, refs: Sequence[SequenceRef], indices: Sequence[SequenceIndex]
    ) -> tuple[IntArray, IntArray]:
        ref = refs[piece.sequence]
        return indices[ref.corpus].read(ref.sequence, piece.start, piece.end)

    def _pack(
        self,
        pieces: list[tuple[IntArray, IntArray]],
        layout: RowLayout,
        *,
        num_tokens: int | None = None,
    ) -> HostBatch:
        used = sum(len(tokens) for tokens, _ in pieces)
        return pack(
            pieces,
            layout,
            num_tokens=num_tokens or self.row_length(used),
            head_dim=self.head_dim,
            rotary_base=self.rotary_base,
            pin_memory=self.device.type == "cuda",
        )

    def row_length(self, num_tokens: int) -> int:
        """Tokens of a row that holds so many, padding included."""
        return round_up(max(num_tokens, 1), lcm(_ROW_MULTIPLE, self.mesh.tensor_size))


def validation_groups(
    refs: Sequence[SequenceRef], lengths: Sequence[int], *, tokens_per_group: int
) -> Iterator[tuple[list[SequenceRef], list[int]]]:
    """Cut a validation set into steps of bounded size."""
    start = 0
    while start < len(refs):
        end, total = start, 0
        while end < len(refs) and (end == start or total + lengths[end] <= tokens_per_group):
            total += lengths[end]
            end += 1
        yield list(refs[start:end]), list(lengths[start:end])
        start = end
