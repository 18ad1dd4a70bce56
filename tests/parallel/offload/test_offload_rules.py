"""What leaves, how much, when it comes back, and what the device holds meanwhile."""

from __future__ import annotations

import contextlib
import gc
import itertools
import weakref
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from parallel.offload.link import Copies, InlineLink, Ticket
from parallel.offload.offload import NUM_RESIDENT_LAYERS, Offload
from parallel.offload.shuttle import OffloadCount, Shuttle
from tests.parallel.offload.small_net import WIDTH, MicroBatch, Net, run_step

CPU = torch.device("cpu")
TOKENS = 64
ROW = TOKENS * WIDTH * 4  # bytes of a float32 tensor [TOKENS, WIDTH]
# Of a layer: its input, two of three parts of one product, a tanh, the gate and its square; behind
# the two parts the last token's third one is not needed.
NUM_STORAGES = 5
LAYER_BYTES = 7 * ROW - WIDTH * 4


@dataclass
class LoggedLink(InlineLink):
    """Copies at once; `log` has ("out" or "back", bytes) in order, and what tests add."""

    log: list[tuple[str, int]] = field(default_factory=list)
    host: list[weakref.ref[torch.UntypedStorage]] = field(default_factory=list)

    def copy_out(self, copies: Copies, *, after: Iterable[Ticket] = ()) -> Ticket:
        self.log.append(("out", sum(source.numel() for _, source in copies)))
        return super().copy_out(copies)

    def copy_back(self, copies: Copies) -> Ticket:
        self.log.append(("back", sum(source.numel() for _, source in copies)))
        return super().copy_out(copies)

    def host_bytes(self, num_bytes: int) -> Tensor:
        page = super().host_bytes(num_bytes)
        self.host.append(weakref.ref(page.untyped_storage()))
        return page


def offloader(
    num_layers: int, *, weights: Iterable[Tensor] = (), link: InlineLink | None = None
) -> Offload:
    shuttle = Shuttle(CPU, link=link or InlineLink())
    return Offload(shuttle, num_layers=num_layers, weights=weights)


@contextlib.contextmanager
def first_layer(
    offload: Offload, *, ratio: float = 1.0, shared: Iterable[Tensor] = ()
) -> Iterator[None]:
    """What is saved here is saved by a layer that may leave."""
    with offload.forward_pass(ratio, num_tokens=[TOKENS], shared=shared) as watched:
        watched.begin_layer(0)
        yield


def rows(width: int = WIDTH) -> Tensor:
    return torch.randn(TOKENS, width, requires_grad=True)


def test_weights_their_views_and_shared_tensors_stay() -> None:
    # A weight as long as the row must be told from an activation, and so must a view of it.
    weight = nn.Parameter(torch.randn(TOKENS, WIDTH))
    table = torch.randn(TOKENS, WIDTH)
    offload = offloader(3, weights=[weight])
    with first_layer(offload, shared=[table]):
        loss = (weight * table[:, None, :].squeeze(1)).sum() + (weight.t() * table.t()).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    assert offload.end_step() == OffloadCount(0, 0, 0)
    assert weight.grad is not None
    assert torch.equal(weight.grad, 2 * table)


def test_what_is_no_row_of_tokens_or_small_stays() -> None:
    offload = offloader(3)
    kept = [
        torch.randn(TOKENS + 1, WIDTH),  # another count of rows
        torch.randn(WIDTH, TOKENS),  # tokens in another dim
        torch.randn(TOKENS, 1),  # a number a token
        torch.randn(()),
    ]
    with first_layer(offload):
        outputs = [(value.clone().requires_grad_() * value).sum() for value in kept]
        sparse = torch.eye(TOKENS).to_sparse().requires_grad_()
        outputs.append(torch.sparse.mm(sparse, torch.ones(TOKENS, 1)).sum())
    torch.stack(outputs).sum().backward()  # type: ignore[no-untyped-call]
    assert offload.end_step().offloaded_bytes == 0


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0])
def test_one_storage_leaves_once(ratio: float) -> None:
    offload = offloader(3)
    wide = rows(3 * WIDTH)
    with first_layer(offload, ratio=ratio):
        left, middle, right = (wide * 1.0).chunk(3, dim=-1)
        # Every one is saved twice, and one of them transposed too.
        loss = (left * middle).sum() + (middle * right).sum() + (left * right).sum()
        loss = loss + (left.t() @ right.detach()).sum() + left.exp().sum()
    grads = torch.autograd.grad(loss, [wide])
    # exp keeps its output.
    assert offload.end_step().offloaded_bytes == ratio * 4 * ROW
    left, middle, right = wide.detach().chunk(3, dim=-1)
    assert torch.allclose(
        grads[0][:, :WIDTH], middle + right + right.sum(1, keepdim=True) + left.exp()
    ) or torch.allclose(grads[0][:, WIDTH : 2 * WIDTH], left + right)


