"""Saving and loading a run, all ranks together.

A checkpoint is megatron's `torch_dist` folder (weights, optimizer, random states) and beside it
`train_state.json` (step, data cursor, layout), `config.yaml`, the tokenizer and `manifest.json`.
"""

from __future__ import annotations

import errno
import json
import queue
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer.optimizer import ChainedOptimizer
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from megatron_ext.checkpoint import folder, state
from megatron_ext.checkpoint.metadata_guard import check_metadata
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.errors import UserError
from megatron_ext.mesh import Mesh

FORMAT_VERSION = 1
# torch's is not an Exception, so that nothing catches it by accident; here it is meant.
_WRITE_ERRORS = (OSError, RuntimeError, CheckpointingException, CheckpointException)
_READ_ERRORS = (*_WRITE_ERRORS, KeyError, ValueError)
_FULL_DISK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class TrainState:
    """What a run needs besides tensors to go on exactly where it was."""

    step: int
    """Optimizer steps done."""
    num_updates: int
    """Updates that the optimizer counts, over all runs that its state went through."""
    skipped_steps: int
    """Steps of this run that were not finite and left no trace."""
    tokens: int
    """Unmasked tokens trained on."""
    cursor: dict[str, Any]
    """Place in the global document order."""
    data_fingerprint: str
    layout: dict[str, int]
    optimizer: str
    has_main_parameters: bool
    precision_recipe: str = ""
    """`recipe_digest`; empty: written before that was kept."""
    format_version: int = FORMAT_VERSION

    @staticmethod
    def read(checkpoint: Path) -> TrainState:
        path = checkpoint / "train_state.json"
        try:
            saved = TrainState(**json.loads(path.read_text(encoding="utf-8")))
            # Written before there were experts.
            saved.layout.setdefault("expert_model_parallel_size", 1)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: cannot be read as the state of a run ({error})") from None
        if saved.format_version != FORMAT_VERSION:
            raise UserError(
                f"{path}: format version {saved.format_version}, this program reads "
                f"{FORMAT_VERSION}; load it with the version of megatron-ext that wrote it"
            )
        return saved


class SaveError(UserError):
    """A checkpoint could not be written; the previous one is still there."""


def save_checkpoint(
    run_dir: Path,
    train_state: TrainState,
    *,
    chunks: Sequence[nn.Module],
    optimizer: ChainedOptimizer,
    config_yaml: str,
    tokenizer: Tokenizer,
    keep: int,
    mesh: Mesh,
) -> Path:
    """Write one checkpoint; every rank calls this.

    Raises:
        SaveError: on every rank, when any rank could not write. Older checkpoints are untouched.
    """
    step = train_state.step
    target = folder.temporary_path(run_dir, step)
    with _all_agree(run_dir, step, mesh):
        if mesh.is_first_rank:
            folder.start_temporary(run_dir, step)
    tensors: dict[str, Any] = {
        "model": state.model_state(chunks),
        "optimizer": state.optimizer_state_to_save(
            chunks, optimizer, rule=train_state.optimizer, mesh=mesh
        ),
        "rng": state.rng_state(mesh),
    }
    _write_tensors(run_dir, step, tensors, mesh)
    with _all_agree(run_dir, step, mesh):
        if mesh.is_first_rank:
            (target / "train_state.json").write_text(
                json.dumps(asdict(train_state), indent=1) + "\n", encoding="utf-8"
            )
            (target / "config.yaml").write_text(config_yaml, encoding="utf-8")
            tokenizer.save(target)
    digests = _gather_digests(run_dir, step, mesh)
    with _all_agree(run_dir, step, mesh):
        if mesh.is_first_rank:
            folder.write_manifest(target, digests)
            folder.finish(run_dir, step)
    if mesh.is_first_rank:
        folder.remove_old(run_dir, keep=keep, newest_step=step)
    return folder.checkpoint_path(run_dir, step)


def _write_tensors(run_dir: Path, step: int, tensors: dict[str, Any], mesh: Mesh) -> None:
    """megatron's collective save.

    A shard that cannot be written is told to all ranks by megatron itself (`CheckpointException`).
    What rank 0 writes alone is not: then the others wait inside megatron, nothing can be agreed
    on, and this rank says why and leaves, which ends the others.
    """
    # Saving here is synchronous, so results need no process to keep the queue: megatron would
    # start one per rank that imports torch and outlives a killed rank.
    filesystem_async._results_queue = queue.Queue()
    target = folder.temporary_path(run_dir, step)
    try:
        dist_checkpointing.save(tensors, str(target))
    except _WRITE_ERRORS as problem:
        if mesh.is_first_rank:
            shutil.rmtree(target, ignore_errors=True)
        raise SaveError(_save_message(run_dir, step, problem)) from problem


@contextmanager
def _all_agree(run_dir: Path, step: int, mesh: Mesh) -> Iterator[None]:
    """Turn a failure of one rank into the same error on all of them."""
    problem: BaseException | None = None
    try:
        yield
    except _WRITE_ERRORS as error:
        problem = error
    failed = torch.tensor(
        [int(problem is not None)], dtype=torch.int32, device=torch.cuda.current_device()
    )
    dist.all_reduce(failed, op=dist.ReduceOp.MAX)
    if not int(failed):
        return
    if mesh.is_first_rank:
        shutil.rmtree(folder.temporary_path(run_dir, step), ignore_errors=True)
    raise SaveError(_save_message(run_dir, step, problem)) from problem


