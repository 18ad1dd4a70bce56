"""`megatron-ext generate`: text from a checkpoint, on one device, whatever layout wrote it."""

from __future__ import annotations

import math
from pathlib import Path

from megatron_ext.checkpoint import folder
from megatron_ext.config import ParallelConfig
from megatron_ext.config_file import load_config
from megatron_ext.data.tokenizer import load_tokenizer
from megatron_ext.errors import UserError
from megatron_ext.launch.ranks import RankInfo


def find_checkpoint(path: Path) -> Path:
    """A checkpoint folder from itself or from its run folder.

    Raises:
        UserError: there is none.
    """
    if (path / folder.MANIFEST).exists():
        return path
    complete = folder.complete_checkpoints(path)
    if complete:
        return complete[-1][1]
    raise UserError(
        f"{path}: no checkpoint here; give a run folder with checkpoints/iter_..., or one of them"
    )


def generate(
    checkpoint: str,
    *,
    prompt: str,
    num_tokens: int,
    temperature: float,
    top_k: int,
    seed: int,
    device: str,
) -> int:
    """Print the prompt and its continuation; returns the exit code."""
    for name, value in (
        ("--tokens", num_tokens),
        ("--temperature", temperature),
        ("--top-k", top_k),
    ):
        if not 0 <= value < math.inf:
            raise UserError(f"{name} {value}: expected a number from 0 up")
    path = find_checkpoint(Path(checkpoint))
    config = load_config(str(path / "config.yaml"))
    config = config.model_copy(
        update={
            # Sharded checkpoints load on any layout; one rank is the simplest.
            "parallel": ParallelConfig(),
            "launch": config.launch.model_copy(update={"device": device}),
        }
    )
    info = RankInfo(
        rank=0, world_size=1, local_rank=0, local_world_size=1, source="single", store=None
    )
    # torch and megatron: only now that there is something to sample from.
    from megatron_ext.launch import process_group
    from megatron_ext.rank import choose_accelerator

    chosen = choose_accelerator(config)
    with process_group.running(
        info, device=chosen, timeout_seconds=config.launch.timeout_seconds
    ) as used:
        from megatron_ext.sampler import open_sampler

        with open_sampler(config, path, load_tokenizer(path), used) as sampler:
            text = sampler.sample(
                prompt, num_tokens=num_tokens, temperature=temperature, top_k=top_k, seed=seed
            )
    print(text)
    return 0
