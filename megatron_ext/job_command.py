"""`megatron-ext train` and `profile`: check, prepare the corpora, start local ranks or be one.

The configuration is checked and the text prepared before any rank starts, so a mistake costs
nothing and is told once.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from signal import SIGUSR1
from typing import Literal

from megatron_ext import exit_codes
from megatron_ext.config import Config, CorpusConfig, PrepareConfig
from megatron_ext.config_check import check_config
from megatron_ext.config_file import dump_config, load_config
from megatron_ext.data.corpus import Corpus
from megatron_ext.data.prepare import prepare
from megatron_ext.data.settings import PrepareSettings
from megatron_ext.data.workplace import METADATA_FILE, PreparationUnderWay
from megatron_ext.errors import UserError
from megatron_ext.launch.local import run_local
from megatron_ext.launch.noted_signals import noted_signals
from megatron_ext.launch.ranks import RankInfo, discover

Job = Literal["train", "profile"]

_WAIT_SECONDS = 1.0
_MOST_WAIT_SECONDS = 12 * 3600.0
# A node of eight GPUs, or a layout tried out on a small machine; more is a cluster's work.
_MOST_LOCAL_RANKS = 16


def run_job(
    job: Job,
    source: str,
    overrides: Sequence[str],
    *,
    num_ranks: int | None = None,
    explicit: RankInfo | None = None,
) -> int:
    """Train or profile `source`; returns the exit code.

    Args:
        source: recipe name or YAML file.
        overrides: `section.key=value` words.
        num_ranks: local ranks, when nobody else started us; by default launch.num_ranks.
        explicit: this rank, where flags told it.
    """
    info = discover(explicit=explicit)
    config = load_config(source, overrides)
    if info.source != "single":
        _refuse_other_size(num_ranks, info)
        config = check_config(config, world_size=info.world_size)
        if info.source != "local":
            if info.rank == 0:
                print(dump_config(config), flush=True)
            _prepare_as_rank(config, info)
            _make_run_dir(config)
        return _run_rank(config, info, job)
    num_ranks = num_ranks if num_ranks is not None else config.launch.num_ranks
    _refuse_too_many(num_ranks)
    config = check_config(config, world_size=num_ranks)
    print(dump_config(config), flush=True)
    for corpus in config.data.corpora:
        prepare_corpus(corpus)
    _make_run_dir(config)
    if num_ranks == 1:
        return _run_rank(config, info, job)
    command = [sys.executable, "-m", "megatron_ext", job, source, *overrides]
    return run_local(command, num_ranks)


def _refuse_too_many(num_ranks: int) -> None:
    most = max(_MOST_LOCAL_RANKS, os.cpu_count() or 1)
    if num_ranks > most:
        raise UserError(
            f"{num_ranks} ranks cannot be started on this machine, at most {most} can: set --ranks "
            "or launch.num_ranks, or start the ranks with torchrun or srun"
        )


def _refuse_other_size(num_ranks: int | None, info: RankInfo) -> None:
    if num_ranks is not None and num_ranks != info.world_size:
        raise UserError(
            f"--ranks {num_ranks}: {info.source} has already started {info.world_size} ranks; "
            "leave --ranks out"
        )


def _make_run_dir(config: Config) -> None:
    assert config.log.run_dir is not None
    try:
        Path(config.log.run_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"log.run_dir={config.log.run_dir}: the folder cannot be made ({error.strerror}); "
            "name another one"
        ) from None


def _run_rank(config: Config, info: RankInfo, job: Job) -> int:
    # A batch system's warning may come before training has begun: it shall not end the rank.
    with noted_signals([SIGUSR1]) as early_signals:
        # torch and megatron: only where a rank really runs.
        from megatron_ext.rank import run_rank

        code = run_rank(config, info, job, early_signals=early_signals)
    if code == exit_codes.SAVED_AND_STOPPED and info.source in ("torchrun", "srun"):
        # They take every other code for a failure: torchrun starts the ranks again, srun kills
        # those that are a moment behind.
        return exit_codes.DONE
    return code


def prepare_corpus(corpus: CorpusConfig) -> None:
    """Prepare a corpus on first use, if the configuration says how."""
    path = Path(corpus.path)
    if corpus.prepare is None or (path / METADATA_FILE).exists():
        opened = Corpus.open(path)
        if corpus.prepare is not None:
            _refuse_other_preparation(opened, corpus.prepare)
        return
    print(f"preparing {path} (once)", flush=True)
    _prepare_or_wait(_settings(corpus.prepare, path))


def _prepare_or_wait(settings: PrepareSettings) -> None:
    """Runs started together want the same corpus: one prepares, the others wait for it."""
    is_told = False
    while True:
        try:
            prepare(settings)
            return
        except PreparationUnderWay:
            if not is_told:
                print(f"another run prepares {settings.output}; waiting for it", flush=True)
            is_told = True
            time.sleep(_WAIT_SECONDS)


def _refuse_other_preparation(corpus: Corpus, options: PrepareConfig) -> None:
    """The corpus is there, but was it made as the configuration says now?"""
    made = dict(corpus.metadata["settings"])
    # "train:4096 on N bytes": how much text is not the configuration's to say.
    made["tokenizer"] = str(made.get("tokenizer")).partition(" on ")[0]
    for name in ("text_key", "validation_fraction", "include", "tokenizer"):
        wanted = getattr(options, name)
        if name == "tokenizer" and not wanted.startswith("train:"):
            continue
        if made.get(name) != wanted:
            raise UserError(
                f"{corpus.path}: was prepared with {name} {made.get(name)!r}, the configuration "
                f"says {wanted!r}; remove the folder to prepare it anew, or name another path"
            )


def _settings(options: PrepareConfig, output: Path) -> PrepareSettings:
    return PrepareSettings(
        inputs=tuple(options.input),
        output=output,
        tokenizer=options.tokenizer,
        include=tuple(options.include),
        text_key=options.text_key,
        validation_fraction=options.validation_fraction,
        bad_records=options.bad_records,
    )


def _prepare_as_rank(config: Config, info: RankInfo) -> None:
    """Rank 0 prepares; the others wait until they see the result on the shared file system."""
    for corpus in config.data.corpora:
        if info.rank == 0:
            prepare_corpus(corpus)
        elif corpus.prepare is not None:
            _wait_for(Path(corpus.path))


def _wait_for(corpus: Path) -> None:
    began = time.monotonic()
    while not (corpus / METADATA_FILE).exists():
        if time.monotonic() - began > _MOST_WAIT_SECONDS:
            raise UserError(
                f"{corpus}: rank 0 has not prepared it within {_MOST_WAIT_SECONDS / 3600:.0f} "
                "hours; prepare it before the job with: megatron-ext data prepare"
            )
        time.sleep(_WAIT_SECONDS)
