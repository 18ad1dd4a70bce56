"""Slurm writes lists of nodes and counts in short; these two readers need no `scontrol`."""

import re

from megatron_ext.errors import UserError


def first_host(node_list: str) -> str:
    """The first host of Slurm's compressed list: `n[003-007,9],m1` gives `n003`."""
    first = re.match(r"(?:[^,\[\]\s]|\[[0-9,-]+\])+", node_list)
    if first is None:
        raise UserError(f"node list {node_list!r}: expected Slurm's form, such as n[01-04],m7")
    return re.sub(r"\[([0-9]+)[0-9,-]*\]", r"\1", first.group())


def tasks_per_node(text: str) -> list[int]:
    """Slurm's compressed counts: `2(x3),1` gives [2, 2, 2, 1]."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,7})(?:\(x([0-9]{1,7})\))?", part)
        if match is None:
            raise UserError(f"tasks per node {text!r}: expected Slurm's form, such as 8(x4),2")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts
