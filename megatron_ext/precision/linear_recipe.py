"""Which formats the three products of a linear layer use: recipes, as data.

    forward   y  = x w^T         contracts over the input features K
    dgrad     dx = dy w          contracts over the output features N
    wgrad     dw = dy^T x        contracts over the tokens T

Each of the six operands has a quantizer, or None: left in its dtype. Blocks and Hadamard groups run
along the contracted dim, so an operand that is used twice is stored twice, unless its blocks are
square.

| recipe | forward | dgrad | wgrad | source |
|---|---|---|---|---|
| `fp8_tensorwise` | E4M3 a tensor | E5M2 gradient, E4M3 | the same | current scaling |
| `fp8_blockwise` | x 1 x 128, w 128 x 128 | the same | 1 x 128 both | DeepSeek-V3 2412.19437 |
| `mxfp8` | E4M3, E8M0 by 32, scales up | the same | the same | 2506.08027 |
| `mxfp4`, `mxfp4_stochastic` | E2M1, E8M0 by 32 | the same | the same | plain, to compare |
| `nvfp4` | x 1 x 16, w 16 x 16 | gradient stochastic | and a Hadamard of 16 | 2509.25149 |
| `quartet` | QuEST in a Hadamard of 32 | headroom, random signs | the same | 2505.14669 |
| `quartet2` | NVFP4, four over six | EDEN, random signs, 128 | the same | 2601.22813 |
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from megatron_ext.precision.block_format import (
    FP8_1X128,
    FP8_128X128,
    FP8_TENSOR,
    MXFP4,
    MXFP8,
    NVFP4,
    NVFP4_2D,
    named_block_format,
)
from megatron_ext.precision.quantizer import Quantizer, Rounding, ScaleRule, Signs

BackwardReads = Literal["original", "stored"]
BackendName = Literal[
    "auto", "reference", "cpu", "triton", "cuda", "scaled_mm", "transformer_engine"
]


@dataclass(frozen=True, slots=True)
class LinearRecipe:
    """Quantizers of the six operands.

    Attributes:
        backward_reads: "original": dgrad and wgrad store copies of the layer's input and weight of
            their own. "stored": they store again what the forward product multiplied; gradients are
            then in its basis and are masked and turned back (Quartet).
        keep_last_share: share of the layers, the last ones, that stay as they are unless the
            configuration says which.
        backend: who stores and multiplies (`backend.py`).
    """

    name: str
    forward_input: Quantizer | None = None
    forward_weight: Quantizer | None = None
    dgrad_grad: Quantizer | None = None
    dgrad_weight: Quantizer | None = None
    wgrad_grad: Quantizer | None = None
    wgrad_input: Quantizer | None = None
    backward_reads: BackwardReads = "original"
    keep_last_share: float = 0.0
    backend: BackendName = "auto"

    def operands(self) -> dict[str, Quantizer | None]:
        return {name: getattr(self, name) for name in OPERANDS}


OPERANDS = (
    "forward_input",
    "forward_weight",
    "dgrad_grad",
    "dgrad_weight",
    "wgrad_grad",
    "wgrad_input",
)


def _uniform(name: str, quantizer: Quantizer, grad: Quantizer | None = None) -> LinearRecipe:
    """One quantizer for all operands but gradients."""
    grad = quantizer if grad is None else grad
    return LinearRecipe(name, quantizer, quantizer, grad, quantizer, grad, quantizer)


def _fp8_blockwise() -> LinearRecipe:
    rows, square = Quantizer(FP8_1X128), Quantizer(FP8_128X128)
    return LinearRecipe("fp8_blockwise", rows, square, rows, square, rows, rows)


def _nvfp4() -> LinearRecipe:
    rows, square = Quantizer(NVFP4), Quantizer(NVFP4_2D)
    grad = replace(rows, rounding="stochastic")
    turned = replace(rows, hadamard_group=16, signs="fixed")
    turned_grad = replace(turned, rounding="stochastic")
    return LinearRecipe(
        "nvfp4", rows, square, grad, square, turned_grad, turned, keep_last_share=0.15
    )


def _quartet() -> LinearRecipe:
    forward = Quantizer(MXFP4, scale_rule="quest", hadamard_group=32, keeps_mask=True)
    backward = Quantizer(MXFP4, scale_rule="headroom", hadamard_group=32, signs="random")
    return LinearRecipe(
        "quartet", forward, forward, backward, backward, backward, backward, "stored"
    )


def _quartet2() -> LinearRecipe:
    forward = Quantizer(NVFP4, tries_four=True)
    backward = Quantizer(NVFP4, scale_rule="eden", hadamard_group=128, signs="random")
    return LinearRecipe(
        "quartet2", forward, forward, backward, backward, backward, backward, "stored"
    )


def linear_recipes() -> dict[str, LinearRecipe]:
    """All recipes by name."""
    tensorwise = Quantizer(FP8_TENSOR)
    mxfp4 = Quantizer(MXFP4)
    made = (
        LinearRecipe("bf16"),
        _uniform(
            "fp8_tensorwise",
            tensorwise,
            Quantizer(named_block_format("fp8_tensor_e5m2")),
        ),
        _fp8_blockwise(),
        _uniform("mxfp8", Quantizer(MXFP8, rounds_scale_up=True)),
        _uniform("mxfp4", mxfp4),
        _uniform(
            "mxfp4_stochastic",
            mxfp4,
            Quantizer(MXFP4, scale_rule="headroom", rounding="stochastic"),
        ),
        _nvfp4(),
        _quartet(),
        _quartet2(),
    )
    return {recipe.name: recipe for recipe in made}


def override(recipe: LinearRecipe, changes: dict[str, dict[str, Any]]) -> LinearRecipe:
    """A recipe with single fields of single operands changed.

    Args:
        changes: operand -> field of `Quantizer` -> value; `block_format` is a name of
            `BLOCK_FORMATS`; {"block_format": None} leaves the operand in its dtype.

    Raises:
        ValueError: no such operand, field or format.
    """
    known = {field.name for field in fields(Quantizer)}
    for operand, values in changes.items():
        if operand not in OPERANDS:
            raise ValueError(f"no operand {operand!r}; there are {', '.join(OPERANDS)}")
        if unknown := values.keys() - known:
            raise ValueError(
                f"{operand} has no {sorted(unknown)[0]!r}; there are {', '.join(sorted(known))}"
            )
        changed: dict[str, Any] = {operand: _changed(getattr(recipe, operand), operand, values)}
        recipe = replace(recipe, **changed)
    return recipe


def check_recipe(recipe: LinearRecipe) -> None:
    """ValueError where operands do not go together or a rule is not that of a format.

    A Hadamard transform cancels in a product only where both operands have the same.
    """
    for product, (left, right) in _PRODUCTS.items():
        turns = {
            name: (1, "none") if quantizer is None else _turn(quantizer)
            for name, quantizer in recipe.operands().items()
            if name in (left, right)
        }
        if turns[left] != turns[right]:
            raise ValueError(
                f"{product}: {left} has Hadamard groups and signs {turns[left]}, {right} "
                f"{turns[right]}; they cancel only where both are the same"
            )
    for name, quantizer in recipe.operands().items():
        if quantizer is None or quantizer.block_format.scale == "e4m3":
            continue
        if quantizer.scale_rule == "eden" or quantizer.tries_four:
            rule = "tries_four" if quantizer.tries_four else "scale_rule=eden"
            raise ValueError(
                f"{name}: {rule} corrects scales in E4M3, which nvfp4 has and "
                f"{quantizer.block_format.name} has not"
            )


_PRODUCTS = {
    "forward": ("forward_input", "forward_weight"),
    "dgrad": ("dgrad_grad", "dgrad_weight"),
    "wgrad": ("wgrad_grad", "wgrad_input"),
}


def _turn(quantizer: Quantizer) -> tuple[int, str]:
    if quantizer.hadamard_group == 1:
        return 1, "none"
    return quantizer.hadamard_group, quantizer.signs


def _check_value(operand: str, name: str, value: Any) -> None:
    """ValueError naming what a field of `Quantizer` may be."""
    if name in _CHOICES:
        if value not in _CHOICES[name]:
            raise ValueError(f"{operand}.{name}={value}; use {', '.join(_CHOICES[name])}")
    elif name == "hadamard_group":
        if type(value) is not int or value < 1 or value & (value - 1):
            raise ValueError(f"{operand}.hadamard_group={value}; use a power of two, 1 for none")
    elif name != "block_format" and not isinstance(value, bool):
        raise ValueError(f"{operand}.{name}={value}; use true or false")


_CHOICES: dict[str, tuple[str, ...]] = {
    "rounding": get_args(Rounding),
    "scale_rule": get_args(ScaleRule),
    "signs": get_args(Signs),
}


def _changed(quantizer: Quantizer | None, operand: str, values: dict[str, Any]) -> Quantizer | None:
    values = dict(values)
    for field_name, value in values.items():
        _check_value(operand, field_name, value)
    if "block_format" in values:
        name = values.pop("block_format")
        if name is None:
            return None
        block_format = named_block_format(name)
        return replace(quantizer or Quantizer(block_format), block_format=block_format, **values)
    if quantizer is None:
        raise ValueError(f"{operand} is not quantized; give it a block_format")
    return replace(quantizer, **values)