def test_a_slice_of_a_storage_leaves_alone() -> None:
    offload = offloader(3)
    wide = torch.randn(2 * TOKENS, WIDTH, requires_grad=True)
    with first_layer(offload):
        upper = (wide * 1.0)[TOKENS:]
        loss = upper.square().sum()
    (grad,) = torch.autograd.grad(loss, [wide])
    assert offload.end_step().offloaded_bytes == ROW
    assert torch.equal(grad[TOKENS:], 2 * wide.detach()[TOKENS:])


def test_a_storage_that_two_layers_save_leaves_once() -> None:
    offload = offloader(4)
    x = rows()
    with offload.forward_pass(1.0, num_tokens=[TOKENS]) as watched:
        watched.begin_layer(0)
        y = x * 1.0
        one = y.square().sum()
        watched.begin_layer(1)
        two = y.square().sum()
    (grad,) = torch.autograd.grad(one + two, [x])
    count = offload.end_step()
    assert count.offloaded_bytes == ROW
    assert torch.equal(grad, 4 * x.detach())


@pytest.mark.parametrize("num_layers", range(1, 6))
def test_the_last_two_layers_stay(num_layers: int) -> None:
    net, link = Net(num_layers), LoggedLink()
    offload = offloader(num_layers, weights=net.parameters(), link=link)
    run_step(net, [MicroBatch(TOKENS, 1.0)], offload=offload)
    num_leaving = max(0, num_layers - NUM_RESIDENT_LAYERS)
    out = [entry for entry in link.log if entry[0] == "out"]
    assert out == [("out", LAYER_BYTES)] * num_leaving
    assert offload.end_step().offloaded_bytes == num_leaving * LAYER_BYTES


class Sampler:
    """Bytes of tensors that Python holds, but for host pages and what was there before."""

    def __init__(self, link: LoggedLink) -> None:
        self._link = link
        gc.collect()
        # Held, so that nothing new can take their place.
        self._known = self._storages()
        # From here on Python lists only what is new: a hundred times less.
        gc.freeze()

    def now(self) -> int:
        host = [page() for page in self._link.host]
        known = {storage._cdata for storage in (*self._known, *host) if storage is not None}
        return sum(
            {s._cdata: s.nbytes() for s in self._storages() if s._cdata not in known}.values()
        )

    @staticmethod
    def _storages() -> list[torch.UntypedStorage]:
        return [
            thing.untyped_storage()
            for thing in gc.get_objects()
            if type(thing) in (Tensor, nn.Parameter) and thing.layout == torch.strided
        ]


