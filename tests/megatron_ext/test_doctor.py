"""`megatron-ext doctor`: what products in few bits run on, asked without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ext.device_probe import (
    Accelerator,
    accelerators,
    amd_devices,
    hardware_summary,
    nvidia_devices,
)
from tests.source_tree import ROOT

# (device, FP8, FP4)
DEVICES = (
    (Accelerator("A100", (8, 0)), False, False),
    (Accelerator("L40", (8, 9)), True, False),
    (Accelerator("H100", (9, 0)), True, False),
    (Accelerator("B200", (10, 0)), True, True),
    (Accelerator("RTX 5090", (12, 0)), True, True),
    (Accelerator("MI250X", gfx="gfx90a"), False, False),
    (Accelerator("MI300X", gfx="gfx942"), True, False),
    (Accelerator("MI355X", gfx="gfx950"), True, True),
)


@pytest.mark.parametrize(("device", "has_fp8", "has_fp4"), DEVICES)
def test_what_devices_multiply(device: Accelerator, has_fp8: bool, has_fp4: bool) -> None:
    assert (device.has_fp8, device.has_fp4) == (has_fp8, has_fp4)


def test_summary_counts_devices() -> None:
    h100, a100 = Accelerator("H100", (9, 0)), Accelerator("A100", (8, 0))
    assert hardware_summary([h100, a100, h100], 8) == "2 x H100 (9.0)"
    assert hardware_summary([h100], 4) == "none"
    assert hardware_summary([], 8) == "no accelerator"


def test_devices_are_read_from_the_system(tmp_path: Path) -> None:
    for node, version in enumerate((0, 90010, 90402)):
        folder = tmp_path / str(node)
        folder.mkdir()
        (folder / "properties").write_text(f"cpu_cores_count 4\ngfx_target_version {version}\n")
    assert [device.gfx for device in amd_devices(tmp_path)] == ["gfx90a", "gfx942"]
    assert nvidia_devices("libnowhere.so.1") == []


def test_doctor_says_what_few_bits_run_on() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "megatron_ext", "doctor"],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "COLUMNS": "250"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for row in ("nvcc", "CUDA kernels", "FP8 hardware", "FP4 hardware", "transformer_engine"):
        assert row in done.stdout, row
    assert "MEGATRON_EXT_BUILD_CUDA=1" in done.stdout


@pytest.mark.skipif(bool(accelerators()), reason="torch is asked about an accelerator that is here")
def test_doctor_loads_no_torch() -> None:
    code = (
        "import sys; from megatron_ext.doctor import doctor; assert doctor() == 0;"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
