"""Sampling text from a model as it stands, on any layout of ranks.

Each token is one forward pass over the whole prefix through the same schedule as training, so a
pipeline of stages samples like one rank does. All ranks call `sample` together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.step import run_logits
from megatron_ext.training_data import BatchReader


@torch.no_grad()
def sample(
    chunks: Sequence[nn.Module],
    reader: BatchReader,
    tokenizer: Tokenizer,
    *,
    prompt: str,
    num_tokens: int,
    max_sequence_length: int,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
) -> str:
    """Continue `prompt` by at most `num_tokens` tokens; stops at the end of a document.

    Args:
        temperature: 0 takes the likeliest token.
        top_k: the choice is among this many likeliest tokens; 0 takes all.

    Returns:
        The prompt and its continuation.
    """
    mesh = reader.mesh
    for chunk in chunks:
        chunk.eval()
    generator = torch.Generator(device="cpu").manual_seed(seed)
    # A document begins after an end of document, as in training.
    ids = [tokenizer.eod, *tokenizer.encode(prompt)]
    for _ in range(num_tokens):
        window = np.asarray(ids[-max_sequence_length:], dtype=np.int64)
        logits = run_logits(
            chunks,
            reader.single(window),
            reader=reader,
            row=len(window) - 1,
        )
        chosen = torch.zeros(1, dtype=torch.int64, device=reader.device)
        if logits is not None:
            chosen += _choose(logits[: tokenizer.vocab_size].cpu(), temperature, top_k, generator)
        if mesh.pipeline_size > 1:
            last = dist.get_global_rank(mesh.pipeline_group, mesh.pipeline_size - 1)
            dist.broadcast(chosen, src=last, group=mesh.pipeline_group)
        if int(chosen) == tokenizer.eod:
            break
        ids.append(int(chosen))
    for chunk in chunks:
        chunk.train()
    return tokenizer.decode(ids[1:])


def _choose(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    if temperature == 0.0:
        return int(logits.argmax())
    if 0 < top_k < logits.numel():
        smallest = logits.topk(top_k).values[-1]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    # From the likeliest down, so that no temperature is too small.
    probabilities = torch.softmax((logits - logits.max()) / temperature, dim=0)
    return int(torch.multinomial(probabilities, 1, generator=generator))
