"""The one command for kernels of few bits: it runs, finds what is wrong, and outlives it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.precision.backend import implementation
from scripts.bench import precision, precision_checks
from scripts.bench.precision_bench import Bench, Settings, Side
from scripts.bench.precision_report import (
    Gate,
    Record,
    as_lines,
    exit_code,
    from_lines,
    gates_of,
    record_lines,
)

QUICK = Settings("cpu", is_quick=True)
CASE = "8x8x8"


def test_the_command_runs_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "precision.json"
    arguments = ["--device", "cpu", "--quick", "--in-one-process", "--json", str(out)]
    assert precision.main(arguments) == 0
    report = json.loads(out.read_text())
    records = [Record(**record) for record in report["records"]]
    assert not [each for each in records if each.status in ("failed", "error")]
    passed = {(each.kernel, each.backend) for each in records if each.status == "passed"}
    assert {("quantize", "cpu"), ("multiply", "cpu"), ("multiply experts", "cpu")} <= passed
    assert ("multiply", "scaled_mm") in passed
    measured = {
        (each.kernel, each.backend)
        for each in records
        if each.value is not None and each.value > 0 and each.seconds != 0
    }
    assert {("product", "cpu"), ("product", "peer"), ("copy", "copy"), ("cast 1x128", "cpu")} <= (
        measured
    )
    for kernel in ("experts forward", "experts dgrad", "experts wgrad", "experts wgrad added"):
        assert (kernel, "cpu") in measured
    layer = "linear forward+backward"
    assert {(layer, "cpu"), (layer, "bf16"), ("hadamard fp4 row", "cpu")} <= measured
    assert not report["gates_apply"]
    assert {"date", "device", "torch", "triton", "clocks", "gates"} <= report.keys()
    printed = capsys.readouterr().out
    assert "not measured on a GPU" in printed
    assert "skipped triton" in printed


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert precision.main([]) == 2
    assert "there is no GPU" in capsys.readouterr().err


def test_a_part_in_a_process_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cpu", "--quick", "--parts", "check experts cpu"]
    assert precision.main(arguments) == 0
    num_checks = sum(1 for _ in precision_checks.product_formats(of_wgrad=True)) + sum(
        left.block_rows in (None, 1) for left, _ in precision_checks.product_formats(of_wgrad=False)
    )
    assert f"passed cpu: {num_checks} checks" in capsys.readouterr().out


def test_a_process_that_dies_leaves_its_records() -> None:
    kept = as_lines([_record("quantize", "cuda", status="passed")])
    dies = f"import os, sys; open(sys.argv[1], 'a').write({kept!r}); os.abort()"
    first, second = precision.run_apart("check stores cuda", [sys.executable, "-c", dies], 60)
    assert first.status == "passed"
    assert second.status == "error"
    assert "ended with -6" in second.detail
    assert second.backend == "cuda"
    sleeps = [sys.executable, "-c", "import time; time.sleep(60)"]
    (late,) = precision.run_apart("check stores cuda", sleeps, 0.3)
    assert "not done after" in late.detail
    (too_late,) = precision.run_apart("check stores cuda", sleeps, 0)
    assert "time was over" in too_late.detail


def test_wrong_and_failing_kernels_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_bit_off(name: Any, operation: Any) -> Callable[..., Any]:
        right = implementation(name, operation)
        if operation == "quantize":

            def quantize(matrix: Any, quantizer: Any, **options: Any) -> Any:
                if quantizer.block_format.name == "mxfp4":
                    raise RuntimeError("an illegal memory access was encountered")
                stored = right(matrix, quantizer, **options)
                codes = stored.codes.clone()
                codes[-1, -1] ^= 1
                return replace(stored, codes=codes)

            return quantize

        def multiply(*operands: Any, **options: Any) -> Any:
            product = right(*operands, **options)
            product.view(-1)[0] += 0.25
            return product

        return multiply

    monkeypatch.setattr(precision_checks, "implementation", one_bit_off)
    bench = Bench(QUICK, "checks")
    precision_checks.check_stores(bench, "cpu")
    precision_checks.check_products(bench, "cpu")
    precision_checks.check_experts(bench, "cpu")
    assert not [record for record in bench.records if record.status == "passed"]
    found = {(record.kernel, record.status) for record in bench.records}
    assert {
        ("quantize", "failed"),
        ("quantize", "error"),
        ("multiply", "failed"),
        ("multiply experts", "failed"),
    } <= found
    gate = gates_of(bench.records, [CASE])[0]
    assert (gate.status, gate.figure) == ("fail", 0.0)
    assert exit_code([gate], bench.records, is_gpu=False) == 1
    assert any("1 of" in line and "codes differ" in line for line in record_lines(bench.records))


def test_a_call_that_fails_is_not_timed_and_the_others_are() -> None:
    def fails() -> None:
        raise ValueError("no such tile\nand more")

    bench = Bench(QUICK, "time products cpu")
    calls = [Side("product", "cpu", fails, 1.0, "TFLOP/s"), Side("product", "peer", int, 1.0, "x")]
    bench.time(CASE, calls)
    assert [record.status for record in bench.records] == ["error", "measured"]
    assert bench.records[0].detail == "ValueError: no such tile"
    assert bench.prepare("product", "cpu", CASE, fails) is None


def test_records_survive_a_line_cut_short() -> None:
    records = [_record("copy", "copy", 3.0), _record("quantize", "cuda", status="passed")]
    assert from_lines(as_lines(records) + '{"part": "x", "ker') == records


def _record(kernel: str, backend: str, value: float | None = None, **fields: Any) -> Record:
    return Record(
        **{
            "part": "p",
            "kernel": kernel,
            "backend": backend,
            "case": CASE,
            "status": "passed" if value is None else "measured",
            "value": value,
        }
        | fields
    )


def _gate(name: str, *records: Record) -> Gate:
    (gate,) = [each for each in gates_of(records, [CASE]) if each.name == name]
    return gate


def test_products_are_compared_with_the_best_peer_of_their_process() -> None:
    peers = [
        _record("product", "peer", 1000.0, detail="tensor by tensor"),
        _record("product", "peer", 800.0, detail="1x128 by 128x128"),
        _record("product", "peer", 4000.0, detail="elsewhere", part="q"),
    ]
    gate = _gate(f"product {CASE} triton", *peers, _record("product", "triton", 800.0))
    assert (gate.status, gate.figure) == ("pass", 0.8)
    assert "1.00 x of 1x128 by 128x128" in gate.detail
    own = _record("product", "cuda", 919.0)
    assert _gate(f"product {CASE} cuda", *peers, own).status == "fail"
    assert _gate(f"product {CASE} cuda", *peers, replace(own, value=920.0)).status == "pass"
    gate = _gate(f"product {CASE} cuda", _record("product", "cuda", detail="not built"), *peers)
    assert (gate.status, gate.detail) == ("not measured", "cuda: not built")


def test_bandwidth_is_that_of_the_copy() -> None:
    copy = _record("copy", "copy", 3000.0)
    for kernel, enough in (("cast 1x128", 2850.0), ("hadamard fp4 transposed", 2100.0)):
        assert _gate(kernel, copy, _record(kernel, "cuda", enough)).status == "pass"
        assert _gate(kernel, copy, _record(kernel, "cuda", 0.99 * enough)).status == "fail"
        # The better of two backends counts.
        both = [_record(kernel, "cuda", 1.0), _record(kernel, "triton", enough)]
        assert _gate(kernel, copy, *both).status == "pass"
        assert _gate(kernel, _record(kernel, "cuda", enough)).status == "not measured"


def test_wgrad_layer_and_correctness() -> None:
    assert _gate("wgrad of experts", _record("experts wgrad", "cuda", 800.0)).status == "pass"
    assert _gate("wgrad of experts", _record("experts wgrad", "peer", 900.0)).figure is None
    kernel, name = "linear forward+backward", "linear layer fp8_blockwise"
    plain, own = _record(kernel, "bf16", 500.0), _record(kernel, "cuda", 600.0)
    gate = _gate(name, plain, own)
    assert (gate.status, gate.figure) == ("pass", 1.2)
    # Of several shapes the slowest counts.
    other = [replace(plain, case="b"), replace(own, case="b", value=500.0)]
    assert _gate(name, plain, own, *other).status == "fail"
    right = _record("quantize", "cuda")
    assert _gate("kernels against the reference", right).status == "pass"
    of_others = _record("multiply", "scaled_mm", status="failed")
    assert _gate("kernels against the reference", right, of_others).status == "pass"
    crashed = _record("check stores cuda", "cuda", status="error")
    assert _gate("kernels against the reference", right, crashed).status == "fail"
    in_time = replace(crashed, part="time stores cuda")
    assert _gate("kernels against the reference", right, in_time).status == "pass"
    assert _gate("kernels against the reference").status == "not measured"
    assert exit_code(gates_of([right], [CASE]), [right], is_gpu=True) == 1
    assert exit_code([gate], [], is_gpu=True) == 0
