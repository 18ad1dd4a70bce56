"""The time of a chunked layer in closed form: the four cases of FSMoE (2501.10714, section 4).

Per chunk: t_a2a between nodes (out and as much back), t_ag and t_rs inside a node before and after
the experts, t_exp; and t_gar, a gradient all-reduce that goes out between the two directions. With
r chunks, the busiest stream decides:

    1  between nodes, gap filled by t_gar   2 r t_a2a + t_gar
    2  experts                              2 t_a2a + t_ag + t_rs + r t_exp
    3  between nodes, the gap stays         2 r t_a2a + t_ag + t_rs
    4  inside the nodes                     2 t_a2a + r (t_ag + t_rs)

The gap of case 3 is that of the paper's order, in which the last chunk goes out before the first
comes back. `moe.schedule.simulate` gives the same numbers for that order when t_ag = t_rs (as in
the paper), and is what we choose by: it knows other orders too.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe.schedule.simulate import Stage


@dataclass(frozen=True, slots=True)
class ChunkTimes:
    """Seconds of the parts of one chunk, in the letters of the paper."""

    a2a: float
    ag: float
    rs: float
    exp: float
    gar: float = 0.0
    """Of the layer, not of a chunk; 0 in the forward pass."""

    def stages(self) -> list[Stage]:
        """The same for the simulator."""
        return [
            Stage("inter", self.a2a),
            Stage("intra", self.ag),
            Stage("compute", self.exp),
            Stage("intra", self.rs),
            Stage("inter", self.a2a),
        ]


def paper_case(times: ChunkTimes, num_chunks: int) -> int:
    """Which of the cases holds, 1 to 4: the paper's predicates Q1 to Q7."""
    r, t = num_chunks, times
    q1 = t.a2a > t.ag
    q2 = r * t.exp > 2 * (r - 1) * t.a2a
    q3 = r * t.exp > (r - 1) * (t.ag + t.rs)
    q4 = t.gar > t.ag + t.rs
    q5 = t.gar > r * t.exp - 2 * (r - 1) * t.a2a + t.ag + t.rs
    q6 = t.gar > r * t.ag + r * t.rs - 2 * (r - 1) * t.a2a
    q7 = t.gar > t.ag + t.rs + r * t.exp - 2 * (r - 1) * t.a2a
    if q1:
        if q2:
            return 1 if q5 else 2
        return 1 if q4 else 3
    if q3:
        return 1 if q7 else 2
    return 1 if q6 else 4


def paper_seconds(times: ChunkTimes, num_chunks: int) -> float:
    """The layer's time by the case that holds."""
    r, t = num_chunks, times
    by_case = {
        1: 2 * r * t.a2a + t.gar,
        2: 2 * t.a2a + t.ag + t.rs + r * t.exp,
        3: 2 * r * t.a2a + t.ag + t.rs,
        4: 2 * t.a2a + r * (t.ag + t.rs),
    }
    return by_case[paper_case(t, r)]


def gradient_room_seconds(times: ChunkTimes, num_chunks: int) -> float:
    """How long an all-reduce between nodes may take here for nothing (section 5, step 1)."""
    r, t = num_chunks, times
    room = {
        1: t.gar,
        2: r * t.exp + t.ag + t.rs - 2 * (r - 1) * t.a2a,
        3: t.ag + t.rs,
        4: r * t.ag + r * t.rs - 2 * (r - 1) * t.a2a,
    }
    return max(0.0, room[paper_case(t, r)])
