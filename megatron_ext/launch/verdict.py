"""From how each rank ended to what the user is told: who failed first, and one exit code."""

import re
import signal
from collections.abc import Sequence

from megatron_ext import exit_codes
from megatron_ext.launch.child import Child

# What gloo, NCCL and the stores say when a peer is gone: an effect, not a cause.
_LOST_PEER = re.compile(
    r"closed by peer|reset by peer|Broken pipe|Connection refused|remote process exited|"
    r"failed to recv|Timed out waiting",
    re.IGNORECASE,
)


def first_cause(children: Sequence[Child]) -> Child | None:
    """The rank that began it, or None if none failed by its own fault.

    A rank that was killed comes before one that left by itself, one that only tells of a lost peer
    comes last; else the first to end. Rank 0's words went to the terminal and are not known here.
    """
    failed = [child for child in children if child.has_failed]
    return min(failed, key=_suspicion, default=None)


def exit_code(children: Sequence[Child], cause: Child | None) -> int:
    """One code for all: the cause's, or the one they share."""
    if cause is not None:
        assert cause.returncode is not None
        return cause.returncode if cause.returncode > 0 else 128 - cause.returncode
    codes = {child.returncode for child in children}
    if codes == {exit_codes.DONE}:
        return exit_codes.DONE
    if codes == {exit_codes.SAVED_AND_STOPPED}:
        return exit_codes.SAVED_AND_STOPPED
    # Killed on request, or some saved while others finished: there is no run to continue from.
    killed = [child.returncode for child in children if (child.returncode or 0) < 0]
    return 128 - killed[0] if killed and killed[0] is not None else exit_codes.FAILED


def describe_end(children: Sequence[Child], cause: Child | None) -> str:
    """What the terminal shows; nothing where all ranks ended alike and none by its own fault."""
    if cause is not None:
        return _describe_failure(children, cause)
    if len({child.returncode for child in children}) == 1:
        return ""
    ends = ", ".join(f"rank {child.rank} {_how_it_ended(child)}" for child in children)
    return f"the ranks did not end alike: {ends}"


def _describe_failure(children: Sequence[Child], cause: Child) -> str:
    """The rank, how it ended, its last lines, where the rest stands."""
    lines = [f"rank {cause.rank} of {len(children)} {_how_it_ended(cause)}"]
    printed = cause.last_lines()
    if cause.log is None:
        lines[0] += "; what it printed is above"
    elif printed:
        lines[0] += "; the last lines it printed:"
        lines += [f"  | {line}" for line in printed]
    else:
        lines[0] += " and printed nothing"
    others = [child for child in children if child is not cause]
    if any(child.was_ended for child in others):
        lines.append("The other ranks were stopped: they cannot go on without it.")
    if others:
        folder = next(child.log.parent for child in children if child.log is not None)
        lines.append(f"All that the ranks after rank 0 printed is in {folder}")
    return "\n".join(lines)


def _suspicion(child: Child) -> tuple[bool, int, int]:
    assert child.returncode is not None
    was_killed = child.returncode < 0 and child.returncode != -signal.SIGABRT
    if child.log is None:
        hearsay = 1
    else:
        hearsay = 2 if _LOST_PEER.search("\n".join(child.last_lines())) else 0
    return not was_killed, hearsay, child.order


def _how_it_ended(child: Child) -> str:
    assert child.returncode is not None
    if child.returncode >= 0:
        return f"left with exit code {child.returncode}"
    number = -child.returncode
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = "an unknown signal"
    hint = " (often: this machine ran out of memory)" if number == signal.SIGKILL else ""
    return f"was killed by {name}, signal {number}{hint}"
