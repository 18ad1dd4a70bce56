"""Point-to-point messages over one process group, in rounds that cannot deadlock.

Any two ranks of the group may talk, so sequences shared by changing sets of ranks need no groups
of their own (ByteScale, section 5.1; arXiv 2502.21231). A *round* is one batch of messages that a
rank sends and receives at once. Rounds carry labels that both ends of every message agree on, such
as "step 3 of the ring"; a rank posts its rounds in ascending order of labels and waits for a round,
if at all, after posting it.

Why no rank waits for ever: of all rounds that are not finished, take one with the smallest label.
Every message of it has its other end in a round of the same label. The rank there has finished its
rounds of smaller labels, so nothing keeps it from posting that one; both ends are then posted and
the message is delivered. This needs no common number of rounds: a rank that has nothing to say
under a label posts nothing.

NCCL and RCCL want all ranks of a group to take part in its first batch: run one collective on the
group (a barrier will do) before the first exchange.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch import distributed as dist


@dataclass(slots=True)
class Traffic:
    """What a rank has sent, for its metrics; give one to an `Exchange` and read it at will."""

    num_bytes_sent: int = 0
    num_messages_sent: int = 0


@dataclass(frozen=True, slots=True)
class Message:
    """One contiguous tensor that goes to `peer` or, not `is_sent`, comes from there."""

    tensor: Tensor
    peer: int
    """A rank of the exchange's group."""
    is_sent: bool


@dataclass(frozen=True, slots=True)
class Round:
    """Messages under way. Their tensors may be neither written nor read before `wait`."""

    works: tuple[dist.Work, ...] = ()
    peers: tuple[int, ...] = ()
    """Ranks of the whole run, one for each work, or of a work that stands for all of them."""

    def wait(self) -> None:
        """Return when all messages have arrived; on a GPU, let the current stream wait for them.

        Raises RuntimeError naming the rank whose message did not come or could not go.
        """
        for number, work in enumerate(self.works):
            try:
                work.wait()
            except RuntimeError as error:
                is_each = len(self.works) == len(self.peers)
                peers = self.peers[number : number + 1] if is_each else self.peers
                raise _broken(peers, error) from error


@dataclass(slots=True)
class Exchange:
    """The way to all other ranks of a group, with buffers that calls reuse."""

    group: dist.ProcessGroup | None
    """None: the default group."""
    traffic: Traffic = field(default_factory=Traffic)
    _buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = field(default_factory=dict)

    def post(self, messages: Sequence[Message]) -> Round:
        """Start a round. Empty tensors are not sent; both ends know their sizes."""
        operations = []
        peers: list[int] = []
        # Receives first: gloo asks for data on the connection that carries its own, and asked for
        # late, behind it, the two directions take turns (measured: half the speed).
        for message in sorted(messages, key=lambda message: message.is_sent):
            if message.tensor.numel() == 0:
                continue
            operations.append(
                dist.P2POp(
                    dist.isend if message.is_sent else dist.irecv,
                    message.tensor,
                    group=self.group,
                    group_peer=message.peer,
                )
            )
            peers.append(
                message.peer
                if self.group is None
                else dist.get_global_rank(self.group, message.peer)
            )
            if message.is_sent:
                self.traffic.num_bytes_sent += message.tensor.nbytes
                self.traffic.num_messages_sent += 1
        if not operations:
            return Round()
        try:
            works = dist.batch_isend_irecv(operations)
        except RuntimeError as error:
            raise _broken(tuple(peers), error) from error
        return Round(tuple(works), tuple(peers))

    def buffer(
        self, name: str, shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Contiguous memory of this shape that the next call of this name gets again.

        What it holds is arbitrary. A buffer of one name serves one use at a time.
        """
        size = 1
        for length in shape:
            size *= length
        key = (name, dtype, device)
        held = self._buffers.get(key)
        if held is None or held.numel() < size:
            held = torch.empty(size, dtype=dtype, device=device)
            self._buffers[key] = held
        return held[:size].view(shape)


def _broken(peers: tuple[int, ...], error: RuntimeError) -> RuntimeError:
    named = ", ".join(str(peer) for peer in sorted(set(peers)))
    return RuntimeError(
        f"rank {dist.get_rank()}: the exchange with rank {named} broke off; look at the output of "
        f"that rank for the cause ({error})"
    )
