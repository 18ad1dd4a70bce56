"""A model loaded from a checkpoint for sampling, without optimizer and training data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from megatron_ext.checkpoint.checkpoint import check_files, load_weights
from megatron_ext.config import Config
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.devices import choose_dtype
from megatron_ext.mesh import Mesh, start_mesh, stop_mesh
from megatron_ext.model import build_model, padded_vocab_size
from megatron_ext.sample import sample
from megatron_ext.training_data import BatchReader
from parallel.device import device_info


@dataclass(frozen=True, slots=True)
class Sampler:
    """A model, its tokenizer and where they run."""

    config: Config
    mesh: Mesh
    chunks: Sequence[nn.Module]
    tokenizer: Tokenizer
    reader: BatchReader

    def sample(
        self, prompt: str, *, num_tokens: int, temperature: float, top_k: int, seed: int
    ) -> str:
        """The prompt and its continuation (see `sample.sample`)."""
        return sample(
            self.chunks,
            self.reader,
            self.tokenizer,
            prompt=prompt,
            num_tokens=num_tokens,
            max_sequence_length=self.config.data.max_sequence_length,
            temperature=temperature,
            top_k=top_k,
            seed=seed,
        )


@contextmanager
def open_sampler(
    config: Config, checkpoint: Path, tokenizer: Tokenizer, device: torch.device
) -> Iterator[Sampler]:
    """Build the model on this device and load the weights; the process group must be running."""
    mesh = start_mesh(config)
    try:
        check_files(checkpoint, mesh)
        dtype, _ = choose_dtype(config, device_info(device))
        chunks = build_model(
            config,
            mesh=mesh,
            vocab_size=padded_vocab_size(config.model, tokenizer.vocab_size),
            dtype=dtype,
            is_cuda=device.type == "cuda",
        )
        load_weights(checkpoint, chunks)
        reader = BatchReader.for_model(config, mesh=mesh, device=device)
        yield Sampler(config, mesh, chunks, tokenizer, reader)
    finally:
        stop_mesh()
