"""One rank from its place in the world to its exit code.

megatron is imported here and below only, after it is settled what it takes for its accelerator.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from megatron_ext.config import Config
from megatron_ext.devices import choose_device_type, open_device
from megatron_ext.launch import process_group
from megatron_ext.launch.preflight import preflight
from megatron_ext.launch.ranks import RankInfo


def choose_accelerator(config: Config) -> torch.device:
    """The device type of this run, with megatron told so. Call before importing megatron."""
    device = torch.device(choose_device_type(config))
    # What megatron says about absent optional packages is `doctor`'s to tell, and the names of
    # collectives that it calls are its own affair.
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")
    # Raised inside torch calls that pass through the CPU accelerator, so they carry its name.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"megatron_ext\.cpu")
    warnings.filterwarnings(
        "ignore", message=r"The \.grad attribute of a Tensor that is not a leaf"
    )
    logging.getLogger("megatron").setLevel(logging.ERROR)
    if device.type == "cpu":
        from megatron_ext import cpu

        cpu.install()
    return device


def _wants_preflight(config: Config, info: RankInfo) -> bool:
    wanted = config.launch.preflight
    return wanted == "always" or (wanted == "auto" and not info.is_on_one_machine)


def run_rank(
    config: Config,
    info: RankInfo,
    job: Literal["train", "profile"],
    *,
    early_signals: Sequence[int] = (),
) -> int:
    """Train or profile on this rank; returns the exit code.

    Args:
        config: checked and filled in for `info.world_size`; log.run_dir exists.
        early_signals: requests to stop that arrive while the rank starts up.
    """
    device = choose_accelerator(config)
    assert config.log.run_dir is not None
    run_dir = Path(config.log.run_dir)
    with process_group.running(
        info, device=device, timeout_seconds=config.launch.timeout_seconds
    ) as device:
        if _wants_preflight(config, info):
            preflight(info, device, run_dir)
        from megatron_ext.run import open_run

        with open_run(config, open_device(config, device), run_dir) as run:
            if job == "profile":
                from megatron_ext.profile import profile

                return profile(run)
            from megatron_ext.trainer import train

            return train(run, early_signals=early_signals)
