"""The Triton kernels of softmax cross entropy, interpreted on the CPU."""

from __future__ import annotations

import torch
import torch.distributed as dist

from tests.megatron_ext.test_linear_cross_entropy import Case, check_case
from tests.triton_process import needs_triton, run_interpreted

# The interpreter takes a millisecond an operation. 9,000 columns are more than one block.
CASES = (
    Case("one token", 1),
    Case("odd", 7, vocab_size=250, max_chunk_tokens=3, z_loss_coeff=1e-2, weights="any"),
    Case("one id", 2, vocab_size=1),
    Case("several blocks", 5, vocab_size=9_000, weights="mask"),
    Case("a sure answer", 4, vocab_size=64, scale=60.0),
    Case("large logits", 4, vocab_size=64, offset=1000.0, z_loss_coeff=1e-6),
)


def check_columns_of_another_rank() -> None:
    """Labels below and beyond the columns: no target, and no 1 is taken off the softmax."""
    from megatron_ext.softmax_cross_entropy_triton import gradient_, row_sums

    logits = torch.randn(3, 10)
    labels = torch.tensor([-1, 4, 10])
    maximum, exp_sum, target = row_sums(logits, labels)
    assert torch.equal(maximum, logits.amax(dim=1))
    exponentials = torch.exp(logits - maximum[:, None])
    torch.testing.assert_close(exp_sum, exponentials.sum(dim=1))
    assert target.tolist() == [0.0, float(logits[1, 4]), 0.0]
    scale, weights = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([5.0, 7.0, 11.0])
    expected = exponentials * scale[:, None]
    expected[1, 4] -= 7.0
    gradient_(logits, labels, maximum=maximum, scale=scale, token_weights=weights)
    torch.testing.assert_close(logits, expected)


def check_interpreted() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD
    assert group is not None
    check_columns_of_another_rank()
    for case in CASES:
        check_case(case, torch.float32, group, kernel="triton")
        check_case(case, torch.bfloat16, group, kernel="triton")
    dist.destroy_process_group()


@needs_triton
def test_interpreted_kernels_equal_the_definition() -> None:
    assert run_interpreted(__file__).strip() == f"{len(CASES)} cases"


if __name__ == "__main__":
    check_interpreted()
    print(f"{len(CASES)} cases")
