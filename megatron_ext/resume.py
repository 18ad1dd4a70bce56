"""Where a run begins: its own newest whole checkpoint, another run's, or nothing."""

from __future__ import annotations

from pathlib import Path

from megatron_ext.checkpoint import checkpoint, folder
from megatron_ext.config_file import dump_config, load_config
from megatron_ext.data.order import Cursor
from megatron_ext.data.tokenizer import load_tokenizer
from megatron_ext.errors import UserError
from megatron_ext.precision.chosen_recipe import recipe_digest
from megatron_ext.run import Run

# Fields of `model` and `moe` that change training but not the network that was trained.
_MAY_CHANGE = (
    "z_loss_coeff",
    "init_method_std",
    "moe_z_loss_coeff",
    "moe_router_bias_update_rate",
    "moe_expert_capacity_factor",
    "moe_token_drop_policy",
    "moe_router_load_balancing_type",
    "moe_aux_loss_coeff",
    "moe_device_aux_loss_coeff",
    "moe_device_aux_loss_num_groups",
    "moe_router_inputs_on_host",
    "moe_lsh_num_hashes",
    "moe_lsh_hash_dim",
    "moe_lsh_layers",
    "moe_lsh_warmup_steps",
    "moe_lsh_centroid",
    "moe_lsh_num_refinements",
    "moe_lsh_residual_scale",
    "moe_lsh_payload",
    "moe_lsh_payload_gradients",
    "moe_lsh_seed",
)


def resume(run: Run) -> None:
    """Load what there is to go on from, and say which; every rank calls this."""
    config = run.config
    found = _newest(run, run.run_dir)
    if found is not None:
        _go_on_from(run, found)
    elif config.checkpoint.load is not None:
        _start_from(run, Path(config.checkpoint.load))
    else:
        run.console.say(f"starting anew in {run.run_dir}")
    if run.mesh.is_first_rank:
        folder.write_atomically(run.run_dir / "config.yaml", dump_config(config))


def _newest(run: Run, run_dir: Path) -> Path | None:
    found, problems = checkpoint.newest_good_checkpoint(run_dir, run.mesh)
    for problem in problems:
        run.console.say(f"passing over {problem}")
    return found


def _start_from(run: Run, other: Path) -> None:
    found = _newest(run, other)
    if found is None:
        raise UserError(
            f"checkpoint.load={other}: no checkpoint there (expected "
            f"{folder.checkpoints_dir(other)}/iter_...)"
        )
    _load(run, found)
    run.console.say(f"starting in {run.run_dir} with weights and optimizer state of {found}")


def _go_on_from(run: Run, found: Path) -> None:
    saved = checkpoint.TrainState.read(found)
    if saved.data_fingerprint != run.data.fingerprint:
        raise UserError(
            f"{found}: was trained on other data ({saved.data_fingerprint}) than data.corpora now "
            f"names ({run.data.fingerprint}), so its place in the order means nothing; use another "
            "log.run_dir, or the old corpora"
        )
    _check_same_recipe(run, found, saved.precision_recipe)
    _load(run, found)
    run.step, run.skipped_steps, run.tokens = saved.step, saved.skipped_steps, saved.tokens
    run.loader.seek(Cursor.from_dict(saved.cursor))
    layout = "" if saved.layout == run.layout else " (saved on another layout of ranks)"
    run.console.say(
        f"going on after step {saved.step} from {found}{layout}; {saved.tokens:,} tokens seen"
    )


def _check_same_recipe(run: Run, found: Path, saved: str) -> None:
    """Refuse to go on in other number formats, unless that is what was asked for.

    Raises:
        UserError: naming both recipes.
    """
    now = recipe_digest(run.config)
    if saved in ("", now):
        return
    if run.config.checkpoint.allow_precision_change:
        run.console.say(f"{found} was trained with precision recipe {saved}; going on with {now}")
        return
    raise UserError(
        f"{found}: was trained with precision recipe {saved}, this run has {now} (a recipe's name "
        "and a digest of its operands and kept layers); set the section precision as in "
        f"{found / 'config.yaml'}, or checkpoint.allow_precision_change=true to go on with the "
        "new one"
    )


def _check_same_model(run: Run, found: Path) -> None:
    """Refuse weights of another network, even where their shapes would fit.

    Raises:
        UserError: naming each field of `model` and `moe` that differs.
    """
    saved = load_config(str(found / "config.yaml"))
    different = [
        f"  {section}.{name}: {there} there, {here} here"
        for section, before, now in (
            ("model", saved.model, run.config.model),
            ("moe", saved.moe, run.config.moe),
        )
        for (name, there), (_, here) in zip(before, now, strict=True)
        if there != here and name not in _MAY_CHANGE
    ]
    if different:
        raise UserError(
            "\n".join(
                [
                    f"{found}: holds another model:",
                    *different,
                    "set these as they were, or use another log.run_dir",
                ]
            )
        )


def _load(run: Run, found: Path) -> None:
    _check_same_model(run, found)
    if load_tokenizer(found).fingerprint != run.data.tokenizer.fingerprint:
        raise UserError(
            f"{found}: was trained with another tokenizer than data.corpora was prepared with; "
            f"prepare the text with: megatron-ext data prepare --tokenizer {found} ..."
        )
    checkpoint.load_checkpoint(
        found,
        chunks=run.chunks,
        optimizer=run.optimizer,
        rule=run.config.optim.optimizer,
        mesh=run.mesh,
        layout=run.layout,
    )