def _save_message(run_dir: Path, step: int, problem: BaseException | None) -> str:
    complete = folder.complete_checkpoints(run_dir)
    left = f"the newest complete one is {complete[-1][1]}" if complete else "there is no older one"
    free = shutil.disk_usage(run_dir).free
    reason = str(problem).strip().splitlines()[-1] if problem else "another rank failed"
    # torch's writer hides what the system said behind its own words, so the disk is asked too.
    if free < _FULL_DISK_BYTES or "No space left" in str(problem) or _is_full(problem):
        reason = f"the disk of {run_dir} is full ({free:,} bytes free)"
    return f"checkpoint of step {step} could not be saved: {reason}; {left}"


def _is_full(problem: BaseException | None) -> bool:
    return getattr(problem, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _gather_digests(run_dir: Path, step: int, mesh: Mesh) -> dict[str, dict[str, int | str]]:
    """Checksums of all files; each rank reads the ones at its place in the sorted list."""
    target = folder.temporary_path(run_dir, step)
    dist.barrier()
    # One rank's listing: on a network file system the others may not see all names yet.
    listed = sorted(path.name for path in target.iterdir()) if mesh.is_first_rank else []
    names: list[str] = _gather_json(listed, mesh)[0]
    own: dict[str, dict[str, int | str]] = {}
    with _all_agree(run_dir, step, mesh):
        own = {
            name: folder.file_digest(target / name) for name in names[mesh.rank :: mesh.world_size]
        }
    parts = _gather_json(own, mesh)
    return dict(sorted((name, digest) for part in parts for name, digest in part.items()))


def _gather_json(value: object, mesh: Mesh) -> list[Any]:
    """Every rank's value on every rank, as JSON text in tensors (nothing is unpickled)."""
    device = torch.cuda.current_device()
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    sizes = torch.zeros(mesh.world_size, dtype=torch.int64, device=device)
    sizes[mesh.rank] = text.numel()
    dist.all_reduce(sizes)
    rows = torch.zeros(mesh.world_size, int(sizes.max()), dtype=torch.uint8, device=device)
    rows[mesh.rank, : text.numel()] = text
    dist.all_reduce(rows)
    return [
        json.loads(bytes(row[:size].cpu().numpy()))
        for row, size in zip(rows, sizes.tolist(), strict=True)
    ]


def check_files(checkpoint: Path, mesh: Mesh) -> None:
    """Compare every file with its checksum, spread over the ranks, before anything is loaded.

    Raises:
        UserError: on every rank, naming the damaged files.
    """
    names = sorted(folder.read_manifest(checkpoint))
    problems = folder.damaged_files(checkpoint, names[mesh.rank :: mesh.world_size])
    everyones = [line for part in _gather_json(problems, mesh) for line in part]
    if everyones:
        raise UserError("\n".join(["this checkpoint is damaged:", *everyones]))
    check_metadata(checkpoint)


def newest_good_checkpoint(run_dir: Path, mesh: Mesh) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and what was wrong with newer ones."""
    problems = []
    for _, path in reversed(folder.complete_checkpoints(run_dir)):
        try:
            check_files(path, mesh)
        except UserError as error:
            problems.append(str(error))
        else:
            return path, problems
    if problems:
        raise UserError(
            "\n".join(
                [*problems, f"no checkpoint of {run_dir} can be loaded; remove them to start over"]
            )
        )
    return None, problems


def load_weights(checkpoint: Path, chunks: Sequence[nn.Module]) -> None:
    """Load the weights of a checked checkpoint, for sampling or as the start of another run."""
    _load(checkpoint, {"model": state.model_state(chunks)})


def load_checkpoint(
    checkpoint: Path,
    *,
    chunks: Sequence[nn.Module],
    optimizer: ChainedOptimizer,
    rule: str,
    mesh: Mesh,
    layout: dict[str, int],
) -> TrainState:
    """Load everything from a checkpoint that `check_files` has passed; every rank calls this."""
    saved = TrainState.read(checkpoint)
    if saved.optimizer != rule:
        raise UserError(
            f"{checkpoint}: holds the state of optimizer {saved.optimizer!r}, this run uses "
            f"{rule!r}; set optim.optimizer={saved.optimizer}"
        )
    _load(checkpoint, {"model": state.model_state(chunks)})
    optimizer_tensors = state.optimizer_state_to_load(
        chunks, optimizer, rule=rule, with_main=saved.has_main_parameters
    )
    loaded = _load(checkpoint, {"optimizer": optimizer_tensors})
    state.put_optimizer_state(
        loaded["optimizer"], chunks, optimizer, rule=rule, num_updates=saved.num_updates
    )
    # Each rank has its own streams; on another layout they start from the seed again.
    if saved.layout == layout:
        state.set_rng_state(_load(checkpoint, {"rng": state.rng_state(mesh)})["rng"])
    return saved


def _load(checkpoint: Path, tensors: dict[str, Any]) -> dict[str, Any]:
    try:
        return dist_checkpointing.load(  # type: ignore[no-any-return]
            tensors, str(checkpoint), validate_access_integrity=False
        )
    except _READ_ERRORS as error:
        raise UserError(
            f"{checkpoint}: does not fit this model: {str(error).strip().splitlines()[0]}; "
            "compare its config.yaml with this run's model section"
        ) from error
