"""What no plan of a step in a pipeline can beat.

All micro-batches (rows) of a step in a pipeline of p stages have one length L, so each costs at
least c = b L + g, and a rank of m rows of S seconds together takes

    S + (p - 1) longest row  >=  S (1 + (p - 1) / m)

because its longest is no shorter than its mean. So S <= T m / (m + p - 1) on each rank if the step
takes T, which is concave in m: of R ranks with N rows together, Jensen's inequality gives

    sum of all S  <=  R T m / (m + p - 1)      with m = N / R

On the other side all rows together hold all tokens (N L >= sum_i s_i) and all attention a s_i^2,
and a sequence longer than L needs at least s_i / L ranks, whose exchange X_i(L) is least there:

    sum of all S  >=  max(b sum_i s_i + g N,  c N) + sum_i (a s_i^2 + X_i(L), without b s_i)

Short rows make short bubbles and long exchanges, so the bound is the least over all L and N. One
thing more: a sequence on D ranks lasts U(D) = c + a s^2 / D + exchange on each of them, so p U(D)
<= T, and those D ranks have S <= T - (p - 1) U(D). For the longest sequence this is asked of every
D; the best counts. For all of the longest together: let V = U - c be what a row lasts beyond c. The
V_i of the sequences on one rank add up to T - (p - 1) (c + V) - c at most, V the largest of them,
so with f(V) = V / (T - p c - (p - 1) V), which grows with V,

    V  >=  f(V) sum_i V_i  >=  sum_i f(V_i) V_i
    R T  >=  sum of all S + (p - 1) (R c + sum_i D_i V_i f(V_i))

Rows between two lengths are bounded at once (the row cost of the shorter, the exchange of the
longer), and the interval that promises most is halved until it is narrow: branch and bound.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from parallel.plan.cost import CostModel

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

# Of an interval of row lengths that is bounded at once: the longest over the shortest.
_NARROW = 1.02
# A promise of more than this part of what is found already is not followed.
_ENOUGH = 0.997
# Rows where they cost nothing.
_MANY = 1e15
# Only so many of the longest sequences are asked what they lose by being quick.
_NUM_DECISIVE = 32


@dataclass(frozen=True, slots=True)
class RowBound:
    """The least time of a step, and the rows that it would take."""

    seconds: float
    row_tokens: int
    """Their length."""
    longest_seconds: float
    """The longest of them, as the longest sequence's best number of ranks has it."""


