"""What a document becomes depends on nothing but it, bit for bit, through the real model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_ext.data.tokenizer import BytesTokenizer
from parallel.plan.records import Piece
from parallel.plan.rings import RowLayout
from tests.megatron_ext.tiny_run import opened, tiny_tree
from tests.rank_pool import Ranks

LENGTHS = (37, 61, 100)
# Documents after the second, and padding behind all.
TAILS: tuple[tuple[tuple[int, ...], int], ...] = (
    ((100,), 0),
    ((100,), 19),
    ((), 0),
    ((1,), 0),
    ((64, 64), 0),
    ((128, 3, 1, 27), 5),
)


def tokens_of(length: int, *, seed: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    generator = np.random.default_rng(seed)
    return generator.integers(BytesTokenizer.vocab_size, size=length, dtype=np.int64)


class Model:
    """The model of a run, asked for hidden states and gradients of packed documents."""

    def __init__(self, run: Any) -> None:
        self.run = run
        # Sharper attention and less regular hidden states than those of fresh weights.
        with torch.no_grad():
            for chunk in run.chunks:
                for parameter in chunk.parameters():
                    if parameter.dim() > 1:
                        parameter.mul_(5)

    def __call__(self, documents: Sequence[Any], *, padding: int = 0) -> list[Tensor]:
        """Last hidden states of each document, [length, hidden_size]."""
        from megatron_ext.batch import pack

        model = self.run.config.model
        lengths = [len(tokens) for tokens in documents]
        batch = pack(
            [(tokens, tokens) for tokens in documents],
            RowLayout(
                whole=tuple(Piece(i, 0, length) for i, length in enumerate(lengths)),
                rings=(),
                rank=0,
            ),
            num_tokens=sum(lengths) + padding,
            head_dim=model.head_dim,
            rotary_base=model.rotary_base,
        ).to(torch.device("cpu"))
        output = self.run.chunks[0](
            input_ids=batch.tokens,
            position_ids=batch.positions,
            attention_mask=None,
            packed_seq_params=batch.documents,
        )[0]
        assert len(output) == sum(lengths) + padding
        borders = [0, *accumulate(lengths)]
        return [output[borders[i] : borders[i + 1]] for i in range(len(lengths))]


def check_isolation(tree: dict[str, Any]) -> None:
    first, second, third = (tokens_of(n, seed=seed) for seed, n in enumerate(LENGTHS))
    with opened(tree) as run:
        model = Model(run)
        with torch.no_grad():
            expected = model([first, second, third])
            assert float(expected[1].std()) > 0.1, "the weights must do something"
            assert not torch.equal(expected[0][:37], expected[1][:37])

            # Another text in its place.
            changed = model([tokens_of(37, seed=7), second, third])
            assert not torch.equal(changed[0], expected[0])
            assert torch.equal(changed[1], expected[1])
            assert torch.equal(changed[2], expected[2])

            # One token in its place: what stands before it is untouched too, for no one sees ahead.
            token = first.copy()
            token[20] ^= 1
            changed = model([token, second, third])
            assert torch.equal(changed[0][:20], expected[0][:20])
            assert not torch.equal(changed[0][20:], expected[0][20:])
            assert torch.equal(changed[1], expected[1])

            # Whatever follows, and however much of nothing.
            for lengths, padding in TAILS:
                tail = [tokens_of(n, seed=50 + i) for i, n in enumerate(lengths)]
                changed = model([first, second, *tail], padding=padding)
                what = f"{lengths} and {padding} tokens of padding behind it"
                assert torch.equal(changed[0], expected[0]), what
                assert torch.equal(changed[1], expected[1]), what


def check_gradient_isolation(tree: dict[str, Any]) -> None:
    """The loss of document 2 has no gradient for what only document 1 holds."""
    documents = [np.full(16, 3, dtype=np.int64), np.full(24, 5, dtype=np.int64)]
    with opened(tree) as run:
        model = Model(run)
        torch.autograd.backward(model(documents)[1].float().square().sum())
        embedding = run.chunks[0].module.embedding.word_embeddings.weight.main_grad
        assert not embedding[3].any()
        assert embedding[5].any()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("norm_position", ["pre", "reordered"])
def test_documents_do_not_see_each_other(
    ranks: Ranks, corpus: Path, dtype: str, norm_position: str
) -> None:
    tree = tiny_tree(
        corpus,
        corpus.parent / "run",
        precision={"dtype": dtype},
        model={"norm_position": norm_position, "hidden_size": 256, "ffn_hidden_size": 768},
        data={"tokens_per_rank": 512},
    )
    ranks.run(1, check_isolation, tree, megatron=True)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_gradients_stay_in_their_document(ranks: Ranks, corpus: Path, dtype: str) -> None:
    tree = tiny_tree(corpus, corpus.parent / "run", precision={"dtype": dtype})
    ranks.run(1, check_gradient_isolation, tree, megatron=True)
