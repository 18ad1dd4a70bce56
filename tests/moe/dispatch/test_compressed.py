"""Compressed trips of one rank: the reference's, and with buckets of one token the exact trip's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.dispatch.compressed import Compression
from moe.dispatch.local import LocalDispatcher
from moe.dispatch.payload import Payload, rounded_rows
from moe.dispatch.per_expert import PerExpert
from moe.lsh.counters import CompressionCounters
from moe.lsh.hash import hash_rows
from moe.records import Routing
from moe.reference import dense_loop
from moe.schedule.serial import SerialExperts
from tests.moe.lsh.lsh_case import LshCase, lsh_cases, singletons
from tests.moe.routed_case import RoutedCase, output_and_gradients


@settings(max_examples=50)
@given(case=lsh_cases())
def test_equals_the_reference_and_its_autograd(case: LshCase) -> None:
    found = output_and_gradients(case.layer, case.routed, torch.float64)
    wanted = output_and_gradients(case.reference, case.routed, torch.float64)
    torch.testing.assert_close(found, wanted)


@settings(max_examples=30)
@given(
    num_tokens=st.integers(0, 20),
    num_experts=st.integers(2, 5),
    hidden_size=st.integers(5, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 9),
)
def test_every_token_its_own_bucket_is_the_exact_trip_bit_by_bit(
    num_tokens: int, num_experts: int, hidden_size: int, dtype: torch.dtype, seed: int
) -> None:
    routed = RoutedCase(num_tokens, num_experts, 2, hidden_size=hidden_size, seed=seed)
    case = singletons(routed)
    found = output_and_gradients(case.layer, routed, dtype)
    wanted = output_and_gradients(SerialExperts(LocalDispatcher(), PerExpert), routed, dtype)
    for value, wanted_value in zip(found, wanted, strict=True):
        assert torch.equal(value, wanted_value)


def test_the_exact_trip_is_the_dense_loop() -> None:
    case = RoutedCase(50, 5, 3)
    found = output_and_gradients(SerialExperts(LocalDispatcher(), PerExpert), case, torch.float64)
    torch.testing.assert_close(found, output_and_gradients(dense_loop, case, torch.float64))


def test_equal_tokens_go_as_one_and_nothing_is_lost() -> None:
    """A bucket of equal tokens: its centroid is each of them, so this is exact as well."""
    case = LshCase(RoutedCase(40, 4, 2))
    tokens, weights, fc1, fc2 = case.routed.leaves(torch.float64)
    tokens = tokens[:1].expand(40, -1).contiguous()
    routing = case.routed.routing(weights)
    counters = CompressionCounters()
    compression = replace(case.compression(), counters=counters)
    output = SerialExperts(LocalDispatcher(), compression)(tokens, routing, fc1, fc2)
    torch.testing.assert_close(output, dense_loop(tokens, routing, fc1, fc2))
    report = counters.take()
    assert (report.num_rows, report.num_sent) == (80, 4)
    assert report.relative_error < 1e-12


def test_residuals_make_up_for_what_the_centroid_is_not() -> None:
    """With experts that are the identity the residual makes compression exact; without it the
    answer is the centroid."""
    routed = RoutedCase(64, 4, 2)
    tokens, weights, _, _ = routed.leaves(torch.float64)
    routing = routed.routing(weights.softmax(dim=-1))
    for scale, is_exact in ((1.0, True), (0.5, False), (0.0, False)):
        case = LshCase(routed, num_hashes=1, residual_scale=scale)
        trip = case.compression()()
        centroids, _ = trip.before_dispatch(tokens, routing)
        assert centroids.shape[0] < 20
        error = float((trip.after_combine(centroids) - tokens).norm() / tokens.norm())
        assert (error < 1e-12) == is_exact
        assert is_exact or error > 0.2


@pytest.mark.parametrize("payload", ["int8", "float8_e4m3fn"])
def test_a_rounded_centroid_is_made_up_for_too(payload: Payload) -> None:
    routed = RoutedCase(64, 4, 2)
    tokens, weights, _, _ = routed.leaves(torch.float32)
    routing = routed.routing(weights.softmax(dim=-1))
    trip = replace(LshCase(routed).compression(), payload=payload)()
    centroids, _ = trip.before_dispatch(tokens, routing)
    arrived = rounded_rows(centroids, payload=payload)
    off = (arrived - centroids).abs()
    assert float(off.max()) > 0.0
    assert bool((off <= centroids.abs().amax(dim=1, keepdim=True) / 16 * 1.0001).all())
    # Answers travel rounded as well; sent back as they came they round to themselves.
    home = rounded_rows(arrived, payload=payload)
    assert float((trip.after_combine(home) - tokens).abs().max()) < 1e-5


def test_the_first_token_of_a_bucket_sees_no_later_one() -> None:
    """Changing the last token: with means earlier outputs change, with first tokens none does."""
    routed = RoutedCase(40, 2, 2)
    tokens, weights, fc1, fc2 = routed.leaves(torch.float64)
    routing = routed.routing(weights)
    changed = tokens.clone()
    # Its direction stays nearly the same, so it stays in its bucket.
    changed[-1] *= 3.0
    case = LshCase(routed, num_hashes=1)
    for centroid in ("mean", "first"):
        layer = SerialExperts(LocalDispatcher(), Compression(case.rotations, centroid=centroid))
        codes = hash_rows(tokens, case.rotations.double())
        assert int((codes == codes[-1]).sum()) > 1
        before, after = (layer(x, routing, fc1, fc2) for x in (tokens, changed))
        is_same = bool((before[:-1] == after[:-1]).all())
        assert is_same == (centroid == "first")


def test_choices_that_lead_nowhere_are_left_out() -> None:
    case = LshCase(RoutedCase(20, 4, 2))
    tokens, weights, fc1, fc2 = case.routed.leaves(torch.float64)
    full = case.routed.routing(weights)
    experts = full.experts.clone()
    experts[::3, 1] = 4
    weights = weights.masked_fill(experts == 4, 0.0)
    routing = Routing(
        experts=experts,
        weights=weights,
        probabilities=full.probabilities,
        counts=torch.bincount(experts[experts < 4], minlength=4),
        dropped=full.counts - torch.bincount(experts[experts < 4], minlength=4),
    )
    found = case.layer(tokens, routing, fc1, fc2)
    torch.testing.assert_close(found, case.reference(tokens, routing, fc1, fc2))
