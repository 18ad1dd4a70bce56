"""A run small enough for tests: a tiny model on a few source files.

They are files of megatron-core, whose version is pinned: the same text under every Python. How far
rounding spreads depends on the text, and with the standard library's it did on its version.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.metadata
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.config import Config
from megatron_ext.config_check import check_config
from megatron_ext.config_file import check_tree
from megatron_ext.data.prepare import prepare
from megatron_ext.data.settings import PrepareSettings

FILES = (
    "enums.py",
    "_rank_utils.py",
    "hyper_comm_grid.py",
    "optimizer_param_scheduler.py",
    "process_groups_config.py",
    "timers.py",
)


def make_corpus(folder: Path) -> Path:
    """Bytes of these files, a fifth held out; prepared once for all tests."""
    return shutil.copytree(_prepared_corpus(), folder / "corpus")


@functools.cache
def _prepared_corpus() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="megatron-ext-corpus-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    source = folder / "source"
    source.mkdir(parents=True)
    package = importlib.metadata.distribution("megatron-core")
    for name in FILES:
        text = Path(str(package.locate_file(f"megatron/core/{name}"))).read_text(encoding="utf-8")
        # Documents of uneven length: every 60 lines are one.
        lines = text.splitlines(keepends=True)
        for start in range(0, len(lines), 60):
            (source / f"{start:04}_{name}").write_text("".join(lines[start : start + 60]))
    prepare(
        PrepareSettings(
            inputs=(str(source),),
            output=folder / "corpus",
            tokenizer="bytes",
            validation_fraction=0.2,
            num_workers=1,
        ),
        show_progress=False,
    )
    return folder / "corpus"


def tiny_tree(corpus: Path, run_dir: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """A configuration tree; `sections` change single fields."""
    tree: dict[str, dict[str, Any]] = {
        "model": {
            "num_layers": 4,
            "hidden_size": 32,
            "ffn_hidden_size": 64,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "qk_layernorm": True,
        },
        "data": {
            "corpora": [{"path": str(corpus)}],
            "max_sequence_length": 128,
            "tokens_per_rank": 256,
        },
        "train": {"train_iters": 20, "global_batch_tokens": 1024, "eval_interval": 0},
        "optim": {"lr": 3e-3, "lr_warmup_iters": 2},
        "precision": {"dtype": "fp32"},
        "checkpoint": {"save_interval": 0},
        "log": {"run_dir": str(run_dir), "log_interval": 1000},
        "launch": {"device": "cpu"},
    }
    for name, fields in sections.items():
        tree[name] = tree[name] | fields if name in tree else fields
    return tree


def tiny_config(tree: dict[str, Any], world_size: int) -> Config:
    return check_config(check_tree(tree, where="test"), world_size=world_size)


@contextlib.contextmanager
def opened(tree: dict[str, Any]) -> Iterator[Any]:
    """A `Run` on this rank; the process group is running."""
    from megatron_ext.devices import open_device
    from megatron_ext.run import open_run

    config = tiny_config(tree, dist.get_world_size())
    run_dir = Path(str(config.log.run_dir))
    run_dir.mkdir(parents=True, exist_ok=True)
    with open_run(config, open_device(config, torch.device("cpu")), run_dir) as run:
        yield run


def whole_tensors(run: Any, which: str) -> dict[str, Tensor]:
    """Global name -> whole tensor ("weight" or "grad"), for the parameters of this stage.

    Gathers over the data-parallel ranks (the distributed optimizer holds a range on each) and over
    the tensor-parallel ranks; those of one axis all at once, for each collective takes its time.
    """
    from megatron_ext.parameters import parameter_shards

    mesh = run.mesh
    found: dict[str, Tensor] = {}
    by_axis: dict[str, list[Any]] = {}
    for shard in parameter_shards(run.chunks):
        by_axis.setdefault(shard.axis, []).append(shard)
    for axis, shards in by_axis.items():
        if which == "grad":
            flat = _flat_grads(run, axis, shards)
        else:
            flat = torch.cat([shard.parameter.detach().float().reshape(-1) for shard in shards])
        ranks = mesh.along(axis)
        gathered = [torch.empty_like(flat) for _ in range(ranks.size)]
        dist.all_gather(gathered, flat, group=ranks.group)
        sizes = [shard.parameter.numel() for shard in shards]
        of_ranks = [torch.split(whole, sizes) for whole in gathered]
        for shard, *blocks in zip(shards, *of_ranks, strict=True):
            shape = shard.parameter.shape
            found[shard.name] = shard.join([block.view(shape) for block in blocks]).clone()
    return found


def _flat_grads(run: Any, axis: str, shards: list[Any]) -> Tensor:
    """Gradients of this rank's shards of one axis, one after the other."""
    from megatron_ext.optimizer import main_parameter

    part = run.optimizer.chained_optimizers[1 if axis == "expert" else 0]
    grads = [torch.zeros(shard.parameter.numel()) for shard in shards]
    for shard, flat in zip(shards, grads, strict=True):
        held = main_parameter(part, shard.parameter)
        if held is not None:
            main, span = held
            assert main.grad is not None
            flat[span] = main.grad.detach().float().reshape(-1)
    whole = torch.cat(grads)
    if hasattr(part, "model_param_group_index_map"):
        dist.all_reduce(whole, group=run.mesh.replicas(axis).group)
    return whole


def train_and_report(tree: dict[str, Any], num_steps: int) -> dict[str, Any]:
    """Losses of `num_steps` steps, the whole gradients of each, and the whole last weights."""
    from megatron_ext import trainer
    from megatron_ext.optimizer import clip_and_step

    grads: list[dict[str, Tensor]] = []
    with opened(tree) as run:

        def capture(optimizer: Any, *, clip_grad: float) -> tuple[float, bool]:
            optimizer.prepare_grads()
            grads.append(whole_tensors(run, "grad"))
            return clip_and_step(optimizer, clip_grad=clip_grad)

        setattr(trainer, "clip_and_step", capture)  # noqa: B010
        try:
            records = [trainer.train_step(run) for _ in range(num_steps)]
        finally:
            setattr(trainer, "clip_and_step", clip_and_step)  # noqa: B010
        weights = whole_tensors(run, "weight")
    return {
        "losses": [record["loss"] for record in records],
        "grad_norms": [record["grad_norm"] for record in records],
        "grads": grads,
        "weights": weights,
    }
