"""Slurm's short forms, against lists that are written out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.errors import UserError
from megatron_ext.launch.slurm_lists import first_host, tasks_per_node


@pytest.mark.parametrize(
    ("node_list", "host"),
    [
        ("login1", "login1"),
        ("n[003-007,9],m1", "n003"),
        ("frontier[00001-00004]", "frontier00001"),
        ("a-b.example.org,c", "a-b.example.org"),
        ("rack[1-2]node[07,09-12],x", "rack1node07"),
        ("n[5]", "n5"),
    ],
)
def test_first_host(node_list: str, host: str) -> None:
    assert first_host(node_list) == host


@pytest.mark.parametrize("node_list", ["", ",n1", "[1-2", "\n"])
def test_node_lists_of_another_form_are_refused(node_list: str) -> None:
    with pytest.raises(UserError, match="node list"):
        first_host(node_list)


@given(st.lists(st.tuples(st.integers(1, 64), st.integers(1, 5)), min_size=1, max_size=6))
def test_tasks_per_node_are_written_out(runs: list[tuple[int, int]]) -> None:
    text = ",".join(f"{count}(x{times})" if times > 1 else f"{count}" for count, times in runs)
    assert tasks_per_node(text) == [count for count, times in runs for _ in range(times)]


@pytest.mark.parametrize("text", ["", "x", "2(3)", "2,,2", "-1", "2(x)"])
def test_counts_of_another_form_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="tasks per node"):
        tasks_per_node(text)
