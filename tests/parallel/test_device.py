"""What the machine says of itself, and the table of those that are not here."""

import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from parallel.device import DeviceInfo, default_dtype, device_info, measure_peak_flops
from parallel.device_peaks import data_sheet
from parallel.host_cpu import cpu_has_bf16_hardware

ROOT = Path(__file__).parents[2]


def test_cpu_describes_itself() -> None:
    info = device_info("cpu")
    assert info.kind == "cpu"
    assert info.architecture == platform.machine()
    assert info.name
    assert 2**28 < info.memory_bytes < 2**48
    assert info.peak(torch.bfloat16) is None


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="no /proc/cpuinfo")
def test_bf16_hardware_is_what_the_kernel_reports() -> None:
    words = Path("/proc/cpuinfo").read_text().split()
    expected = "avx512_bf16" in words or "amx_bf16" in words or "bf16" in words
    assert device_info("cpu").has_bf16_hardware == expected
    assert default_dtype("cpu") == (torch.bfloat16 if expected else torch.float32)


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("processor : 0\nflags\t\t: fpu avx512f avx512_bf16 sse\n", True),
        ("flags\t\t: fpu amx_bf16 amx_tile\n", True),
        ("flags\t\t: fpu avx2 avx512f\n", False),
        ("Features\t: fp asimd bf16 i8mm\n", True),
        ("Features\t: fp asimd\n", False),
        ("", False),
    ],
)
def test_bf16_hardware_of_other_cpus(
    cpuinfo: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "exists", lambda _: True)
    monkeypatch.setattr(Path, "read_text", lambda _: cpuinfo)
    cpu_has_bf16_hardware.cache_clear()
    assert cpu_has_bf16_hardware() == expected
    cpu_has_bf16_hardware.cache_clear()


def test_measured_peak_is_quick_and_plausible() -> None:
    start = time.perf_counter()
    peak = measure_peak_flops(torch.float32, budget_seconds=0.1)
    assert time.perf_counter() - start < 2.0
    # From a small, busy laptop core to a large server.
    assert 1e9 < peak.flops_per_second < 1e14
    assert "measured" in peak.source
    assert "float32" in peak.source


@pytest.mark.parametrize(
    ("name", "architecture", "bf16_tera", "sheet_name"),
    [
        ("NVIDIA A100-SXM4-80GB", "sm_80", 312, "NVIDIA A100 80GB"),
        ("NVIDIA A100 80GB PCIe", "sm_80", 312, "NVIDIA A100 80GB PCIe"),
        ("NVIDIA A100-SXM4-40GB", "sm_80", 312, "NVIDIA A100 40GB"),
        ("NVIDIA H100 80GB HBM3", "sm_90", 989, "NVIDIA H100 SXM"),
        ("NVIDIA H100 PCIe", "sm_90", 756, "NVIDIA H100 PCIe"),
        ("NVIDIA H200", "sm_90", 989, "NVIDIA H200"),
        ("NVIDIA B200", "sm_100", 2250, "NVIDIA B200"),
        ("NVIDIA GB200", "sm_100", 2500, "NVIDIA GB200"),
        ("NVIDIA B300 SXM6 AC", "sm_103", 2250, "NVIDIA B300"),
        ("AMD Instinct MI250X", "gfx90a", 191.5, "AMD MI250X, one GCD"),
        ("AMD Instinct MI300X", "gfx942", 1307.4, "AMD MI300X"),
        ("AMD Instinct MI355X", "gfx950", 2516.6, "AMD MI355X"),
        ("AMD Radeon Graphics", "gfx90a", 191.5, "AMD MI250X, one GCD"),
    ],
)
def test_data_sheets(name: str, architecture: str, bf16_tera: float, sheet_name: str) -> None:
    sheet = data_sheet(name, architecture=architecture)
    assert sheet is not None
    info = DeviceInfo("cuda", name, architecture, 80 << 30, True, sheet)
    peak = info.peak(torch.bfloat16)
    assert peak is not None
    assert peak.flops_per_second == pytest.approx(bf16_tera * 1e12)
    assert peak.source == f"data sheet of {sheet_name}"
    assert sheet.memory_bytes_per_second > 1e12


@pytest.mark.parametrize("name", ["NVIDIA GeForce RTX 5090", "AMD Instinct MI100", "NVIDIA B2000"])
def test_unknown_devices_have_no_figure(name: str) -> None:
    assert data_sheet(name, architecture="sm_120") is None


def test_no_8_bit_figure_without_8_bit_hardware() -> None:
    sheet = data_sheet("AMD Instinct MI250X")
    assert sheet is not None
    info = DeviceInfo("rocm", "AMD Instinct MI250X", "gfx90a", 64 << 30, True, sheet)
    assert info.peak(torch.float8_e4m3fn) is None


def test_a_device_we_cannot_describe_is_named() -> None:
    with pytest.raises(ValueError, match="meta"):
        device_info("meta")


def test_import_touches_no_accelerator() -> None:
    code = (
        "import torch\n"
        "import parallel.device, parallel.attention.attention, parallel.attention.rotary\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, env={**os.environ, "PYTHONPATH": "."}
    )


@pytest.mark.gpu
def test_gpu_describes_itself() -> None:
    info = device_info()
    assert info.kind in ("cuda", "rocm")
    assert info.memory_bytes == torch.cuda.get_device_properties(0).total_memory
    assert info.architecture.startswith(("sm_", "gfx"))
