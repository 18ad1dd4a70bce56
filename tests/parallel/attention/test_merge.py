"""Merging partial attentions: the reference, and the Triton kernel interpreted and on a GPU."""

import pytest
import torch

from parallel.attention.merge import merge_partial
from tests.parallel.attention.merge_case import CASES, MergeCase, check_merge
from tests.triton_process import needs_triton, run_interpreted


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_parts_become_the_whole(case: MergeCase) -> None:
    check_merge(merge_partial, case)


def test_float64_stays_float64() -> None:
    check_merge(merge_partial, MergeCase(6, 5, 4, part_dtype=torch.float64), torch.float64)


@needs_triton
def test_interpreted_kernel_equals_the_definition() -> None:
    assert run_interpreted(__file__).strip() == f"{len(CASES)} cases"


def check_interpreted() -> None:
    from parallel.attention.merge_triton import merge_partial_triton

    for case in CASES:
        check_merge(merge_partial_triton, case)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_parts_become_the_whole_on_a_gpu(case: MergeCase) -> None:
    def on_gpu(*tensors: torch.Tensor, rows: torch.Tensor | None) -> None:
        moved = [x.cuda() for x in tensors]
        merge_partial(*moved, rows=None if rows is None else rows.cuda())
        for mine, theirs in zip(tensors[:2], moved, strict=False):
            mine.copy_(theirs)

    check_merge(on_gpu, case)


if __name__ == "__main__":
    check_interpreted()
    print(f"{len(CASES)} cases")
