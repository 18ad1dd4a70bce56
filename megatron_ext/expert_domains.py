"""Which experts the held-out tokens of each domain choose.

A corpus has a label (`data.corpora[].label`), and corpora of one label are a domain. While the
held-out documents are run, a hook on each router adds up

    counts[layer, domain, expert] = choices of tokens of that domain for that expert

and one sum over all ranks at the end makes it whole: stages bring their layers, data-parallel ranks
their tokens. Nothing is hooked while training. `experts.json` in the run folder keeps the newest
counts; `expert_plot` draws them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.batch import HostBatch
from megatron_ext.metrics import Record
from megatron_ext.model import unwrap
from megatron_ext.moe_layer import MoEMLP
from megatron_ext.moe_router import Router
from megatron_ext.run import Run
from megatron_ext.training_data import SequenceRef
from moe.expert_load import specialisation, top_share
from moe.records import Routing

EXPERTS_FILE = "experts.json"


class DomainCounts:
    """Choices by layer, domain and expert of what this rank has run.

    Attributes:
        domains: names.
        layers: numbers of the layers that have experts, of the whole model.
    """

    def __init__(self, run: Run) -> None:
        config = run.config
        self.domains = config.data.domains
        self.layers = tuple(number for number, has in enumerate(config.moe_layers) if has)
        self._domain_of_corpus = torch.tensor(
            [self.domains.index(corpus.domain) for corpus in config.data.corpora]
        )
        self._num_experts = config.moe.num_moe_experts or 0
        self._device = run.device.device
        self._tensor_rank, self._tensor_size = run.mesh.tensor_rank, run.mesh.tensor_size
        # One column more than experts: choices that were dropped have that number.
        self._counts = torch.zeros(
            len(self.layers),
            len(self.domains),
            self._num_experts + 1,
            dtype=torch.int64,
            device=self._device,
        )
        self._routers: dict[int, Router] = {
            self.layers.index(layer.layer_number - 1): layer.mlp.router
            for chunk in run.chunks
            for layer in unwrap(chunk).decoder.layers
            if isinstance(layer.mlp, MoEMLP)
        }
        self._rows: list[Tensor] = []
        self._turns = dict.fromkeys(self._routers, 0)

    @contextmanager
    def watch(self, batches: Sequence[HostBatch], refs: Sequence[SequenceRef]) -> Iterator[None]:
        """Count what the routers choose while these micro-batches are run, each once.

        Args:
            batches: this rank's micro-batches, in the order in which they are run.
            refs: the sequences of the plan that they come from.
        """
        self._rows = [self._domains_of_rows(batch, refs) for batch in batches]
        self._turns = dict.fromkeys(self._routers, 0)
        hooks = [
            router.register_forward_hook(self._hook(layer))
            for layer, router in self._routers.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        # A layer sees the micro-batches in their order; that is how it is known which one it sees.
        assert all(turns == len(batches) for turns in self._turns.values()), self._turns

    def _hook(self, layer: int) -> Any:
        def count(_module: Any, _arguments: Any, routing: Routing) -> None:
            rows = self._rows[self._turns[layer]]
            self._turns[layer] += 1
            # Sequence parallelism gives a tensor-parallel rank its part of the row.
            first = rows.shape[0] // self._tensor_size * self._tensor_rank
            domains = rows[first : first + routing.num_tokens]
            width = self._num_experts + 1
            flat = (domains[:, None] * width + routing.experts).reshape(-1)
            self._counts[layer].view(-1).scatter_add_(0, flat, torch.ones_like(flat))

        return count

    def _domains_of_rows(self, batch: HostBatch, refs: Sequence[SequenceRef]) -> Tensor:
        """int64 [num_tokens], with padding, which has no domain and is never asked for."""
        pieces = batch.layout.pieces
        corpora = np.array([refs[piece.sequence].corpus for piece in pieces], dtype=np.int64)
        lengths = np.array([piece.end - piece.start for piece in pieces], dtype=np.int64)
        rows = torch.zeros(len(batch.tokens), dtype=torch.int64)
        used = torch.from_numpy(np.repeat(corpora, lengths))
        rows[: len(used)] = self._domain_of_corpus[used]
        return rows.to(self._device)

    def whole(self) -> Tensor:
        """The counts of all ranks, int64 [num_layers, num_domains, num_experts], on the host."""
        counts = self._counts.clone()
        dist.all_reduce(counts)
        return counts[..., : self._num_experts].cpu()


def report_domains(run: Run, counts: DomainCounts) -> Record:
    """Sum over the ranks, write `experts.json`, and say how specialised each layer is."""
    whole = counts.whole()
    topk = run.config.moe.moe_router_topk
    found: dict[str, list[float]] = {
        "validation_expert_specialisation": specialisation(whole).tolist(),
        "validation_expert_top_share": top_share(whole, topk=topk).tolist(),
    }
    if run.mesh.is_first_rank:
        tree = {
            "step": run.step,
            "domains": list(counts.domains),
            "layers": list(counts.layers),
            "specialisation": found["validation_expert_specialisation"],
            "top_share": found["validation_expert_top_share"],
            "counts": whole.tolist(),
        }
        _write(run.run_dir / EXPERTS_FILE, tree)
    return dict(found)


def _write(path: Path, tree: dict[str, Any]) -> None:
    temporary = path.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(tree) + "\n", encoding="utf-8")
    temporary.replace(path)
