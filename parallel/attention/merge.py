"""Two attentions of the same queries over different keys become one.

Each is normalised over its own keys and comes with the logarithm of its sum, lse. Over all keys:

    weight = exp(lse_b) / (exp(lse_a) + exp(lse_b)) = sigmoid(lse_b - lse_a)
    o      = o_a + weight (o_b - o_a)
    lse    = log(exp(lse_a) + exp(lse_b))

in float32, whatever o_b's precision (FlashAttention, arXiv 2205.14135, section 3.1; Ring Attention,
arXiv 2310.01889). A part over no key has lse -inf and changes nothing.
"""

import torch
from torch import Tensor

from parallel.device import has_triton


def merge_partial(
    output: Tensor,
    log_sum_exp: Tensor,
    part_output: Tensor,
    part_log_sum_exp: Tensor,
    *,
    rows: Tensor | None = None,
) -> None:
    """Merge a part over more keys into `output` and `log_sum_exp`, in place.

    output: [num_tokens, num_heads, head_dim] and log_sum_exp: [num_heads, num_tokens], float32 or
    float64. part_output: [num_rows, num_heads, head_dim] of any precision; part_log_sum_exp:
    [num_heads, num_rows]. rows: [num_rows] different tokens that the part is about; None: all.
    """
    if output.is_cuda and output.dtype == torch.float32 and has_triton():
        from parallel.attention.merge_triton import merge_partial_triton

        merge_partial_triton(output, log_sum_exp, part_output, part_log_sum_exp, rows=rows)
        return
    if rows is None:
        merge_reference(output, log_sum_exp.t(), part_output, part_log_sum_exp.t())
        return
    selected, selected_lse = output[rows], log_sum_exp[:, rows]
    merge_reference(selected, selected_lse.t(), part_output, part_log_sum_exp.t())
    output[rows] = selected
    log_sum_exp[:, rows] = selected_lse


def merge_reference(
    output: Tensor, log_sum_exp: Tensor, part_output: Tensor, part_log_sum_exp: Tensor
) -> None:
    """The formula, in place: outputs [..., head_dim], log-sum-exps [...], strides as they come."""
    part_log_sum_exp = part_log_sum_exp.to(log_sum_exp.dtype)
    # Over no key on either side: -inf - -inf has no value, and no weight is wanted.
    difference = (part_log_sum_exp - log_sum_exp).nan_to_num_(nan=-torch.inf, posinf=torch.inf)
    output.lerp_(part_output.to(output.dtype), difference.sigmoid_().unsqueeze(-1))
    log_sum_exp.copy_(torch.logaddexp(log_sum_exp, part_log_sum_exp))
