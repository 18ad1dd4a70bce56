"""One name for one start, agreed by ranks that meet at a store which outlives them.

When torchrun restarts its workers it keeps the store, with every address the dead ranks wrote. New
ranks that read those connect to no one (pytorch #135712, #167288). So each start works under a
prefix of its own. Restart counters cannot name it, each machine's agent keeps its own. Instead rank
0 makes a name up and hands it to each living rank: a rank says hello with a word that no earlier
process knew, and only an answer to that very word counts.
"""

import secrets
import time
from datetime import timedelta

from torch.distributed import Store

from megatron_ext.errors import UserError

_POLL_SECONDS = 0.01


def agree_on_attempt(store: Store, *, rank: int, world_size: int, timeout_seconds: float) -> str:
    """The name of this start, the same on all ranks and never used before in `store`.

    Raises UserError naming the ranks that were not heard from within `timeout_seconds`.
    """
    own_word = secrets.token_hex(8)
    if rank == 0:
        _answer_everyone(
            store, own_word, range(1, world_size), deadline=time.monotonic() + timeout_seconds
        )
        return own_word
    store.set(f"hello/{rank}", own_word)
    answer = f"answer/{own_word}"
    try:
        store.wait([answer], timedelta(seconds=timeout_seconds))
    except RuntimeError as error:
        raise UserError(
            f"rank {rank}: rank 0 did not answer within {timeout_seconds:.0f} s; look at rank 0's "
            "output for why it did not start"
        ) from error
    attempt: str = store.get(answer).decode()
    store.set(f"thanks/{attempt}/{rank}", "1")
    return attempt


def _answer_everyone(store: Store, attempt: str, ranks: range, *, deadline: float) -> None:
    answered: dict[int, bytes] = {}
    unheard = set(ranks)
    while unheard:
        for rank in sorted(unheard):
            if store.check([f"thanks/{attempt}/{rank}"]):
                unheard.remove(rank)
            elif store.check([f"hello/{rank}"]):
                # It may be a dead rank's hello; the living one writes over it, so look again.
                word = store.get(f"hello/{rank}")
                if answered.get(rank) != word:
                    store.set(f"answer/{word.decode()}", attempt)
                    answered[rank] = word
        if unheard and time.monotonic() > deadline:
            named = ", ".join(str(rank) for rank in sorted(unheard)[:8])
            raise UserError(
                f"rank 0: {len(unheard)} of {len(ranks)} other ranks did not start in time "
                f"(rank {named}{', ...' if len(unheard) > 8 else ''}); look at their output"
            )
        time.sleep(_POLL_SECONDS)
