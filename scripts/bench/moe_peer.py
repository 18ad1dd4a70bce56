"""Tokens per second of one layer with experts, beside megatron-core's own `MoELayer`.

    python scripts/bench/moe_peer.py [--rounds 15] [--shapes quickstart fine wide] [--json FILE]

Two CPU ranks with one thread each share the experts. The peer is megatron's layer with its
all-to-all dispatcher and `SequentialMLP` experts, its choice without a fused kernel. Both layers
have the same weights and get the same tokens; that they give the same output and gradients is
checked first. Then they take turns, forward and backward, without data parallelism or an optimizer,
with other tokens in each pass whose loads differ as in training (the fullest expert has about 1.5
times the mean); each round the slower rank counts. Medians are printed, and the median of the
ratios of the rounds. Aim: 1.2 times the peer.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import queue
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

if TYPE_CHECKING:
    from torch import Tensor, nn

    from megatron_ext.config import Config

NUM_RANKS = 2


@dataclass(frozen=True)
class Shape:
    """One layer; num_tokens are those of a rank."""

    num_tokens: int
    hidden_size: int
    ffn_size: int
    num_experts: int
    topk: int


SHAPES = {
    "quickstart": Shape(1024, 256, 256, num_experts=8, topk=2),
    "fine": Shape(1024, 256, 128, num_experts=64, topk=6),
    "wide": Shape(1024, 512, 1024, num_experts=8, topk=2),
}


def make_config(shape: Shape) -> Config:
    from megatron_ext.config_check import check_config
    from megatron_ext.config_file import load_config

    overrides = [
        "data.corpora=[{path: unread}]",
        "model.num_layers=1",
        f"model.hidden_size={shape.hidden_size}",
        f"moe.moe_ffn_hidden_size={shape.ffn_size}",
        f"moe.num_moe_experts={shape.num_experts}",
        f"moe.moe_router_topk={shape.topk}",
        "moe.moe_shared_expert_intermediate_size=null",
        "moe.moe_router_load_balancing_type=none",
        "moe.moe_aux_loss_coeff=0.0",
        "moe.moe_z_loss_coeff=0.0",
        "launch.device=cpu",
    ]
    return check_config(load_config("moe-quickstart", overrides), world_size=NUM_RANKS)


def let_peer_run_here() -> None:
    """megatron 0.16.1's layer lacks a name without Transformer Engine, and on a CPU its splits stay
    tensors, which torch's all-to-all does not take."""
    import torch
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None

    def on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = on_host


def build_layers(config: Config, dtype: Any) -> tuple[nn.Module, nn.Module]:
    """Ours and megatron's, with the same weights."""
    import copy

    import torch
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.moe_layer import MoELayer

    from megatron_ext.model import transformer_config
    from megatron_ext.moe_layer import MoEMLP

    let_peer_run_here()
    ours_config = transformer_config(config, dtype=dtype, is_cuda=False)
    submodules = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    ours = MoEMLP(ours_config, submodules, moe=config.moe)
    peer_config = copy.copy(ours_config)
    peer_config.moe_token_dispatcher_type = "alltoall"
    peer_config.moe_router_load_balancing_type = "none"
    spec = get_moe_module_spec(use_te=False, num_experts=config.moe.num_moe_experts)
    peer = MoELayer(peer_config, spec.submodules, layer_number=1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in ours.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) / weight.shape[-1] ** 0.5)
        peer.router.weight.copy_(ours.router.weight)
        for index, expert in enumerate(peer.experts.local_experts):
            expert.linear_fc1.weight.copy_(ours.experts.linear_fc1[index])
            expert.linear_fc2.weight.copy_(ours.experts.linear_fc2[index])
    return ours, peer


