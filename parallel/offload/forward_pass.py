"""One micro-batch in one model chunk: what its layers save, and how far backward has come.

Autograd hands over each tensor that it saves and takes a handle for it; when backward wants the
tensor, it gives the handle. What a layer saved is looked at when the next one begins: by then it is
known which tensors share a storage, and what was changed or given up since.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from parallel.offload.moved import (
    Departure,
    MovedStorage,
    View,
    changed_in_place,
    run_bytes,
    run_of,
)
from parallel.offload.shuttle import Shuttle

# Less a token is a norm's scale or the like: not worth a copy.
_MIN_BYTES_PER_TOKEN = 64


@dataclass(frozen=True, slots=True)
class Rules:
    """Which saved tensors of a micro-batch leave, and how much of them.

    Attributes:
        ratio: part of the tokens that leave.
        num_leaving_layers: of the rank's layers, the first so many may leave.
        num_tokens: first dims of tensors that hold tokens.
        fixed: addresses of storages that stay.
    """

    ratio: float
    num_leaving_layers: int
    num_tokens: frozenset[int]
    fixed: frozenset[int]

    def num_leaving_bytes(self, views: Iterable[View], *, run_bytes: int) -> int:
        """Of a run that these views share. Storages hold token after token.

        So the first part of the bytes is the first part of the tokens.
        """
        for view in views:
            num_tokens = view.shape[0] if view.shape else 0
            if num_tokens in self.num_tokens and run_bytes >= num_tokens * _MIN_BYTES_PER_TOKEN:
                return run_bytes * round(self.ratio * num_tokens) // num_tokens
        return 0


def storage_addresses(tensors: Iterable[Tensor]) -> frozenset[int]:
    """Where the storages of these tensors are; the name of memory that nobody gives up."""
    return frozenset(tensor.untyped_storage().data_ptr() for tensor in tensors) - {0}


class ForwardPass:
    """Made by `Offload.forward_pass`, kept alive by the handles in the graph.

    Args:
        prefetch_following: called when backward has reached this pass's first layer.
    """

    def __init__(
        self, rules: Rules, shuttle: Shuttle, *, prefetch_following: Callable[[], None]
    ) -> None:
        self._rules, self._shuttle = rules, shuttle
        self._prefetch_following = prefetch_following
        self._layer: int | None = None
        # Those that saved anything, first to last.
        self._layers: list[int] = []
        # Saved by the layer that runs now.
        self._open: list[SavedTensor] = []
        # While forward runs: what has left, by the identity of its storage. The reference keeps
        # that identity from being given to another one.
        self._moved: dict[int, tuple[StorageWeakRef, MovedStorage]] = {}
        # By layer: what nobody has called back yet.
        self._away: dict[int, list[MovedStorage]] = {}
        self._is_called = False
        self._reached: int | None = None

    def begin_layer(self, layer: int) -> None:
        """What is saved from here on belongs to this layer (counted over the rank's chunks)."""
        self._close_layer()
        self._layer = layer

    def end(self) -> None:
        """Forward is over, well or not."""
        self._close_layer()
        self._layer = None
        self._moved.clear()

    def save(self, tensor: Tensor) -> SavedTensor:
        """Autograd's pack hook."""
        # A handle must not hold the graph that holds it.
        saved = SavedTensor(tensor.detach(), layer=self._layer, forward_pass=self)
        self._open.append(saved)
        return saved

    def call(self) -> None:
        """Backward begins soon: bring back what it needs first."""
        if self._layers and not self._is_called:
            self._is_called = True
            self._bring_back(self._layers[-1])

    def backward_reaches(self, layer: int) -> None:
        """Bring back the layer's storages and those of the layer that comes next."""
        if self._reached is not None and layer >= self._reached:
            return
        self._reached, self._is_called = layer, True
        self._bring_back(layer)
        below = [other for other in self._layers if other < layer]
        if below:
            self._bring_back(below[-1])
        else:
            self._prefetch_following()

    def arrived(self, storage: MovedStorage) -> MovedStorage:
        self._shuttle.arrive(storage)
        return storage

    def _bring_back(self, layer: int) -> None:
        # What was saved last is needed first.
        self._shuttle.bring_back(reversed(self._away.pop(layer, [])))

    def _close_layer(self) -> None:
        saved, self._open = self._open, []
        # The layer before has had this layer's time to leave.
        self._shuttle.release()
        if self._layer is None or not saved:
            return
        self._layers.append(self._layer)
        if self._layer < self._rules.num_leaving_layers:
            self._send(saved, self._layer)

    def _send(self, saved: list[SavedTensor], layer: int) -> None:
        leaving = []
        for tensors in _by_storage(one for one in saved if self._is_plain(one.tensor)):
            if not all(self._is_movable(one) for one in tensors) or self._has_left(tensors):
                continue
            departure = self._departure(tensors)
            if departure.num_leaving:
                leaving.append((departure, tensors))
        storages = self._shuttle.send(departure for departure, _ in leaving)
        for moved, (_, tensors) in zip(storages, leaving, strict=True):
            storage = tensors[0].storage
            reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
            self._moved[storage._cdata] = reference, moved
            for one in tensors:
                one.move_to(moved)
        if storages:
            self._away[layer] = storages

    def _has_left(self, tensors: list[SavedTensor]) -> bool:
        """Whether an earlier layer sent this storage away; then that one's care is theirs too."""
        if tensors[0].storage._cdata not in self._moved:
            return False
        _, moved = self._moved[tensors[0].storage._cdata]
        run = run_of([one.view for one in tensors])
        if all(moved.holds(*run, version=one.tensor._version) for one in tensors):
            for one in tensors:
                one.move_to(moved)
        # What it does not hold stays: somebody else keeps the storage on the device.
        return True

    def _departure(self, tensors: list[SavedTensor]) -> Departure:
        views = [one.view for one in tensors]
        first_byte, end_byte = run_of(views)
        return Departure(
            tensor=tensors[0].tensor,
            run=run_bytes(tensors[0].storage, first_byte, end_byte),
            first_byte=first_byte,
            num_leaving=self._rules.num_leaving_bytes(views, run_bytes=end_byte - first_byte),
        )

    def _is_plain(self, tensor: Tensor) -> bool:
        """On the device, in one storage (a subclass may have several)."""
        is_strided = type(tensor) is Tensor and tensor.layout == torch.strided
        return is_strided and tensor.device == self._shuttle.device

    def _is_movable(self, saved: SavedTensor) -> bool:
        return (
            saved.is_unchanged
            and saved.storage.data_ptr() not in self._rules.fixed
            # Given up, to be computed again.
            and saved.view.end_byte <= saved.storage.nbytes()
        )


def _by_storage(saved: Iterable[SavedTensor]) -> Iterable[list[SavedTensor]]:
    found: dict[int, list[SavedTensor]] = defaultdict(list)
    for one in saved:
        found[one.storage._cdata].append(one)
    return found.values()


class SavedTensor:
    """Autograd's handle for one tensor: the tensor itself, or its place in a moved storage."""

    __slots__ = ("_forward_pass", "_layer", "_moved", "_tensor", "_version", "_view")

    def __init__(self, tensor: Tensor, *, layer: int | None, forward_pass: ForwardPass) -> None:
        self._tensor: Tensor | None = tensor
        self._version = tensor._version
        self._layer = layer
        self._forward_pass = forward_pass
        self._moved: MovedStorage | None = None
        self._view: View | None = None

    @property
    def tensor(self) -> Tensor:
        assert self._tensor is not None
        return self._tensor

    @property
    def storage(self) -> torch.UntypedStorage:
        return self.tensor.untyped_storage()

    @property
    def view(self) -> View:
        return View.of(self.tensor)

    @property
    def is_unchanged(self) -> bool:
        return self.tensor._version == self._version

    def move_to(self, storage: MovedStorage) -> None:
        """From here on the tensor is in the storage's care."""
        self._view, self._moved, self._tensor = self.view, storage, None

    def restore(self) -> Tensor:
        """Autograd's unpack hook. Raises RuntimeError for what was changed in place meanwhile."""
        if self._layer is not None:
            self._forward_pass.backward_reaches(self._layer)
        if self._moved is not None:
            assert self._view is not None
            return self._forward_pass.arrived(self._moved).tensor(self._view)
        if not self.is_unchanged:
            raise changed_in_place(list(self.tensor.shape))
        return self.tensor
