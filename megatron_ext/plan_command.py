"""`megatron-ext plan`: check a configuration, predict what it needs and attains; no rank starts."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.config import Config
from megatron_ext.config_check import check_config
from megatron_ext.config_file import dump_config, load_config
from megatron_ext.errors import UserError
from megatron_ext.plan_step_command import read_lengths
from megatron_ext.planning import report
from megatron_ext.planning.cures import cures
from megatron_ext.planning.device_profile import load_profile
from megatron_ext.planning.megatron_flags import megatron_flags
from megatron_ext.planning.predict import Prediction, predict
from megatron_ext.planning.search import choice_of, search
from megatron_ext.planning.subject import Subject, subject_of

_TOKEN_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """Names as the options of the command."""

    source: str
    overrides: Sequence[str] = ()
    ranks: int | None = None
    nodes: int | None = None
    device: str | None = None
    lengths: Path | None = None
    tokens: str | None = None
    is_search: bool = False
    as_json: bool = False


def plan(request: PlanRequest) -> int:
    """Print the resolved tree and what follows from it; returns the exit code."""
    config = load_config(request.source, request.overrides)
    num_ranks = _num_ranks(request, config)
    config = check_config(config, world_size=num_ranks)
    lengths = read_lengths(request.lengths) if request.lengths else ()
    subject = subject_of(config, num_ranks=num_ranks, device_name=request.device, lengths=lengths)
    found = predict(subject.model, subject.layout, subject.device, balance=subject.balance)
    budget = _token_budget(request.tokens)
    tokens = budget or float(found.layout.tokens_per_step * config.train.train_iters)
    if request.is_search:
        return _search(request, config, subject, tokens)
    if request.as_json:
        tree = report.tree(subject, found, tokens)
        print(json.dumps(tree | {"megatron_flags": megatron_flags(config)}))
        return 0
    print(dump_config(config))
    print("\n".join(report.describe(subject, found, tokens)))
    for warning in _warnings(subject, found):
        print(warning)
    print("\nthe same in megatron's words:\n  " + " ".join(megatron_flags(config)))
    return 0


def _num_ranks(request: PlanRequest, config: Config) -> int:
    if request.nodes is None:
        return request.ranks if request.ranks is not None else config.launch.num_ranks
    if request.ranks is not None:
        raise UserError(f"--nodes {request.nodes} and --ranks {request.ranks}: give one of them")
    if request.nodes < 1:
        raise UserError(f"--nodes {request.nodes}: at least 1")
    name = request.device or config.launch.device_profile
    if name is None:
        raise UserError(
            "--nodes needs to know the ranks of a node: --device NAME, or launch.device_profile"
        )
    return request.nodes * load_profile(name).ranks_per_node


def _token_budget(text: str | None) -> float | None:
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?(?:[eE]\+?[0-9]{1,2})?)([KMBT]?)", text)
    if found is None or not float(found[1]):
        raise UserError(f"--tokens {text!r}: expected a count such as 300B, 1.5T or 2e12")
    return float(found[1]) * _TOKEN_UNITS[found[2]]


def _warnings(subject: Subject, found: Prediction) -> list[str]:
    lines = []
    tensor, node = subject.layout.tensor_size, subject.device.ranks_per_node
    if tensor > subject.device.ranks_per_node:
        lines.append(
            f"slow: parallel.tensor_model_parallel_size={tensor} leaves a node of {node} ranks; "
            f"{node} is the most that shares its links"
        )
    if not found.fits:
        ways = cures(subject.model, subject.layout, subject.device, balance=subject.balance)
        if ways:
            lines += ["one of these alone would make it fit:", *(f"  {way}" for way in ways)]
        else:
            lines.append("no single change makes it fit; plan --search tries all together")
    return lines


def _search(request: PlanRequest, config: Config, subject: Subject, tokens: float) -> int:
    tokens_per_step, longest = config.train.global_batch_tokens, config.data.max_sequence_length
    assert tokens_per_step is not None
    began = time.perf_counter()
    result = search(
        subject.model,
        subject.layout,
        subject.device,
        global_batch_tokens=tokens_per_step,
        max_sequence_length=longest,
        balance=subject.balance,
    )
    seconds = time.perf_counter() - began
    given = choice_of(subject.layout, max_sequence_length=longest)
    if request.as_json:
        tree = report.search_tree(result, given=given, seconds=seconds)
        about = {"device": subject.device_name, "assumptions": list(subject.assumptions)}
        print(json.dumps(tree | about))
        return 0
    for line in report.describe_search(result, given=given, seconds=seconds, tokens=tokens):
        print(line)
    for sentence in subject.assumptions:
        print(f"assumed: {sentence}")
    return 0