def gradients(layer: nn.Module, hidden: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Output and gradients of one pass."""
    import torch

    layer.zero_grad(set_to_none=True)
    hidden = hidden.detach().requires_grad_()
    output, _ = layer(hidden)
    output.backward(grad)
    assert hidden.grad is not None
    found = {"output": output.detach(), "gradient of input": hidden.grad}
    experts = layer.experts
    if hasattr(experts, "local_experts"):
        of_experts = [expert.linear_fc1.weight.grad for expert in experts.local_experts]
        found["gradient of experts"] = torch.stack(of_experts)
    else:
        found["gradient of experts"] = experts.linear_fc1.grad
    found["gradient of router"] = layer.router.weight.grad
    return found


def largest_difference(ours: nn.Module, peer: nn.Module, hidden: Tensor, grad: Tensor) -> float:
    """Over all that a pass computes, relative to the size of each."""
    found, expected = gradients(ours, hidden, grad), gradients(peer, hidden, grad)
    return max(
        float((found[name].float() - expected[name].float()).norm() / expected[name].float().norm())
        for name in expected
    )


def seconds(layer: nn.Module, inputs: Sequence[Tensor], grad: Tensor) -> float:
    """Of one forward and backward pass, on the slower rank."""
    import torch
    import torch.distributed as dist

    dist.barrier()
    began = time.perf_counter()
    for hidden in inputs:
        layer.zero_grad(set_to_none=True)
        layer(hidden.requires_grad_())[0].backward(grad)
    spent = torch.tensor((time.perf_counter() - began) / len(inputs), dtype=torch.float64)
    dist.all_reduce(spent, op=dist.ReduceOp.MAX)
    return float(spent)


def measure(shape: Shape, dtype_name: str, *, rounds: int, num_repeats: int) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    from megatron_ext.mesh import start_mesh, stop_mesh

    config, dtype = make_config(shape), getattr(torch, dtype_name)
    start_mesh(config)
    try:
        ours, peer = build_layers(config, dtype)
        generator = torch.Generator().manual_seed(1 + dist.get_rank())
        size = (shape.num_tokens, 1, shape.hidden_size)

        def draw() -> Tensor:
            # What the tokens of a batch share makes loads uneven, differently in each.
            shared = torch.randn(size[1:], generator=generator) / 2
            return (torch.randn(size, generator=generator) + shared).to(dtype)

        hidden, grad = draw(), draw()
        difference = torch.tensor(largest_difference(ours, peer, hidden, grad))
        dist.all_reduce(difference, op=dist.ReduceOp.MAX)
        allowed = 1e-5 if dtype == torch.float32 else 2e-2
        if not float(difference) <= allowed:
            raise SystemExit(f"the layers differ by {float(difference):.1e}, {allowed} is allowed")
        times: dict[str, list[float]] = {"ours": [], "peer": []}
        for index in range(rounds + 2):
            # Other tokens in each pass, for the experts' loads differ from step to step.
            inputs = [draw() for _ in range(num_repeats)]
            for name, layer in (("ours", ours), ("peer", peer)):
                spent = seconds(layer, inputs, grad)
                times[name] += [spent] * (index >= 2)
    finally:
        stop_mesh()
    tokens = NUM_RANKS * shape.num_tokens
    return {
        "shape": asdict(shape),
        "dtype": dtype_name,
        "largest_difference": float(difference),
        "tokens_per_second": {n: tokens / statistics.median(t) for n, t in times.items()},
        "ratio": statistics.median(
            theirs / mine for mine, theirs in zip(times["ours"], times["peer"], strict=True)
        ),
    }


def rank_main(rank: int, folder: str, arguments: argparse.Namespace, results: Any) -> None:
    import torch

    from megatron_ext.launch import process_group
    from megatron_ext.launch.ranks import FileStoreAddress, RankInfo
    from megatron_ext.rank import choose_accelerator

    torch.set_num_threads(1)
    store = FileStoreAddress(Path(folder) / "store")
    info = RankInfo(rank, NUM_RANKS, rank, NUM_RANKS, source="local", store=store)
    device = choose_accelerator(make_config(SHAPES["quickstart"]))
    with process_group.running(info, device=device, timeout_seconds=120.0):
        for name in arguments.shapes:
            for dtype in arguments.dtypes:
                found = measure(
                    SHAPES[name], dtype, rounds=arguments.rounds, num_repeats=arguments.repeats
                )
                if rank == 0:
                    results.put({"name": name} | found)
    if rank == 0:
        results.put(None)


def collect(ranks: list[Any], results: Any) -> list[dict[str, Any]]:
    """The lines of rank 0, each printed when it comes."""
    found: list[dict[str, Any]] = []
    while all(process.exitcode in (None, 0) for process in ranks):
        try:
            line = results.get(timeout=1.0)
        except queue.Empty:
            continue
        if line is None:
            break
        found.append(line)
        speed = line["tokens_per_second"]
        print(
            f"{line['name']:<12} {line['dtype']:<9} ours {speed['ours']:>9,.0f} tokens/s, peer "
            f"{speed['peer']:>9,.0f}, ratio {line['ratio']:.2f} (differ by "
            f"{line['largest_difference']:.0e})",
            flush=True,
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=3, help="passes of a side in a round")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=rank_main, args=(rank, folder, arguments, results), daemon=True)
            for rank in range(NUM_RANKS)
        ]
        for process in ranks:
            process.start()
        found = collect(ranks, results)
        for process in ranks:
            process.join(timeout=10.0)
    if arguments.json is not None:
        report = {"date": date.today().isoformat(), "machine": platform.processor(), "lines": found}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    if len(found) < len(arguments.shapes) * len(arguments.dtypes):
        raise SystemExit("a rank has failed; see above")


if __name__ == "__main__":
    main()
