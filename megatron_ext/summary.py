"""What a run is about to do, in a few lines."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_ext.planning.parameters import num_parameters
from megatron_ext.planning.subject import config_model
from megatron_ext.run import Run


def summary(run: Run) -> Iterator[str]:
    """Lines for the console: device, ranks, model, data, steps."""
    config, mesh = run.config, run.mesh
    yield f"device      {run.device.describe()}"
    zero = ", ZeRO-1" if config.parallel.use_distributed_optimizer else ""
    experts = f", experts over {mesh.expert_size}" if config.moe.num_moe_experts else ""
    yield (
        f"ranks       {mesh.world_size} = tensor {mesh.tensor_size} x pipeline "
        f"{mesh.pipeline_size} x data {mesh.data_size}{zero}{experts}"
    )
    size = num_parameters(config_model(config, vocab_size=run.shape.vocab_size))
    yield (
        f"model       {size / 1e6:,.1f}M parameters, {config.model.num_layers} layers x "
        f"{config.model.hidden_size}, vocabulary {run.shape.vocab_size:,}"
    )
    if config.moe.num_moe_experts:
        yield (
            f"experts     {config.moe.num_moe_experts} in each of {sum(config.moe_layers)} layers, "
            f"{config.moe.moe_router_topk} for each token; a token meets "
            f"{run.shape.matmul_parameters / 1e6:,.1f}M parameters"
        )
    yield from _data_lines(run)
    tokens = config.train.global_batch_tokens or 0
    yield (
        f"steps       {config.train.train_iters:,} of at most {tokens:,} tokens, micro-batches of "
        f"at most {config.data.micro_batch_tokens:,}"
    )


def _data_lines(run: Run) -> Iterator[str]:
    longest = run.config.data.max_sequence_length
    entries = zip(run.config.data.corpora, run.data.train, run.data.validation, strict=True)
    for corpus, train, validation in entries:
        cut = (
            f"; {train.num_documents_cut:,} longer than {longest:,} cut into {train.num_pieces:,}"
            if train.num_documents_cut
            else ""
        )
        yield (
            f"data        {corpus.path}: {train.token_file.num_documents:,} documents, "
            f"{train.num_tokens:,} tokens{cut}; {validation.token_file.num_documents:,} held out"
        )