def held_bytes(num_layers: int, num_tokens: int, ratio: float | None) -> tuple[int, int, int]:
    """After forward; the most during forward; the most during backward. None: no offload.

    Without offload too autograd gives its tensors to Python, so that they are seen.
    """
    net, link = Net(num_layers), LoggedLink()
    x = torch.randn(num_tokens, WIDTH, requires_grad=True)
    table = torch.randn(num_tokens, WIDTH)
    offload = offloader(num_layers, weights=net.parameters(), link=link)
    sampler = Sampler(link)
    during: list[int] = []

    def sample(*_: object) -> None:
        during.append(sampler.now())

    with contextlib.ExitStack() as stack:
        watched = None
        if ratio is None:
            stack.enter_context(saved_tensors_hooks(Tensor.detach, lambda tensor: tensor))
        else:
            watched = stack.enter_context(
                offload.forward_pass(ratio, num_tokens=[num_tokens], shared=[table])
            )
        output = x
        for index, layer in enumerate(net.layers):
            if watched is not None:
                watched.begin_layer(index)
            sample()
            output = layer(output, table)
            output.register_hook(sample)
        loss = output.sum()
    del output
    after, in_forward = sampler.now(), max(during)
    during.clear()
    loss.backward()  # type: ignore[no-untyped-call]
    in_backward = max(during)
    del loss
    offload.end_step()
    x.grad = None
    net.zero_grad()
    assert sampler.now() == 0, "all is given up after backward"
    gc.unfreeze()
    return after, in_forward, in_backward


def test_device_bytes_fall_as_the_formula_says() -> None:
    num_layers, num_tokens = 6, 256
    row = num_tokens * WIDTH * 4
    layer_bytes = 7 * row
    # The first layer's input and the loss are held whatever is offloaded.
    whole, _, _ = held_bytes(num_layers, num_tokens, None)
    assert abs(whole - num_layers * layer_bytes) <= row + 4
    for ratio in (0.5, 1.0):
        after, in_forward, in_backward = held_bytes(num_layers, num_tokens, ratio)
        left = NUM_RESIDENT_LAYERS + (1 - ratio) * (num_layers - NUM_RESIDENT_LAYERS)
        assert abs(after - left * layer_bytes) <= row + 4, f"ratio {ratio}"
        # On the way there is one layer more, and backward's own tensors.
        assert in_forward <= (left + 1) * layer_bytes, f"ratio {ratio}"
        assert in_backward <= (left + 1) * layer_bytes + 4 * row, f"ratio {ratio}"


def test_a_layer_comes_back_while_the_one_behind_it_runs() -> None:
    num_layers = 6
    net, link = Net(num_layers), LoggedLink()
    offload = offloader(num_layers, weights=net.parameters(), link=link)
    x, table = torch.randn(TOKENS, WIDTH, requires_grad=True), torch.randn(TOKENS, WIDTH)
    with offload.forward_pass(1.0, num_tokens=[TOKENS], shared=[table]) as watched:
        output = x
        for index, layer in enumerate(net.layers):
            watched.begin_layer(index)
            output = layer(output, table)
            output.register_hook(lambda _, index=index: link.log.append(("backward", index)))
    link.log.clear()
    output.sum().backward()  # type: ignore[no-untyped-call]
    entries = [(what, index) if what == "backward" else (what, -1) for what, index in link.log]
    back = [("back", -1)] * NUM_STORAGES
    assert entries == [
        ("backward", 5),
        ("backward", 4),
        *back,  # of layer 3
        ("backward", 3),
        *back,
        ("backward", 2),
        *back,
        ("backward", 1),
        *back,
        ("backward", 0),
    ]


def test_the_next_pass_starts_back_while_the_first_layer_of_this_one_runs() -> None:
    """Two chunks of two layers and two micro-batches, as under interleaved pipelining."""
    link = LoggedLink()
    order = [(0, 1), (1, 1), (0, 0), (1, 0)]
    following: dict[Hashable, Hashable] = dict(itertools.pairwise(order))
    chunks = [Net(2), Net(2)]
    offload = Offload(
        Shuttle(CPU, link=link),
        num_layers=4,
        weights=[weight for chunk in chunks for weight in chunk.parameters()],
        successor=following.get,
    )
    x, table = torch.randn(TOKENS, WIDTH, requires_grad=True), torch.randn(TOKENS, WIDTH)
    received: dict[Hashable, Tensor] = {}
    outputs: dict[Hashable, Tensor] = {}
    for chunk, net in enumerate(chunks):
        for micro_batch in range(2):
            before = outputs[micro_batch, 0].detach() if chunk else x.detach()
            name = (micro_batch, chunk)
            received[name] = before.requires_grad_()
            with offload.forward_pass(
                0.5, num_tokens=[TOKENS], shared=[table, before], name=name
            ) as watched:
                outputs[name] = net(before, table, watched, first_layer=2 * chunk)
    link.log.clear()
    num_back = []
    grads: dict[Hashable, Tensor] = {}
    for micro_batch, chunk in order:
        name = (micro_batch, chunk)
        grad = torch.ones_like(x) if chunk else grads[micro_batch, 1]
        outputs[name].backward(grad)  # type: ignore[no-untyped-call]
        found = received[name].grad
        assert found is not None
        grads[name] = found
        num_back.append(sum(what == "back" for what, _ in link.log))
    # The last chunk stays; its last pass calls the first chunk's last layer. That chunk's first
    # layer has one storage less, since its input stays.
    last, first = NUM_STORAGES, NUM_STORAGES - 1
    assert list(itertools.accumulate([0, last, first + last, first])) == num_back


