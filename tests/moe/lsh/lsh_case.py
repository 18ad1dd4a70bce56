"""Compressed layers, computed in parts and by the reference."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from moe.dispatch.compressed import Compression
from moe.dispatch.local import LocalDispatcher
from moe.lsh.hash import draw_rotations, hash_rows
from moe.lsh.reference import compressed_loop
from moe.records import Routing
from moe.schedule.serial import SerialExperts
from tests.moe.routed_case import Layer, RoutedCase, cases


@dataclass(frozen=True, slots=True)
class LshCase:
    """A routed layer whose tokens are hashed."""

    routed: RoutedCase = field(default_factory=lambda: RoutedCase(40, 4, 2))
    num_hashes: int = 2
    hash_dim: int = 2
    residual_scale: float = 1.0

    @property
    def rotations(self) -> Tensor:
        return draw_rotations(
            self.routed.hidden_size, num_hashes=self.num_hashes, hash_dim=self.hash_dim, seed=7
        )

    def compression(self) -> Compression:
        return Compression(self.rotations, residual_scale=self.residual_scale)

    @property
    def layer(self) -> Layer:
        return SerialExperts(LocalDispatcher(), self.compression())

    @property
    def reference(self) -> Layer:
        def layer(tokens: Tensor, routing: Routing, fc1: Tensor, fc2: Tensor) -> Tensor:
            codes = hash_rows(tokens, self.rotations.to(tokens))
            output = compressed_loop(
                tokens, routing, fc1, fc2, codes=codes, residual_scale=self.residual_scale
            )
            # Experts that nobody chose have a gradient of 0 too.
            nothing = tokens.sum() + routing.weights.sum() + fc1.sum() + fc2.sum()
            return output + (0.0 * nothing).to(output.dtype)

        return layer


def singletons(routed: RoutedCase) -> LshCase:
    """So many buckets that no two tokens share one."""
    case = LshCase(routed, num_hashes=17, hash_dim=4)
    tokens = routed.leaves(torch.float64)[0]
    assume(len(set(hash_rows(tokens, case.rotations.double()).tolist())) == routed.num_tokens)
    return case


def lsh_cases() -> st.SearchStrategy[LshCase]:
    """Small and ugly sizes, few and many buckets."""

    def hashed(routed: RoutedCase) -> st.SearchStrategy[LshCase]:
        return st.builds(
            LshCase,
            st.just(routed),
            num_hashes=st.integers(1, 5),
            hash_dim=st.integers(1, min(4, routed.hidden_size)),
            residual_scale=st.sampled_from([1.0, 0.0, 0.5]),
        )

    return cases(max_tokens=20).flatmap(hashed)
