"""Attention as two batched products, for gradients in bfloat16 on a CPU with AMX.

    one kernel      PyTorch's attention; its gradient makes no use of matrix units
    two products    softmax(Q K' + mask) V of all rows and groups at once; query heads that share
                    keys and values are rows of one product

On a processor with AMX forward and backward take 0.4 to 0.6 of the time of PyTorch's attention in
float32 (8 rows of 70: 3.1 and 5.8 ms; 8 of 128: 6 and 13), which is itself several times as fast
there as in bfloat16. On processors with AVX512-BF16 alone nothing is gained. What is paid is
memory: the probabilities are kept for the gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backbone.upstream import cpu_has_amx

_MOST_BYTES = 2**23
"""Of the probabilities of a layer."""
_FEWEST_KEYS = 32
"""Softmax in bfloat16 takes four times as long over fewer."""


def products_serve(query: Tensor, key: Tensor) -> bool:
    """The two products are the faster way to a gradient.

    Args:
        query: ``(R, heads, S, width)``.
        key: ``(R, groups, T, width)``.
    """
    if query.device.type != "cpu" or query.dtype != torch.bfloat16:
        return False
    rows, heads, asking, _ = query.shape
    kept = rows * heads * asking * max(key.shape[2], _FEWEST_KEYS) * query.dtype.itemsize
    return kept <= _MOST_BYTES and cpu_has_amx()


def attention_in_products(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    scaling: float | None = None,
    causal: bool = False,
) -> Tensor:
    """Attention ``(R, S, heads, width of values)``, in the queries' format.

    A query that sees nothing, as padding does, gets a mean of all values, and so finite numbers.

    Args:
        query: ``(R, heads, S, width)``.
        key: ``(R, groups, T, width)``.
        value: ``(R, groups, T, width of values)``.
        mask: ``(R or 1, heads or 1, S, T)``: true where a key is seen, or what is added.
        scaling: of the products of queries and keys; by default one over the root of the width.
        causal: without a mask, the first query sees the first key, the second two, and so on.
    """
    rows, heads, asking, width = query.shape
    groups, keys = key.shape[1:3]
    scale = width**-0.5 if scaling is None else scaling
    queries = (query * scale).reshape(rows * groups, -1, width)
    # Scores round to bfloat16: without what all keys have in common, which softmax does not see,
    # they are small where biases make them large.
    key = key - key.detach().mean(2, keepdim=True)
    if mask is None:
        mask = query.new_ones(1, 1, asking, keys, dtype=torch.bool)
        mask = mask.tril() if causal else mask
    hidden = torch.finfo(query.dtype).min
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, hidden)
    else:  # the least number of another format is none here
        mask = mask.to(query.dtype).clamp(min=hidden)
    # A compiler would make a layer for fewer keys and one for more.
    if not torch.compiler.is_compiling() and (more := _FEWEST_KEYS - keys) > 0:
        key, value = F.pad(key, (0, 0, 0, more)), F.pad(value, (0, 0, 0, more))
        mask, keys = F.pad(mask, (0, more), value=hidden), _FEWEST_KEYS
    added = mask.expand(rows, heads, asking, keys)
    scores = torch.baddbmm(
        added.reshape(rows * groups, -1, keys), queries, _of_groups(key).transpose(1, 2)
    )
    seen = torch.bmm(scores.softmax(-1), _of_groups(value))
    return seen.view(rows, heads, asking, -1).transpose(1, 2).contiguous()


def _of_groups(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, *tensor.shape[2:])
