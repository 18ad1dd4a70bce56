"""Where a run begins: its own newest whole checkpoint, another run's, or nothing."""

from __future__ import annotations

from pathlib import Path

from megatron_ext.checkpoint import checkpoint, folder
from megatron_ext.config_file import dump_config
from megatron_ext.data.order import Cursor
from megatron_ext.errors import UserError
from megatron_ext.run import Run


def resume(run: Run) -> None:
    """Load what there is to go on from, and say which; every rank calls this."""
    config = run.config
    found, problems = checkpoint.newest_good_checkpoint(run.run_dir, run.mesh)
    for problem in problems:
        run.console.say(f"passing over {problem}")
    if found is None and config.checkpoint.load is not None:
        found, problems = checkpoint.newest_good_checkpoint(
            Path(config.checkpoint.load), run.mesh
        )
        if found is None:
            raise UserError(
                f"checkpoint.load={config.checkpoint.load}: no checkpoint there (expected "
                f"{folder.checkpoints_dir(Path(config.checkpoint.load))}/iter_...)"
            )
    if found is None:
        run.console.say(f"starting anew in {run.run_dir}")
    else:
        _go_on_from(run, found)
    if run.mesh.is_first_rank:
        folder.write_atomically(run.run_dir / "config.yaml", dump_config(config))


def _go_on_from(run: Run, found: Path) -> None:
    saved = checkpoint.TrainState.read(found)
    if saved.data_fingerprint != run.data.fingerprint:
        raise UserError(
            f"{found}: was trained on other data ({saved.data_fingerprint}) than data.corpora now "
            f"names ({run.data.fingerprint}), so its place in the order means nothing; use another "
            "log.run_dir, or the old corpora"
        )
    checkpoint.load_checkpoint(
        found,
        chunks=run.chunks,
        optimizer=run.optimizer,
        rule=run.config.optim.optimizer,
        mesh=run.mesh,
        layout=run.layout,
    )
    run.step, run.num_updates, run.tokens = saved.step, saved.num_updates, saved.tokens
    run.data.order.seek(Cursor.from_dict(saved.cursor))
    layout = "" if saved.layout == run.layout else " (saved on another layout of ranks)"
    run.console.say(
        f"going on after step {saved.step} from {found}{layout}; {saved.tokens:,} tokens seen"
    )
