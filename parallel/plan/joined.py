"""Which things belong together, directly or through others: union-find; and those of experts."""

from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

# A micro-batch, by rank and index or by its number in a flat plan.
Member = TypeVar("Member", int, tuple[int, int])


class Joined(Generic[Member]):
    """Groups that grow as their members are joined; what was never joined does not appear."""

    def __init__(self) -> None:
        self._parent: dict[Member, Member] = {}

    def root(self, member: Member) -> Member:
        """The one that stands for its group."""
        parent = self._parent.setdefault(member, member)
        while parent != member:
            above = self._parent[parent]
            self._parent[member] = above
            member, parent = parent, above
        return member

    def join(self, one: Member, other: Member) -> None:
        """Make their groups one."""
        self._parent[self.root(other)] = self.root(one)

    def groups(self) -> list[tuple[Member, ...]]:
        """Members and groups ascending; a group of one joined itself."""
        found: dict[Member, list[Member]] = {}
        for member in sorted(self._parent):
            found.setdefault(self.root(member), []).append(member)
        return [tuple(members) for members in found.values()]


def expert_rows(
    counts: Sequence[int], expert_parallel_size: int
) -> Iterator[tuple[int, list[int], list[int]]]:
    """Micro-batches that experts bring together: those of one index in each group of ranks.

    counts: micro-batches of each rank. Yields the index, the ranks that have a micro-batch of it,
    and the others of their group; nothing where groups are single ranks.
    """
    if expert_parallel_size == 1:
        return
    for first in range(0, len(counts), expert_parallel_size):
        group = range(first, min(first + expert_parallel_size, len(counts)))
        for index in range(max(counts[rank] for rank in group)):
            present = [rank for rank in group if index < counts[rank]]
            yield index, present, [rank for rank in group if index >= counts[rank]]