def changed(*, where: str) -> None:
    """Run backward over a tensor that was changed in place after it was saved."""
    offload = offloader(4)
    x = rows()
    with offload.forward_pass(0.5, num_tokens=[TOKENS]) as watched:
        watched.begin_layer(3 if where == "resident" else 0)
        y = x * 1.0
        loss = y.square().sum()
        if where == "same layer":
            y.add_(1)
        watched.begin_layer(1)
        if where in ("while leaving", "resident"):
            y.add_(1)
        if where == "saved again":
            y.add_(1)
            loss = y.square().sum()
    loss.backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("where", ["resident", "same layer", "while leaving"])
def test_a_change_in_place_is_an_error_as_without_offload(where: str) -> None:
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        changed(where=where)


def test_what_was_changed_between_two_layers_is_no_longer_the_storage_that_left() -> None:
    offload = offloader(4)
    x = rows()
    with offload.forward_pass(1.0, num_tokens=[TOKENS]) as watched:
        watched.begin_layer(0)
        y = x * 1.0
        y.square().sum()
        watched.begin_layer(1)
        loss = y.add_(1).square().sum()
    (grad,) = torch.autograd.grad(loss, [x])
    assert torch.equal(grad, 2 * (x.detach() + 1))


def test_what_was_given_up_to_be_computed_again_stays() -> None:
    """As megatron's `CheckpointWithoutOutput`: the storage is emptied and filled in backward."""
    offload = offloader(3)
    x = rows()
    with first_layer(offload):
        y = x * 1.0
        content = y.detach().clone()
        loss = y.square().sum()
        y.untyped_storage().resize_(0)
    y.untyped_storage().resize_(ROW)
    y.untyped_storage().copy_(content.untyped_storage())
    (grad,) = torch.autograd.grad(loss, [x])
    assert offload.end_step().offloaded_bytes == 0
    assert torch.equal(grad, 2 * content)


def test_backward_before_it_is_gone_needs_no_copy_back() -> None:
    offload = offloader(3)
    x = rows()
    with first_layer(offload, ratio=0.5):
        loss = (x * 1.0).square().sum()
    (grad,) = torch.autograd.grad(loss, [x])
    count = offload.end_step()
    assert (count.offloaded_bytes, count.returned_bytes) == (ROW // 2, 0)
    assert torch.equal(grad, 2 * x.detach())


def test_host_memory_is_used_again() -> None:
    net = Net(5)
    offload = offloader(5, weights=net.parameters())
    sizes = []
    for num_tokens in (64, 60, 44, 64, 50):
        run_step(net, [MicroBatch(num_tokens, 1.0)] * 3, offload=offload)
        sizes.append(offload.end_step().host_bytes)
    assert sizes[0] > 0
    assert sizes == sizes[:1] * 5


def test_a_graph_that_is_dropped_frees_everything() -> None:
    net = Net(4)
    offload = offloader(4, weights=net.parameters())
    x, table = torch.randn(TOKENS, WIDTH, requires_grad=True), torch.randn(TOKENS, WIDTH)
    with offload.forward_pass(1.0, num_tokens=[TOKENS], shared=[table]) as watched:
        output = net(x, table, watched)
    alive = weakref.ref(watched)
    del output, watched
    assert alive() is None
