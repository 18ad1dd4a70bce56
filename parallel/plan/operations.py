"""What each stage of each pipeline runs, in which order: megatron-core's schedules as lists.

A pipeline of P stages holds P V blocks of layers, block v = chunk * P + stage; V = 1 unless stages
are interleaved. A micro-batch runs forward through blocks 0, 1, ..., P V - 1 and backward through
them in reverse; each step from a block to the next is a `Transfer`. A stage runs `Compute`s and,
between them, `Exchange`s: transfers to and from its neighbours that are posted at once and all
waited for, as megatron-core 0.16.1 does (`pipeline_parallel/schedules.py`) without
overlap_p2p_comm. Sends are taken to block like receives, the worst that a backend may do.

The order never depends on how many micro-batches a rank has: at each stage every rank runs a
subsequence of one list without end, sorted by `canonical_time`. Why that excludes deadlock:
docs/hdp-ordering.md.
"""

from dataclasses import dataclass

from parallel.errors import PlanError


@dataclass(frozen=True, slots=True)
class Compute:
    """Forward or backward of one micro-batch through one block."""

    is_forward: bool
    index: int
    """Of the micro-batch in its rank's list."""
    chunk: int = 0
    """Which of the stage's blocks."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """A micro-batch's activations (forward) or their gradient, from a block to the next."""

    is_forward: bool
    index: int
    block: int
    """That sends: forward to block + 1, backward to block - 1."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """Posted at once; over when all partners have posted theirs and the data has arrived."""

    sends: tuple[Transfer, ...] = ()
    receives: tuple[Transfer, ...] = ()


Operation = Compute | Exchange


def stage_operations(
    num_micro_batches: int, *, stage: int, num_pipeline_stages: int, num_model_chunks: int = 1
) -> tuple[Operation, ...]:
    """What one stage of a rank with this many micro-batches runs in a step, in order.

    Raises:
        PlanError: interleaved stages (num_model_chunks > 1) need a pipeline of two stages or more
            and a positive multiple of num_pipeline_stages; megatron refuses other numbers.
    """
    assert 0 <= stage < num_pipeline_stages
    if num_model_chunks > 1:
        check_interleaved_count(num_micro_batches, num_pipeline_stages=num_pipeline_stages)
        operations = _interleaved(num_micro_batches, stage, num_pipeline_stages, num_model_chunks)
    else:
        operations = _one_forward_one_backward(num_micro_batches, stage, num_pipeline_stages)
    return tuple(operation for operation in operations if operation != Exchange())


def check_interleaved_count(num_micro_batches: int, *, num_pipeline_stages: int) -> None:
    """Raise PlanError unless megatron's interleaved schedule takes this many micro-batches."""
    if num_pipeline_stages < 2:
        raise PlanError("interleaved stages need a pipeline of two stages or more, not of one")
    if num_micro_batches < 1 or num_micro_batches % num_pipeline_stages:
        raise PlanError(
            f"interleaved pipelining over {num_pipeline_stages} stages runs a positive multiple of "
            f"{num_pipeline_stages} micro-batches, not {num_micro_batches}; fill up with empty ones"
        )


def canonical_time(
    operation: Compute | Transfer,
    *,
    stage: int,
    num_pipeline_stages: int,
    num_model_chunks: int = 1,
) -> int:
    """When an operation has its turn, if all took equally long: increases along every list.

    A transfer has the same time at both its ends; `stage` is the one that computes or sends. With
    P stages, stage k and micro-batch i, 1F1B has

        forward 2 (k + 2 i)        backward 2 (2 P - 1 - k + 2 i)        transfers 1 later.

    With V > 1 chunks, f numbers a stage's forwards and b its backwards in the order of the
    schedule, and w = 2 (P - k - 1) + (V - 1) P forwards precede the first backward:

        forward 3 (k + f) - 2      backward 3 (k + w + b) - 1            transfers 2 and 1 later.
    """
    k, size = stage, num_pipeline_stages
    is_transfer = isinstance(operation, Transfer)
    if num_model_chunks == 1:
        first = k if operation.is_forward else 2 * size - 1 - k
        return 2 * (first + 2 * operation.index) + is_transfer
    chunk = operation.block // size if isinstance(operation, Transfer) else operation.chunk
    if operation.is_forward:
        number = _interleaved_number(operation.index, chunk, size, num_model_chunks)
        return 3 * (k + number) - (0 if is_transfer else 2)
    mirrored = num_model_chunks - 1 - chunk
    number = _interleaved_number(operation.index, mirrored, size, num_model_chunks)
    number += _interleaved_warm_up(k, size, num_model_chunks)
    return 3 * (k + number) - (0 if is_transfer else 1)


