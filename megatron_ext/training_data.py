"""From the global document order to this rank's micro-batches.

Every rank walks the same order and makes the same plan from the lengths; then each reads only the
pieces that the plan gives to its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import lcm
from pathlib import Path

import numpy as np
import torch

from megatron_ext.batch import IntArray, PackedBatch, pack, round_up
from megatron_ext.config import Config
from megatron_ext.data.corpus import Corpus
from megatron_ext.data.order import GlobalOrder
from megatron_ext.data.permutation import permute
from megatron_ext.data.sequences import SequenceIndex
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.errors import UserError
from megatron_ext.mesh import Mesh
from parallel.plan.cost import CostModel
from parallel.plan.packing import plan_packing
from parallel.plan.records import MicroBatch, StepPlan

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
    """Makes this rank's micro-batches of a plan."""

    mesh: Mesh
    tokens_per_rank: int
    head_dim: int
    rotary_base: float
    device: torch.device

    @staticmethod
    def for_model(config: Config, *, mesh: Mesh, device: torch.device) -> BatchReader:
        """A reader with the capacity and rotary frequencies of a configuration."""
        return BatchReader(
            mesh=mesh,
            tokens_per_rank=config.data.micro_batch_tokens,
            head_dim=config.model.head_dim,
            rotary_base=config.model.rotary_base,
            device=device,
        )

    @property
    def is_padded(self) -> bool:
        """Pipeline stages exchange rows of one fixed length."""
        return self.mesh.pipeline_size > 1

    def read(
        self, plan: StepPlan, refs: Sequence[SequenceRef], indices: Sequence[SequenceIndex]
    ) -> list[PackedBatch]:
        """The micro-batches of this data-parallel rank; an empty one where the plan has none."""
        own = plan.micro_batches[self.mesh.data_rank] or (MicroBatch(pieces=()),)
        return [self._pack(self._pieces(micro_batch, refs, indices)) for micro_batch in own]

    def single(self, tokens: IntArray) -> PackedBatch:
        """One document alone, for sampling."""
        return self._pack([(tokens, tokens, 0)])

    def _pieces(
        self, micro_batch: MicroBatch, refs: Sequence[SequenceRef], indices: Sequence[SequenceIndex]
    ) -> list[tuple[IntArray, IntArray, int]]:
        pieces = []
        for piece in micro_batch.pieces:
            ref = refs[piece.sequence]
            tokens, labels = indices[ref.corpus].read(ref.sequence, piece.start, piece.end)
            pieces.append((tokens, labels, piece.start))
        return pieces

    def _pack(self, pieces: list[tuple[IntArray, IntArray, int]]) -> PackedBatch:
        used = sum(len(tokens) for tokens, _, _ in pieces)
        num_tokens = self.tokens_per_rank
        if not self.is_padded:
            num_tokens = round_up(max(used, 1), lcm(_ROW_MULTIPLE, self.mesh.tensor_size))
        return pack(
            pieces,
            num_tokens=num_tokens,
            head_dim=self.head_dim,
            rotary_base=self.rotary_base,
            device=self.device,
        )


def plan_step(
    lengths: Sequence[int],
    config: Config,
    *,
    num_data_ranks: int,
    cost_model: CostModel,
) -> StepPlan:
    """The plan of one step; the same on every rank."""
    parallel = config.parallel
    is_interleaved = (parallel.virtual_pipeline_model_parallel_size or 1) > 1
    return plan_packing(
        lengths,
        num_ranks=num_data_ranks,
        tokens_per_rank=config.data.micro_batch_tokens,
        cost_model=cost_model,
        # megatron's interleaved schedule runs micro-batches in groups of the pipeline size.
        num_micro_batches_multiple=(parallel.pipeline_model_parallel_size if is_interleaved else 1),
    )


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
