"""The CPU as megatron's accelerator."""

from __future__ import annotations

import subprocess
import sys

import torch

from tests.rank_pool import Ranks


def seen_by_megatron() -> dict[str, object]:
    from megatron_ext import cpu

    cpu.install()
    start, end = cpu.CpuEvent(enable_timing=True), cpu.CpuEvent(enable_timing=True)
    assert isinstance(torch.cuda.Event(), cpu.CpuEvent)  # type: ignore[no-untyped-call]
    start.record()
    end.record()
    torch.cuda.manual_seed(7)
    first = torch.rand(3, device="cuda")
    state = torch.cuda.get_rng_state()
    second = torch.rand(3, device="cuda:0")
    torch.cuda.set_rng_state(state)
    is_same = torch.equal(second, torch.rand(3)) and not torch.equal(first, second)
    return {
        "current_device": str(torch.cuda.current_device()) == "cpu",
        "factory": torch.zeros(2, device=torch.cuda.current_device()).device.type,
        "index": torch.empty(2, device=0).device.type,
        "to": torch.zeros(2).to("cuda").device.type,
        "to_device": torch.zeros(2).to(torch.device("cuda", 0), torch.bfloat16).dtype,
        "cuda": torch.zeros(2).cuda().device.type,
        "type": torch.zeros(2, dtype=torch.bfloat16).type(),
        "type_cast": torch.zeros(2).type(torch.float64).dtype,
        "module": next(torch.nn.Linear(1, 1).cuda().parameters()).device.type,
        "event": start.elapsed_time(end) >= 0.0,
        "rng": is_same,
        "available": torch.cuda.is_available(),
    }


def test_megatron_sees_the_cpu(ranks: Ranks) -> None:
    assert ranks.run(1, seen_by_megatron, megatron=True)[0] == {
        "current_device": True,
        "factory": "cpu",
        "index": "cpu",
        "to": "cpu",
        "to_device": torch.bfloat16,
        "cuda": "cpu",
        "type": "torch.cuda.BFloat16Tensor",
        "type_cast": torch.float64,
        "module": "cpu",
        "event": True,
        "rng": True,
        # Nothing that asks before acting is told that there is a GPU.
        "available": False,
    }


def test_importing_installs_nothing() -> None:
    code = (
        "import torch, megatron_ext.cpu as cpu; assert not cpu.is_installed(); "
        "assert torch.cuda.Stream is not cpu.CpuStream; cpu.install(); cpu.install(); "
        "assert cpu.is_installed()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_refuses_a_process_that_uses_cuda() -> None:
    code = (
        "import torch, megatron_ext.cpu as cpu\n"
        "torch.cuda.is_initialized = lambda: True\n"
        "try: cpu.install()\n"
        "except RuntimeError as error: assert 'already uses CUDA' in str(error)\n"
        "else: raise SystemExit('installed')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
