"""What a run of `precision.py` found, its gates, and the tables it prints.

A gate compares figures of one run on one GPU:

    correctness             every kernel's bits or sums are the reference's
    product Triton, CUDA    speed >= 0.80, 0.92 of the fastest product by another library
    wgrad of experts        >= 800 TFLOP/s
    FP8 cast 1 x 128        >= 0.95 of the bytes a second that a copy moves
    Hadamard and FP4        >= 0.70 of them, the row copy and the transposed one
    linear layer            forward and backward in fp8_blockwise faster than in bf16

What was not measured passes no gate.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Status = Literal["passed", "failed", "measured", "skipped", "error"]
GateStatus = Literal["pass", "fail", "not measured"]

PEER, COPY, BF16 = "peer", "copy", "bf16"
OWN = ("triton", "cuda", "cpu")
PRODUCT_SHARES = {"triton": 0.80, "cuda": 0.92}
WGRAD_TERAFLOPS = 800.0
CAST_SHARE, HADAMARD_SHARE = 0.95, 0.70


@dataclass(frozen=True, slots=True)
class Record:
    """One check or timing.

    Attributes:
        part: of the run; records of one part were made by one process.
        backend: who computed; `peer`, `copy` and `bf16` are what others are compared with.
        value: in `unit`, of what was measured; seconds: median of a call.
    """

    part: str
    kernel: str
    backend: str
    case: str
    status: Status
    detail: str = ""
    value: float | None = None
    unit: str = ""
    seconds: float | None = None
    peak_memory_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Gate:
    """figure: what was found, None where nothing was; limit: the least that passes."""

    name: str
    status: GateStatus
    figure: float | None
    limit: float
    unit: str
    detail: str


def gates_of(records: Sequence[Record], product_cases: Sequence[str]) -> list[Gate]:
    """All gates, also those that nothing was measured for.

    Args:
        product_cases: shapes of the FP8 product.
    """
    gates = [_correctness(records)]
    for case in product_cases:
        for backend, share in PRODUCT_SHARES.items():
            gates.append(_product(records, backend, case, share))
    wgrad = _best(_measured(records, "experts wgrad", OWN))
    gates.append(_at_least("wgrad of experts", wgrad, WGRAD_TERAFLOPS, "TFLOP/s"))
    for kernel, share in (
        ("cast 1x128", CAST_SHARE),
        ("hadamard fp4 row", HADAMARD_SHARE),
        ("hadamard fp4 transposed", HADAMARD_SHARE),
    ):
        gates.append(_share_of_copy(records, kernel, share))
    gates.append(_layer(records))
    return gates


def exit_code(gates: Sequence[Gate], records: Sequence[Record], *, is_gpu: bool) -> int:
    """0: all gates pass (without a GPU, where none applies: nothing failed); else 1."""
    if is_gpu:
        return int(any(gate.status != "pass" for gate in gates))
    return int(any(record.status in ("failed", "error") for record in records))


def record_lines(records: Sequence[Record]) -> Iterator[str]:
    """A table of what was measured, failed or could not be done; passed checks are counted."""
    for record in records:
        if record.status == "measured":
            value = "-" if record.value is None else f"{record.value:.4g} {record.unit}"
            time = "-" if record.seconds is None else f"{1e3 * record.seconds:.3f} ms"
            memory = record.peak_memory_bytes
            held = "" if memory is None else f"{memory / 2**30:.2f} GiB"
            yield (
                f"{record.kernel:<24} {record.backend:<7} {record.case:<34} {value:>16} "
                f"{time:>12} {held:>10}  {record.detail}"
            )
    for record in records:
        if record.status in ("failed", "error"):
            yield f"{record.status.upper()} {_name(record)}: {record.detail}"
    skipped: dict[tuple[str, str], list[str]] = {}
    for record in records:
        if record.status == "skipped":
            skipped.setdefault((record.backend, record.detail), []).append(record.kernel)
    for (backend, reason), kernels in skipped.items():
        names = ", ".join(sorted(set(kernels)))
        yield f"skipped {backend} ({len(kernels)}: {names}): {reason}"
    for backend in sorted({record.backend for record in records}):
        count = sum(each.status == "passed" for each in records if each.backend == backend)
        if count:
            yield f"passed {backend}: {count} checks"


def gate_lines(gates: Sequence[Gate]) -> Iterator[str]:
    for gate in gates:
        figure = "-" if gate.figure is None else f"{gate.figure:.4g}"
        limit = f"{gate.limit:.4g} {gate.unit}".strip()
        yield f"{gate.status.upper():<13} {gate.name:<38} {figure:>8} of {limit:<16} {gate.detail}"


def as_lines(records: Sequence[Record]) -> str:
    """JSON, a record a line; `from_lines` reads it, also what a killed process left of it."""
    fields = Record.__dataclass_fields__
    return "".join(
        json.dumps({name: getattr(record, name) for name in fields}) + "\n" for record in records
    )


def from_lines(text: str) -> list[Record]:
    records = []
    for line in text.splitlines():
        try:
            values: dict[str, Any] = json.loads(line)
        except json.JSONDecodeError:
            continue
        records.append(Record(**values))
    return records


def _correctness(records: Sequence[Record]) -> Gate:
    """Share of own kernels' checks that pass; what a backend says it cannot do is no check."""
    checks = [each for each in records if each.backend in OWN and each.status != "skipped"]
    # What fails while it is timed has gates of its own.
    checks = [each for each in checks if not each.part.startswith("time ")]
    checks = [each for each in checks if each.status != "measured"]
    wrong = [each for each in checks if each.status != "passed"]
    if not any(each.status == "passed" for each in checks) and not wrong:
        return Gate("kernels against the reference", "not measured", None, 1.0, "", "no check ran")
    share = 1 - len(wrong) / len(checks)
    detail = f"{len(checks) - len(wrong)} of {len(checks)} pass"
    if wrong:
        detail += f"; first: {_name(wrong[0])}: {wrong[0].detail}"
    status: GateStatus = "fail" if wrong else "pass"
    return Gate("kernels against the reference", status, share, 1.0, "", detail)