def pipeline_bound(
    lengths: Sequence[int],
    cost_model: CostModel,
    *,
    num_ranks: int,
    tokens_per_rank: int,
    max_ranks_per_sequence: int,
    num_pipeline_stages: int,
) -> RowBound:
    """The least time of a step of `num_pipeline_stages` > 1 stages, for at least one token.

    tokens_per_rank: the most that a row may hold, with what it may offload.
    """
    step = _Step(
        np.sort(np.asarray(lengths, dtype=np.int64))[::-1],
        cost_model,
        num_ranks,
        tokens_per_rank,
        max_ranks_per_sequence,
        num_pipeline_stages,
    )
    longest = int(step.lengths[0])
    shortest_row = max(1, -(-longest // max_ranks_per_sequence))
    longest_row = max(shortest_row, min(tokens_per_rank, step.num_tokens))
    best = RowBound(math.inf, longest_row, 0.0)
    # Intervals of row lengths, the one that promises most first.
    left = [(step.least_seconds(shortest_row, longest_row), shortest_row, longest_row)]
    while left and left[0][0] < best.seconds * _ENOUGH:
        seconds, low, high = heapq.heappop(left)
        demand = _Demand(step, low, high)
        if not demand.is_met(best.seconds * _ENOUGH):
            continue
        if high > low * _NARROW and high > low + 1:
            middle = min(max(math.isqrt(low * high), low + 1), high - 1)
            for part in ((low, middle), (middle, high)):
                heapq.heappush(left, (max(seconds, step.least_seconds(*part)), *part))
        else:
            seconds, unit = demand.least_seconds(seconds)
            if seconds < best.seconds:
                best = RowBound(seconds, high, unit)
    # What was left out is above this, too.
    return replace(best, seconds=best.seconds * _ENOUGH)


class _Step:
    """The sequences of a step, and what they need with rows between two lengths."""

    def __init__(
        self,
        lengths: IntArray,
        cost_model: CostModel,
        num_ranks: int,
        tokens_per_rank: int,
        max_ranks_per_sequence: int,
        num_pipeline_stages: int,
    ) -> None:
        self.lengths = lengths
        """Longest first."""
        self.cost = cost_model
        self.num_ranks = num_ranks
        self.capacity = tokens_per_rank
        self.most = max_ranks_per_sequence
        self.bubble = num_pipeline_stages - 1
        self.num_tokens = int(lengths.sum())
        self.attention = cost_model.quadratic_seconds * float((lengths.astype(float) ** 2).sum())
        self._options: _Options | None = None
        self._exchange: dict[int, FloatArray] = {}
        groups = cost_model.communication.num_query_groups if cost_model.communication else 0
        self._by_divisor = [
            (divisor, cost_model.exposed_seconds(lengths, divisor) * divisor)
            for divisor in range(2, min(groups, max_ranks_per_sequence) + 1)
            if groups % divisor == 0
        ]

    def least_seconds(self, low: int, high: int) -> float:
        """The bound without the longest sequence's own demand; rows of low..high tokens."""
        exchange = float(self.exchange(high).sum())
        bubble, num_ranks = self.bubble, self.num_ranks
        fixed, per_row = self.row_costs(low)
        attention = (self.attention + exchange) / num_ranks
        linear = attention + self.cost.linear_seconds * self.num_tokens / num_ranks
        fewest = -(-self.num_tokens // high) / num_ranks
        # From here on the rows' length costs more than the tokens in them.
        border = max(fewest, self.num_tokens / low / num_ranks)
        best = math.inf
        for work, cost, least, most in (
            (linear, fixed, fewest, border),
            (attention, per_row, border, math.inf),
        ):
            optimum = math.sqrt(bubble * work / cost) if cost else math.inf
            num_rows = min(max(optimum, least), most)
            rows_seconds = cost * num_rows if cost else 0.0
            best = min(best, (work + rows_seconds) * (1 + bubble / num_rows))
        return best

    def options(self) -> "_Options":
        """What the longest sequences take on so many ranks."""
        if self._options is None:
            self._options = _Options.of(self)
        return self._options

    def row_costs(self, low: int) -> tuple[float, float]:
        """g, and c of the shortest row."""
        fixed = self.cost.fixed_seconds
        return fixed, fixed + self.cost.linear_seconds * low

    def exchange(self, high: int) -> FloatArray:
        """Rank-seconds of the exchange of each sequence that rows of `high` tokens must share."""
        if high not in self._exchange:
            self._exchange[high] = self._least_exchange(high)
        return self._exchange[high]

    def _least_exchange(self, high: int) -> FloatArray:
        num_shared = int(np.searchsorted(-self.lengths, -high))
        if self.cost.communication is None or not num_shared:
            return np.zeros(num_shared)
        shared = self.lengths[:num_shared]
        fewest = -(-shared // high)
        least = self.cost.exposed_seconds(shared, fewest) * fewest
        # An all-to-all suits only divisors; other exchanges cost more the more ranks there are.
        for divisor, seconds in self._by_divisor:
            best = np.minimum(least, seconds[:num_shared])
            least = np.where(fewest <= divisor, best, least)
        return least


@dataclass(frozen=True, slots=True)
class _Options:
    """The longest sequences on different numbers of ranks; [sequence, option], padded by inf."""

    num_ranks: FloatArray
    """D."""
    own: FloatArray
    """V(D): what a row lasts beyond c."""
    exchange: FloatArray
    """D times the exchange."""

    @classmethod
    def of(cls, step: _Step) -> "_Options":
        length = step.lengths[:_NUM_DECISIVE, None]
        fewest = np.maximum(1, -(-length // step.capacity))
        most = np.maximum(fewest, np.minimum(step.most, length))
        num_ranks = fewest + np.arange(int((most - fewest).max()) + 1)
        exposed = step.cost.exposed_seconds(length, num_ranks)
        own = step.cost.quadratic_seconds * length.astype(np.float64) ** 2 / num_ranks + exposed
        own = np.where(num_ranks <= most, own, np.inf)
        # More ranks than are quickest cost more of everything, but rows may be too short for fewer.
        needed = -(-length // max(1, -(-int(length.max()) // step.most))) - fewest
        width = max(int(own.argmin(axis=1).max()), int(needed.max())) + 1
        num_ranks, own, exposed = num_ranks[:, :width], own[:, :width], exposed[:, :width]
        return cls(num_ranks.astype(np.float64), own, exposed * num_ranks)


class _Demand:
    """What the longest sequences ask of a step with rows of low..high tokens."""

    def __init__(self, step: _Step, low: int, high: int) -> None:
        self.step = step
        self.fixed, self.per_row = step.row_costs(low)
        self.fewest_rows = -(-step.num_tokens // high)
        self.border = max(float(self.fewest_rows), step.num_tokens / low)
        self.unit_seconds = self.per_row
        exchange = step.exchange(high)
        options = step.options()
        num_decisive = len(options.own)
        self.rest = step.attention + float(exchange.sum())
        self.cheapest = np.zeros(num_decisive)
        known = exchange[:num_decisive]
        self.cheapest[: len(known)] = known
        fewest = -(-step.lengths[:num_decisive, None] // high)
        self.num_ranks, self.exchange = options.num_ranks, options.exchange
        self.own = np.where(options.num_ranks >= fewest, options.own, np.inf)
        linear = step.cost.linear_seconds * step.num_tokens
        self.rows_seconds = max(
            linear + self.fixed * self.fewest_rows, self.per_row * self.fewest_rows
        )

    def least_seconds(self, least: float) -> tuple[float, float]:
        """By halving: the least step, `least` or more, and its longest sequence's rows."""
        upper = least
        while not self.is_met(upper):
            least, upper = upper, 2 * upper
        while upper - least > 1e-3 * upper:
            middle = (least + upper) / 2
            if self.is_met(middle):
                upper = middle
            else:
                least = middle
        self.is_met(upper)
        return least, self.unit_seconds

    def is_met(self, seconds: float) -> bool:
        """Whether a step of so many seconds might do."""
        if math.isinf(seconds):
            return True
        step = self.step
        stages = step.bubble + 1
        within = self.own <= seconds / stages - self.per_row
        if not within.any(axis=1).all():
            return False
        exchange = np.where(within, self.exchange, np.inf)
        least = exchange.min(axis=1)
        # All of them, each on ranks that it may share with others.
        own = np.where(within, self.own, 0.0)
        left = seconds - stages * self.per_row - step.bubble * own
        heavy = self.num_ranks * own * own / np.maximum(left, 1e-300)
        credit = (exchange + step.bubble * heavy).min(axis=1) - self.cheapest
        total = step.num_ranks * (seconds - step.bubble * self.per_row)
        if self.rest + float(credit.sum()) + self.rows_seconds > total:
            return False
        # The longest in full.
        first = within[0]
        own_seconds = self.own[0][first] + self.per_row
        more = self.exchange[0][first] - self.cheapest[0]
        extra = float((least - self.cheapest)[1:].sum())
        room = self._room(seconds, self.num_ranks[0][first], own_seconds) - (
            self.rest + extra + more
        )
        best = int(room.argmax())
        self.unit_seconds = float(own_seconds[best])
        return bool(room[best] >= 0.0)

    def _room(self, seconds: float, heavy: FloatArray, own: FloatArray) -> FloatArray:
        """Rank-seconds for attention and exchange if `heavy` ranks have a row of `own` seconds."""
        step = self.step
        light = step.num_ranks - heavy
        linear = step.cost.linear_seconds * step.num_tokens
        on_heavy = heavy * (seconds - step.bubble * own)
        room = np.full(len(heavy), -np.inf)
        for cost, base, least, most in (
            (self.fixed, linear, float(self.fewest_rows), self.border),
            (self.per_row, 0.0, self.border, math.inf),
        ):
            # Where one row more for a light rank gains as much as it costs.
            mean = math.sqrt(seconds * step.bubble / cost) - step.bubble if cost else _MANY
            num_rows = np.clip(np.where(light > 0, heavy + mean * light, least), least, most)
            rows = np.maximum(num_rows - heavy, 0.0)
            on_light = light * seconds * rows / np.maximum(rows + step.bubble * light, 1e-300)
            room = np.maximum(room, on_heavy + on_light - cost * num_rows - base)
        return room
