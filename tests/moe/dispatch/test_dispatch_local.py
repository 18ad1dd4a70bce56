"""Dispatch, experts and combine on one rank are the dense loop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

from moe.dispatch.local import LocalDispatcher
from moe.reference import dense_loop
from moe.schedule.serial import SerialExperts
from tests.megatron_ext.tolerance import assert_as_good_as_plain
from tests.moe.routed_case import Choice, RoutedCase, cases, output_and_gradients

NAMES = ("output", "gradient of tokens", "gradient of weights", "of linear_fc1", "of linear_fc2")


@given(case=cases())
def test_equals_the_dense_loop(case: RoutedCase) -> None:
    found = output_and_gradients(SerialExperts(LocalDispatcher()), case, torch.float64)
    torch.testing.assert_close(found, output_and_gradients(dense_loop, case, torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("choice", ["random", "all to one", "none for one"])
def test_is_as_exact_as_the_dense_loop(choice: Choice, dtype: torch.dtype) -> None:
    case = RoutedCase(num_tokens=50, num_experts=8, topk=2, hidden_size=32, choice=choice)
    found = output_and_gradients(SerialExperts(LocalDispatcher()), case, dtype)
    plain = output_and_gradients(dense_loop, case, dtype)
    exact = output_and_gradients(dense_loop, case, torch.float64)
    for name, value, plain_value, exact_value in zip(NAMES, found, plain, exact, strict=True):
        assert_as_good_as_plain(value, plain=plain_value, exact=exact_value, what=name)
