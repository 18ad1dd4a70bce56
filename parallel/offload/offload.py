"""Selective offload: part of what backward needs waits in host memory (ByteScale, section 5.1).

A micro-batch's offload ratio r is the part of its tokens whose saved activations leave the device
after a layer's forward pass and come back before its backward pass; the other tokens' stay. The
last two layers stay whole, since backward begins with them. With Act(s) bytes in each of l layers,

    bytes on the device = 2 Act(s) + (1 - r) (l - 2) Act(s)        (Eq. 3)

While layer i + 1 runs forward, i is copied out; before i + 2 starts, i is gone. While i runs
backward, i - 1 is copied back. So beside the parts that stay two layers are on the device at any
time. A copy is hidden where a layer computes longer than it takes: T(s) >= r Act(s) / bandwidth.

What leaves: storages of saved tensors [num_tokens, ...]. What does not: weights and their views,
tensors that all layers share, a number or two a token, and what was changed in place or given up
since it was saved (a recomputation fills that again). Autograd gets every tensor as it saved it,
bit for bit; only where its bytes are in between is decided here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from weakref import WeakValueDictionary

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from parallel.errors import PlanError
from parallel.offload.forward_pass import ForwardPass, Rules, SavedTensor, storage_addresses
from parallel.offload.shuttle import OffloadCount, Shuttle

NUM_RESIDENT_LAYERS = 2


class Offload:
    """Offload of one rank, for all its micro-batches.

    Args:
        shuttle: the rank's way to its host.
        num_layers: of this rank, all model chunks together, in the order of the forward pass.
        weights: parameters and buffers; neither they nor views of them move.
        successor: names the pass (see `forward_pass`) whose backward follows that of a named one,
            or None. Of use where a pass's last layers may leave (with several model chunks): they
            start back while the pass before ends.
    """

    def __init__(
        self,
        shuttle: Shuttle,
        *,
        num_layers: int,
        weights: Iterable[Tensor] = (),
        successor: Callable[[Hashable], Hashable] | None = None,
    ) -> None:
        self._shuttle = shuttle
        self._num_leaving_layers = max(0, num_layers - NUM_RESIDENT_LAYERS)
        self._weights = storage_addresses(weights)
        self._successor = successor
        self._passes: WeakValueDictionary[Hashable, ForwardPass] = WeakValueDictionary()

    @contextlib.contextmanager
    def forward_pass(
        self,
        ratio: float,
        *,
        num_tokens: Collection[int],
        shared: Iterable[Tensor] = (),
        name: Hashable = None,
    ) -> Iterator[ForwardPass]:
        """Take in what the forward pass of a micro-batch through one model chunk saves.

        The block calls `begin_layer` of what it gets. Backward needs no call.

        Args:
            ratio: part of the tokens that leave, 0 to 1.
            num_tokens: first dims of tensors that hold tokens: of the row, and of a rank's part of
                it under sequence parallelism.
            shared: tensors that stay because all layers use them, or somebody else keeps them.
            name: what `successor` calls this pass.

        Raises PlanError for a ratio out of range.
        """
        if not 0.0 <= ratio <= 1.0:
            raise PlanError(f"offload_ratio {ratio} must lie between 0 and 1")
        rules = Rules(
            ratio=ratio,
            num_leaving_layers=self._num_leaving_layers,
            num_tokens=frozenset(num_tokens) - {0},
            fixed=self._weights | storage_addresses(shared),
        )
        forward_pass = ForwardPass(
            rules, self._shuttle, prefetch_following=lambda: self._prefetch_after(name)
        )
        if name is not None:
            self._passes[name] = forward_pass
        with saved_tensors_hooks(forward_pass.save, SavedTensor.restore):
            try:
                yield forward_pass
            finally:
                forward_pass.end()

    def end_step(self) -> OffloadCount:
        """What moved since the last call; every backward pass has run."""
        return self._shuttle.end_step()

    def _prefetch_after(self, name: Hashable) -> None:
        if name is None or self._successor is None:
            return
        following = self._passes.get(self._successor(name))
        if following is not None:
            following.call()
