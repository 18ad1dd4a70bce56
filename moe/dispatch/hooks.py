"""What is done to tokens before and after they travel: four functions round a trip (FSMoE's hooks).

    here    tokens --before_dispatch--> legs out --after_dispatch--> there
    there   experts
    here    output <--after_combine--- legs home <--before_combine-- there

(FSMoE, arXiv 2501.10714, section 3.) Every dispatcher and both executors call them, and there is a
new object for each trip, so that it may remember on the way home what it did on the way out. The
backward pass of each is that of the torch functions it is made of.

At home a hook sees all tokens of a micro-batch and may send others in their place, with a routing
of their own: so similar tokens travel as one (`moe.dispatch.compressed`) or each choice by itself
(`moe.dispatch.per_expert`). At the experts it sees rows as they arrive, one for each token and
rank, or some of them where tokens travel in chunks: it treats each row by itself.

How a row is *written* on a link is not here but with the link (`moe.dispatch.payload.Wire`): on the
way home copies are summed after each link, and 8-bit numbers with a scale cannot be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moe.records import Routing


class Hooks:
    """The hooks of one trip, which do nothing; a subclass has those that do something."""

    def before_dispatch(self, tokens: Tensor, routing: Routing) -> tuple[Tensor, Routing]:
        """What travels for tokens [num_tokens, hidden_size], and where to; any number of rows."""
        return tokens, routing

    def after_dispatch(self, rows: Tensor) -> Tensor:
        """What the experts get for rows [num arrived, hidden_size]; as many."""
        return rows

    def before_combine(self, answers: Tensor) -> Tensor:
        """What goes home for answers [num arrived, hidden_size], the weighted sums over the
        experts of this rank; as many."""
        return answers

    def after_combine(self, outputs: Tensor) -> Tensor:
        """The layer's output [num_tokens, hidden_size] for what came home, a row for each that
        `before_dispatch` sent."""
        return outputs


HookMaker = Callable[[], Hooks]
"""Makes the hooks of a trip; `Hooks` itself makes those that do nothing."""


class Nested(Hooks):
    """Hooks round hooks: the first one is next to the layer, the last one next to the links."""

    def __init__(self, hooks: tuple[Hooks, ...]) -> None:
        self._hooks = hooks

    def before_dispatch(self, tokens: Tensor, routing: Routing) -> tuple[Tensor, Routing]:
        for hooks in self._hooks:
            tokens, routing = hooks.before_dispatch(tokens, routing)
        return tokens, routing

    def after_dispatch(self, rows: Tensor) -> Tensor:
        for hooks in reversed(self._hooks):
            rows = hooks.after_dispatch(rows)
        return rows

    def before_combine(self, answers: Tensor) -> Tensor:
        for hooks in self._hooks:
            answers = hooks.before_combine(answers)
        return answers

    def after_combine(self, outputs: Tensor) -> Tensor:
        for hooks in reversed(self._hooks):
            outputs = hooks.after_combine(outputs)
        return outputs


def nested(*makers: HookMaker) -> HookMaker:
    """Makes all of them for each trip, the first next to the layer."""
    return lambda: Nested(tuple(make() for make in makers))


@dataclass(frozen=True, slots=True)
class Recorded:
    """What a hook did to some rows, for an executor whose backward pass is written by hand."""

    given: Tensor
    made: Tensor

    @property
    def does_nothing(self) -> bool:
        return self.made is self.given

    def backward(self, grad: Tensor) -> Tensor:
        """The gradient of `given` for that of `made`."""
        if self.does_nothing:
            return grad
        return torch.autograd.grad(self.made, self.given, grad)[0]


def record(hook: Callable[[Tensor], Tensor], rows: Tensor) -> Recorded:
    """Call a hook, with its graph kept."""
    with torch.enable_grad():
        given = rows.detach().requires_grad_()
        return Recorded(given, hook(given))
