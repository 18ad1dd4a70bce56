"""Expert layers between hosts with slow links: ways for tokens to travel, serial and in chunks.

    python -m scripts.bench.moe_network --hosts 2 --ranks-per-host 1 --mbit 200 --output FILE.json

A stack of expert layers (norm, router, experts, residual sum), forward and backward, one
thread a rank, on hosts that `shaped_hosts` makes (needs root). Every way sees the same tokens and
weights. Time is the median over steps of the slowest rank's; the share of all-to-all is the time
that the serial way spends waiting for exchanges. The bound of a chunked way is made of what the
serial one measured, C exchanging and E computing in one pass of one layer cut r times:

    bound = max(C, E + C / r)     the busier stream, and one chunk's way out and home

with the weights' gradients, which no chunk waits for, taken out of the second term where they fit
under the way home.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moe.dispatch.compressed import Compression, Place
from moe.dispatch.exact import ExactDispatcher
from moe.dispatch.hierarchical import HierarchicalDispatcher, make_node_groups
from moe.dispatch.hooks import HookMaker, Hooks
from moe.dispatch.payload import Payload, Wire, row_bytes
from moe.dispatch.per_expert import PerExpert
from moe.lsh.counters import CompressionCounters
from moe.lsh.hash import draw_rotations
from moe.schedule.choose import Chunking, PassCost
from moe.schedule.choose_layer import LayerLoad, choose_for
from moe.schedule.chunked import ChunkedExperts
from moe.schedule.lanes import ThreadLanes
from moe.schedule.profile import LayerProfile, LegProfile, measure_experts, measure_leg
from moe.schedule.serial import SerialExperts
from scripts.bench.expert_stack import Layer, Shape, Stack, measure
from scripts.bench.shaped_hosts import run_ranks, shaped_hosts


def profile(stack: Stack, legs: list[tuple[Any, dist.ProcessGroup]], load: LayerLoad) -> Any:
    """Alpha and beta of this network and these experts."""
    everybody = dist.group.WORLD
    assert everybody is not None
    cpu = torch.device("cpu")
    measured = [
        LegProfile(
            stream,
            measure_leg(group, num_bytes=int(size), everybody=everybody, device=cpu),
        )
        for (stream, group), size in zip(legs, load.leg_bytes, strict=True)
    ]
    costs = measure_experts(*stack.experts[0], num_rows=load.num_rows, everybody=everybody)
    return LayerProfile(tuple(measured), *costs)


def bound_seconds(serial: dict[str, float], forward: int, backward: int) -> float:
    """See the head of this file."""

    def exchange_and_rest(name: str) -> tuple[float, float]:
        exchange = serial[f"{name}_exchange_seconds"]
        return exchange, serial[f"{name}_seconds"] - exchange

    out, experts = exchange_and_rest("forward")
    total = max(out, experts + out / forward)
    out, experts = exchange_and_rest("backward")
    return total + max(out, experts + out / (2 * backward))


@dataclass(slots=True)
class Way:
    """One way for tokens to travel.

    Attributes:
        serial: one thing after another.
        chunked: by name, the numbers of chunks to try; the first is the chosen one.
    """

    serial: Layer
    counters: CompressionCounters | None = None
    chunked: dict[str, ChunkedExperts] = field(default_factory=dict)
    profile: LayerProfile | None = None
    costs: tuple[PassCost, PassCost] | None = None


def make_way(stack: Stack, name: str, lanes: ThreadLanes) -> Way:
    shape, group = stack.shape, dist.group.WORLD
    assert group is not None
    if name == "exact":
        exact = ExactDispatcher(group)
        return chunked_way(stack, exact, [("inter", group)], None, lanes)
    if name == "hierarchical":
        groups = make_node_groups(group, ranks_per_node=shape.ranks_per_host)
        legs = [("inter", groups.across), ("intra", groups.inside)]
        return chunked_way(stack, HierarchicalDispatcher(groups), legs, shape.hosts, lanes)
    if name == "per expert":
        return Way(SerialExperts(ExactDispatcher(group), PerExpert))
    payload: Payload = "int8" if name.endswith("int8") else "none"
    counters = CompressionCounters()
    compression = Compression(
        draw_rotations(
            shape.hidden_size, num_hashes=shape.num_hashes, hash_dim=shape.hash_dim, seed=0
        ),
        payload=payload,
        place=Place(group.rank(), group.size()),
        counters=counters,
    )
    return chunked_way(
        stack,
        ExactDispatcher(group, wire=Wire(payload, gradient_payload=payload)),
        [("inter", group)],
        None,
        lanes,
        hooks=compression,
        payload=payload,
        rate=shape.expected_rate,
        counters=counters,
    )


def chunked_way(
    stack: Stack,
    dispatcher: ExactDispatcher | HierarchicalDispatcher,
    legs: list[tuple[Any, dist.ProcessGroup]],
    num_nodes: int | None,
    lanes: ThreadLanes,
    *,
    hooks: HookMaker = Hooks,
    payload: Payload = "none",
    rate: float | None = None,
    counters: CompressionCounters | None = None,
) -> Way:
    """rate: see `LayerLoad`."""
    shape = stack.shape
    load = LayerLoad(
        num_tokens=shape.tokens,
        num_experts=shape.experts,
        topk=shape.topk,
        num_ranks=dist.get_world_size(),
        num_nodes=num_nodes,
        row_bytes=row_bytes(shape.hidden_size, payload=payload, dtype=torch.float32),
        rate=rate,
    )
    found = profile(stack, legs, load)
    tried = [
        choose_for(found, load),
        *((Chunking.of(number), Chunking.of(number)) for number in shape.chunks),
    ]
    return Way(
        SerialExperts(dispatcher, hooks),
        counters,
        chunked={
            f"{forward.num_chunks} + {backward.num_chunks}": ChunkedExperts(
                dispatcher, lanes, forward=forward, backward=backward, make_hooks=hooks
            )
            for forward, backward in tried
        },
        profile=found,
        costs=found.passes(leg_bytes=load.leg_bytes, num_rows=load.num_rows),
    )


def measure_rank(shape: Shape) -> dict[str, Any]:
    """All ways on this rank; rank 0 has the report."""
    stack, lanes = Stack.draw(shape), ThreadLanes()
    ways = {name: make_way(stack, name, lanes) for name in shape.ways}
    layers: dict[str, Layer] = {}
    for name, way in ways.items():
        layers[name] = way.serial
        layers |= {f"{name} {chunks}": layer for chunks, layer in way.chunked.items()}
    times = measure(stack, layers)
    report: dict[str, Any] = {}
    for name, way in ways.items():
        serial = times[name]
        exchanged = serial["forward_exchange_seconds"] + serial["backward_exchange_seconds"]
        report[name] = {
            **serial,
            "all_to_all_share": exchanged / serial["seconds"],
            "speedup_over_first": times[shape.ways[0]]["seconds"] / serial["seconds"],
        }
        if way.counters is not None:
            report[name]["rate"] = way.counters.take().rate
        if way.profile is not None:
            report[name]["profile"] = asdict(way.profile)
        report[name]["chunks"] = [
            compare(shape, way, layer, serial, times[f"{name} {chunks}"])
            for chunks, layer in way.chunked.items()
        ]
        if dist.get_rank() == 0:
            say(name, report[name])
    return report


def compare(
    shape: Shape,
    way: Way,
    layer: ChunkedExperts,
    serial: dict[str, float],
    chunked: dict[str, float],
) -> dict[str, Any]:
    """One number of chunks beside the serial way, the prediction and the bound."""
    forward, backward = layer.forward, layer.backward
    bound = bound_seconds(serial, forward.num_chunks, backward.num_chunks)
    assert way.costs is not None
    predicted = way.costs[0].seconds(forward) + way.costs[1].seconds(backward)
    return {
        "forward": asdict(forward),
        "backward": asdict(backward),
        **{name: chunked[name] for name in ("seconds", "forward_seconds", "backward_seconds")},
        "predicted_seconds": shape.layers * predicted,
        "bound_seconds": bound,
        "efficiency": bound / chunked["seconds"],
        "speedup_over_serial": serial["seconds"] / chunked["seconds"],
    }


def say(way: str, row: dict[str, Any]) -> None:
    """One line for a way, one for each number of chunks."""
    rate = f"  rate {row['rate']:.3f}" if "rate" in row else ""
    print(
        f"{way:14} {1e3 * row['seconds']:8.0f} ms  forward {1e3 * row['forward_seconds']:.0f}"
        f"  all-to-all {100 * row['all_to_all_share']:.0f} %{rate}",
        flush=True,
    )
    for tried in row["chunks"]:
        forward, backward = tried["forward"], tried["backward"]
        print(
            f"  {forward['num_chunks']:>2} + {backward['num_chunks']:<2} chunks"
            f" {1e3 * tried['seconds']:7.0f} ms  predicted {1e3 * tried['predicted_seconds']:.0f}"
            f"  serial / this {tried['speedup_over_serial']:.3f}"
            f"  bound / this {tried['efficiency']:.3f}",
            flush=True,
        )


def run_as_rank(path: Path, shape: Shape) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    report = measure_rank(shape)
    if dist.get_rank() == 0:
        path.write_text(json.dumps({"shape": asdict(shape), "ways": report}, indent=2) + "\n")
    dist.destroy_process_group()


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


def names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    readers = {"chunks": numbers, "ways": names}
    defaults = asdict(Shape())
    for name, default in defaults.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=readers.get(name, type(default)), default=default)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--timeout-seconds", type=float, default=240.0)
    parser.add_argument("--as-rank", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shape = Shape(**{name: getattr(arguments, name) for name in defaults})
    if arguments.as_rank:
        run_as_rank(arguments.output, shape)
        return 0
    command = [sys.executable, "-m", "scripts.bench.moe_network", "--as-rank", *sys.argv[1:]]
    with shaped_hosts(shape.hosts, megabits_per_second=shape.mbit) as hosts:
        return run_ranks(
            hosts,
            command,
            ranks_per_host=shape.ranks_per_host,
            timeout_seconds=arguments.timeout_seconds,
        )


if __name__ == "__main__":
    sys.exit(main())
