"""The section `moe` of the configuration: layers of experts (see `config.py`)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megatron_ext.config_section import Section

RouterType = Literal["topk", "noisy_topk", "x_moe", "expert_choice"]
BalanceType = Literal["none", "aux_loss", "seq_aux_loss", "global_aux_loss"]
Coefficient = Annotated[float, Field(ge=0)]


class MoEConfig(Section):
    """Feed-forward layers of many experts, of which each token sees a few; none by default."""

    num_moe_experts: int | None = Field(None, ge=1)
    """Experts of each such layer; unset, the model is dense."""
    moe_layer_freq: int | list[Literal[0, 1]] = 1
    """N: layers 0, N, 2N, ... have experts; or a list with a 1 or 0 for each layer."""
    moe_ffn_hidden_size: int | None = Field(None, ge=1)
    """Width of one expert's inner layer; by default that of a dense layer."""
    moe_shared_expert_intermediate_size: int | None = Field(None, ge=1)
    """Inner width of the experts that every token sees, all together; by default there are none."""
    moe_router_topk: int = Field(2, ge=1)
    """Experts that each token sees."""
    moe_router_pre_softmax: bool = False
    """true: weights are the softmax over all experts; false: over the chosen ones, so that they sum
    to 1."""
    moe_router_topk_scaling_factor: float | None = Field(None, gt=0)
    """Factor on the weights of the chosen experts; by default 1."""
    moe_router_type: RouterType = "topk"
    """topk: the best experts of each token; noisy_topk: with learned noise (Shazeer); x_moe: by
    angles in few dimensions; expert_choice: the best tokens of each expert."""
    moe_router_score_function: Literal["softmax", "sigmoid"] = "softmax"
    """What logits become; sigmoid scores of the chosen experts are made to sum to 1."""
    moe_router_enable_expert_bias: bool = False
    """Balance by a bias on the choice that follows the load of the global batch (DeepSeek-V3)."""
    moe_router_bias_update_rate: float = Field(1e-3, gt=0)
    """How far the bias moves in a step."""
    moe_router_num_groups: int | None = Field(None, ge=1)
    """Groups of experts of which each token uses few (DeepSeek-V3)."""
    moe_router_group_topk: int | None = Field(None, ge=1)
    """Groups that each token uses."""
    moe_router_projection_size: int | None = Field(None, ge=1)
    """x_moe: dimensions of the comparison; by default half the number of experts."""
    moe_router_warmup_steps: int = Field(0, ge=0)
    """Steps in which choices go over from random ones to the router's own (Ling)."""
    moe_expert_capacity_factor: float | None = Field(None, gt=0)
    """Most tokens of an expert in training, in multiples of an even share of a rank's micro-batch;
    by default no limit, and nothing is dropped."""
    moe_token_drop_policy: Literal["probs", "position", "random"] = "probs"
    """Whom a full expert refuses: the smallest weights, the last tokens, or by lot."""
    moe_z_loss_coeff: float = Field(0.0, ge=0)
    """Weight of the mean squared log-sum-exp of each router's logits."""
    moe_token_dispatcher_type: Literal["auto", "exact", "hierarchical", "deep_ep"] = "auto"
    """How tokens travel to their experts: exact sends each once to every rank that it needs;
    hierarchical once to every node and on from there; deep_ep is the library's; auto takes
    hierarchical where nodes of several ranks share experts, else exact."""
    moe_num_chunks: Literal["auto"] | Annotated[int, Field(ge=1)] = 1
    """Chunks in which a rank's tokens travel to their experts and home, while others are computed;
    auto measures the network and the experts when a run starts. Not with deep_ep."""
    moe_num_backward_chunks: Literal["auto"] | Annotated[int, Field(ge=1)] | None = None
    """The same for gradients; by default as `moe_num_chunks` says."""
    moe_router_load_balancing_type: BalanceType | list[BalanceType] = "none"
    """Over which tokens the load of the experts is to be even: of the global batch
    (global_aux_loss), of each micro-batch of each rank (aux_loss), of each document
    (seq_aux_loss); or several of these in a list."""
    moe_aux_loss_coeff: Coefficient | list[Coefficient] = 0.0
    """Weight of that loss, which is 1 in an even layer; a list if the types are one."""
    moe_device_aux_loss_coeff: Coefficient = 0.0
    """Weight of the same loss between groups of experts, over the global batch (DeepSeekMoE)."""
    moe_device_aux_loss_num_groups: int | None = Field(None, ge=1)
    """Groups of it; by default one for each expert-parallel rank."""
    moe_router_inputs_on_host: bool = False
    """Keep the routers' inputs of a step, which balance over the global batch needs at its end, in
    host memory: tokens x hidden_size for each layer of a rank."""
    moe_lsh_num_hashes: int | None = Field(None, ge=1)
    """Similar tokens travel to an expert as one, in training: hash functions that must agree
    (LSH-MoE); more send more. Unset, every token travels."""
    moe_lsh_hash_dim: int = Field(4, ge=1)
    """Directions of each hash function, which has twice as many values."""
    moe_lsh_layers: list[int] | None = None
    """Layers of which that is so, from 0; by default all that have experts."""
    moe_lsh_warmup_steps: int = Field(0, ge=0)
    """First steps in which every token travels."""
    moe_lsh_centroid: Literal["mean", "first"] = "mean"
    """What travels for a bucket of tokens: their mean, or the first of them."""
    moe_lsh_num_refinements: int = Field(0, ge=0)
    """Times that tokens then move to the nearest mean: as many travel, and they are nearer."""
    moe_lsh_residual_scale: float = Field(0.0, ge=0)
    """How much of a token's difference from it is added to the answer: 1 as in the paper, which
    trains worse from scratch (docs/moe.md)."""
    moe_lsh_payload: Literal["none", "int8", "float8_e4m3fn"] = "none"
    """8-bit numbers for what travels to the experts, and for their answers."""
    moe_lsh_payload_gradients: bool = False
    """The same for the gradients of both."""
    moe_lsh_seed: int = Field(0, ge=0)
    """Of the hash functions' random directions."""

    @property
    def projected_size(self) -> int:
        """Dimensions in which x_moe compares tokens and experts."""
        return self.moe_router_projection_size or max(2, (self.num_moe_experts or 0) // 2)
