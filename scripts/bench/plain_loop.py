"""A single-file PyTorch training loop: what one would write without this project.

The same Llama-style network as the quickstart recipe, on rows of equal length, with nothing from
this repository. `baseline.py` times it beside ours.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Shape:
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    vocab_size: int
    rotary_base: float


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        hidden, self.num_heads = shape.hidden_size, shape.num_heads
        head = hidden // shape.num_heads
        self.attention_norm = nn.RMSNorm(hidden, eps=1e-5)
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.query_norm = nn.RMSNorm(head, eps=1e-5)
        self.key_norm = nn.RMSNorm(head, eps=1e-5)
        self.output = nn.Linear(hidden, hidden, bias=False)
        self.mlp_norm = nn.RMSNorm(hidden, eps=1e-5)
        self.gate_up = nn.Linear(hidden, 2 * shape.ffn_hidden_size, bias=False)
        self.down = nn.Linear(shape.ffn_hidden_size, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, hidden = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.num_heads, -1)
        query, key, value = (part.transpose(1, 2) for part in qkv.unbind(dim=2))
        query = rotate(self.query_norm(query), cos, sin).to(value.dtype)
        key = rotate(self.key_norm(key), cos, sin).to(value.dtype)
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.output(attended.transpose(1, 2).reshape(batch, length, hidden))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(functional.silu(gate) * up)


class Model(nn.Module):
    def __init__(self, shape: Shape, length: int) -> None:
        super().__init__()
        head = shape.hidden_size // shape.num_heads
        self.embedding = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, eps=1e-5)
        self.output = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        frequencies = shape.rotary_base ** (-torch.arange(0, head, 2) / head)
        angles = torch.outer(torch.arange(length), frequencies)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        cos, sin = self.cos.to(x.dtype), self.sin.to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.output(self.norm(x))


class PlainLoop:
    """precision: fp32; bf16 (autocast, float32 weights); bf16_weights (no float32 copy kept)."""

    def __init__(self, shape: Shape, *, rows: int, length: int, precision: str) -> None:
        torch.manual_seed(0)
        self.model = Model(shape, length)
        if precision == "bf16_weights":
            self.model.to(torch.bfloat16)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )
        self.cast = (
            torch.autocast("cpu", dtype=torch.bfloat16)
            if precision == "bf16"
            else contextlib.nullcontext()
        )
        self.rows, self.length = rows, length

    def step(self, stream: Tensor) -> float:
        """One optimizer step on rows * length tokens and their successors."""
        tokens = stream[:-1].view(self.rows, self.length)
        labels = stream[1:].reshape(-1)
        with self.cast:
            logits = self.model(tokens)
            loss = functional.cross_entropy(logits.flatten(0, 1).float(), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())