def _product(records: Sequence[Record], backend: str, case: str, share: float) -> Gate:
    name = f"product {case} {backend}"
    own = _best(_measured(records, "product", (backend,), case))
    # Clocks change while a run goes on: the peer is that of the same process.
    peers = [
        each
        for each in _measured(records, "product", (PEER,), case)
        if own is not None and each.part == own.part
    ]
    peer = _best(peers)
    if own is None or peer is None:
        return _not_measured(name, share, "x the best peer", records, "product", (backend, PEER))
    blockwise = _best([each for each in peers if "1x128" in each.detail])
    detail = f"{own.value:.0f} TFLOP/s; {peer.detail}: {peer.value:.0f}"
    if blockwise is not None and blockwise is not peer:
        ratio = _ratio(own, blockwise)
        detail += f"; {ratio:.2f} x of {blockwise.detail}: {blockwise.value:.0f}"
    return _at_least(name, own, share, "x the best peer", _ratio(own, peer), detail)


def _share_of_copy(records: Sequence[Record], kernel: str, share: float) -> Gate:
    shares = []
    for own in _measured(records, kernel, OWN):
        copies = [each for each in _measured(records, "copy", (COPY,)) if each.part == own.part]
        if copies:
            shares.append((_ratio(own, copies[0]), own, copies[0]))
    if not shares:
        return _not_measured(kernel, share, "x the copy", records, kernel, OWN)
    ratio, own, copy = max(shares, key=lambda each: each[0])
    detail = f"{own.backend}: {own.value:.0f} GB/s; a copy {copy.value:.0f}"
    return _at_least(kernel, own, share, "x the copy", ratio, detail)


def _layer(records: Sequence[Record]) -> Gate:
    """Slowest shape of the quickest backend."""
    name, unit = "linear layer fp8_blockwise", "x as fast as bf16"
    kernel = "linear forward+backward"
    ratios: dict[str, list[float]] = {}
    for own in _measured(records, kernel, OWN):
        for plain in _measured(records, kernel, (BF16,), own.case):
            if plain.part == own.part:
                ratios.setdefault(own.backend, []).append(_ratio(own, plain))
    if not ratios:
        return _not_measured(name, 1.0, unit, records, kernel, OWN)
    backend = max(ratios, key=lambda each: min(ratios[each]))
    found = ratios[backend]
    detail = f"{backend}: " + ", ".join(f"{ratio:.2f}" for ratio in found)
    status: GateStatus = "pass" if min(found) > 1.0 else "fail"
    return Gate(name, status, min(found), 1.0, unit, detail)


def _at_least(
    name: str,
    own: Record | None,
    limit: float,
    unit: str,
    figure: float | None = None,
    detail: str = "",
) -> Gate:
    if own is None or own.value is None:
        return Gate(name, "not measured", None, limit, unit, detail or "no figure")
    figure = own.value if figure is None else figure
    status: GateStatus = "pass" if figure >= limit else "fail"
    return Gate(name, status, figure, limit, unit, detail or f"{own.backend}, {own.case}")


def _not_measured(
    name: str,
    limit: float,
    unit: str,
    records: Sequence[Record],
    kernel: str,
    backends: Sequence[str],
) -> Gate:
    """With the first reason that was given."""
    reasons = [
        f"{each.backend}: {each.detail}"
        for each in records
        if each.kernel == kernel and each.backend in backends and each.value is None
    ]
    return Gate(name, "not measured", None, limit, unit, reasons[0] if reasons else "no figure")


def _measured(
    records: Sequence[Record], kernel: str, backends: Sequence[str], case: str | None = None
) -> list[Record]:
    return [
        each
        for each in records
        if each.kernel == kernel
        and each.backend in backends
        and each.value is not None
        and case in (None, each.case)
    ]


def _best(records: Sequence[Record]) -> Record | None:
    return max(records, key=lambda each: each.value or 0.0, default=None)


def _ratio(own: Record, other: Record) -> float:
    assert own.value is not None
    assert other.value is not None
    return own.value / other.value


def _name(record: Record) -> str:
    return f"{record.kernel} {record.backend} {record.case}".strip()
