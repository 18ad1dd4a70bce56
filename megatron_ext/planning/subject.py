"""From a configuration to what is predicted: model, layout, device, and what had to be assumed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_ext.config import Config
from megatron_ext.config_check import data_parallel_size
from megatron_ext.data.workplace import METADATA_FILE
from megatron_ext.device_probe import Accelerator, accelerators
from megatron_ext.planning.device_profile import DeviceProfile, device_profile_names, load_profile
from megatron_ext.planning.layout import Layout, ModelSize, layout_of, model_size
from megatron_ext.planning.lengths import length_effect

# Where neither the configuration nor a corpus says: Llama 3's.
_VOCAB_SIZE = 128_256
_CPU, _ACCELERATOR = "cpu", "h100"


@dataclass(frozen=True, slots=True)
class Subject:
    """What is predicted.

    assumptions: sentences that the user should know.
    """

    model: ModelSize
    layout: Layout
    device_name: str
    device: DeviceProfile
    balance: float
    assumptions: tuple[str, ...]


def config_model(config: Config, *, vocab_size: int) -> ModelSize:
    """Sizes of a configuration's model; vocab_size padded."""
    return model_size(config, vocab_size=vocab_size, router_parameters=_router_weights(config))


def subject_of(
    config: Config,
    *,
    num_ranks: int,
    device_name: str | None = None,
    lengths: Sequence[int] = (),
) -> Subject:
    """Gather what a prediction needs.

    Args:
        config: checked for num_ranks.
        device_name: profile or YAML file; by default what the configuration or the machine says.
        lengths: of documents, tokens; none: all have the greatest length.

    Raises:
        UserError: no such profile, or lengths that cannot be planned.
    """
    name, why = _device_name(config, device_name)
    device = load_profile(name)
    assumptions = [f"device {name}: {why}"] if why else []
    vocab_size, why = _vocab_size(config)
    if why:
        assumptions.append(why)
    unit = config.model.make_vocab_size_divisible_by
    vocab_size = -(-vocab_size // unit) * unit
    model = config_model(config, vocab_size=vocab_size)
    is_bf16 = config.precision.dtype == "bf16" or (
        config.precision.dtype == "auto" and "bf16" in device.peak_tflops
    )
    layout = layout_of(
        config, num_ranks=num_ranks, vocab_size=vocab_size, is_bf16=is_bf16, is_cpu=device.is_cpu
    )
    balance = 1.0
    if lengths:
        effect = length_effect(
            lengths,
            config,
            device,
            num_data_ranks=data_parallel_size(config, num_ranks),
            vocab_size=vocab_size,
        )
        balance = effect.balance
        model = replace(model, sequence_length=effect.attended_length)
    else:
        assumptions.append(
            f"every document has {model.sequence_length:,} tokens; --lengths FILE tells real ones"
        )
    return Subject(model, layout, name, device, balance, tuple(assumptions))


def _device_name(config: Config, asked: str | None) -> tuple[str, str]:
    """Name, and why where nobody asked for it."""
    name = asked or config.launch.device_profile
    if name:
        return name, ""
    if config.launch.device == "cpu":
        return _CPU, ""
    found = accelerators()
    if found:
        return _profile_of(found[0])
    if config.launch.device == "cuda":
        return _ACCELERATOR, "no accelerator here to ask; --device NAME names another"
    return _CPU, "no accelerator in this machine; --device NAME names another"


def _profile_of(device: Accelerator) -> tuple[str, str]:
    words = device.name.lower().replace("-", " ").split()
    if device.gfx == "gfx90a":
        words.append("mi250x")
    # The longest name first: a GB200 is no B200.
    for name in sorted(device_profile_names(), key=len, reverse=True):
        if name in words:
            return name, f"this machine has {device.name}"
    return _ACCELERATOR, f"no profile for {device.name} of this machine; --device NAME names one"


def _vocab_size(config: Config) -> tuple[int, str]:
    if config.model.vocab_size is not None:
        return config.model.vocab_size, ""
    corpus = config.data.corpora[0]
    try:
        tree = json.loads((Path(corpus.path) / METADATA_FILE).read_text(encoding="ascii"))
        return int(tree["tokenizer"]["vocab_size"]), ""
    except (OSError, ValueError, KeyError, TypeError):
        pass
    tokenizer = corpus.prepare.tokenizer if corpus.prepare else ""
    if tokenizer.startswith("train:") and tokenizer[6:].isdecimal():
        return int(tokenizer[6:]), ""
    return _VOCAB_SIZE, f"vocabulary of {_VOCAB_SIZE:,}; model.vocab_size says otherwise"


def _router_weights(config: Config) -> int:
    h, moe = config.model.hidden_size, config.moe
    num_experts = moe.num_moe_experts or 0
    if moe.moe_router_type == "x_moe":
        size = moe.projected_size
        return size * (num_experts + h) + 1
    return num_experts * h * (2 if moe.moe_router_type == "noisy_topk" else 1)