@dataclass(frozen=True, slots=True)
class _Ends:
    """What arrives at a block and what leaves it; nothing at the ends of the model."""

    last_block: int

    def input(self, index: int, block: int) -> tuple[Transfer, ...]:
        return (Transfer(True, index, block - 1),) if block > 0 else ()

    def output(self, index: int, block: int) -> tuple[Transfer, ...]:
        return (Transfer(True, index, block),) if block < self.last_block else ()

    def output_gradient(self, index: int, block: int) -> tuple[Transfer, ...]:
        return (Transfer(False, index, block + 1),) if block < self.last_block else ()

    def input_gradient(self, index: int, block: int) -> tuple[Transfer, ...]:
        return (Transfer(False, index, block),) if block > 0 else ()


def _one_forward_one_backward(num: int, stage: int, num_stages: int) -> list[Operation]:
    """Stages of one block each, also a single one.

    P - stage - 1 forwards to warm up, then forward and backward in turn, then the other backwards.
    """
    ends = _Ends(last_block=num_stages - 1)
    warm_up = min(num_stages - stage - 1, num)
    operations: list[Operation] = []
    for index in range(warm_up):
        operations += [
            Exchange(receives=ends.input(index, stage)),
            Compute(True, index),
            Exchange(sends=ends.output(index, stage)),
        ]
    if warm_up < num:
        operations.append(Exchange(receives=ends.input(warm_up, stage)))
    for backward, forward in enumerate(range(warm_up, num)):
        is_last = forward == num - 1
        operations += [
            Compute(True, forward),
            Exchange(ends.output(forward, stage), ends.output_gradient(backward, stage)),
            Compute(False, backward),
            Exchange(
                ends.input_gradient(backward, stage),
                () if is_last else ends.input(forward + 1, stage),
            ),
        ]
    for backward in range(num - warm_up, num):
        operations += [
            Exchange(receives=ends.output_gradient(backward, stage)),
            Compute(False, backward),
            Exchange(sends=ends.input_gradient(backward, stage)),
        ]
    return operations


def _interleaved(num: int, stage: int, num_stages: int, num_chunks: int) -> list[Operation]:
    """Stages of several blocks: P micro-batches go through all chunks before the next P begin.

    What arrives is always the input of the stage's next forward or backward, whoever sends it.
    """
    ends = _Ends(last_block=num_stages * num_chunks - 1)
    forwards = [
        Compute(True, index, chunk)
        for first in range(0, num, num_stages)
        for chunk in range(num_chunks)
        for index in range(first, first + num_stages)
    ]
    backwards = [Compute(False, step.index, num_chunks - 1 - step.chunk) for step in forwards]
    # (micro-batch, block); the last of what arrives has no successor.
    on = [(step.index, step.chunk * num_stages + stage) for step in forwards]
    back = [(step.index, step.chunk * num_stages + stage) for step in backwards]
    inputs = [*(ends.input(*place) for place in on), ()]
    outputs = [ends.output(*place) for place in on]
    output_gradients = [*(ends.output_gradient(*place) for place in back), ()]
    input_gradients = [ends.input_gradient(*place) for place in back]

    total = len(forwards)
    warm_up = min(_interleaved_warm_up(stage, num_stages, num_chunks), total)
    operations: list[Operation] = [Exchange(receives=inputs[0])]
    for forward in range(warm_up):
        gradient = output_gradients[0] if forward + 1 == warm_up < total else ()
        operations += [
            forwards[forward],
            Exchange(outputs[forward], (*inputs[forward + 1], *gradient)),
        ]
    for backward, forward in enumerate(range(warm_up, total)):
        operations += [
            forwards[forward],
            backwards[backward],
            Exchange(
                (*outputs[forward], *input_gradients[backward]),
                (*inputs[forward + 1], *output_gradients[backward + 1]),
            ),
        ]
    if warm_up == total:
        operations.append(Exchange(receives=output_gradients[0]))
    for backward in range(total - warm_up, total):
        operations += [
            backwards[backward],
            Exchange(input_gradients[backward], output_gradients[backward + 1]),
        ]
    return operations


def _interleaved_warm_up(stage: int, num_stages: int, num_chunks: int) -> int:
    """Forwards before the first backward, of a rank with enough of them."""
    return 2 * (num_stages - stage - 1) + (num_chunks - 1) * num_stages


def _interleaved_number(index: int, chunk: int, num_stages: int, num_chunks: int) -> int:
    """The place of a micro-batch and chunk in a stage's order of forwards."""
    group, place = divmod(index, num_stages)
    return (group * num_chunks + chunk) * num_stages + place
