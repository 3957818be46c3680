"""Patterns in fewer cells: what a figure can show of a context of thousands of tokens."""

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from probe.attention.streaming.statistics import score_dtype
from probe.limits import current

BINS = 128  # of a pooled map on each side


def bin_starts(n: int, bins: int = BINS) -> Int[Tensor, "bin"]:
    """The first position of each bin: n positions in at most that many bins of equal size, give or take one."""
    bins = min(n, bins)
    return (torch.arange(bins) * n + bins - 1) // bins


def pool(pattern: Float[Tensor, "*stack query key"], bins: int = BINS) -> Float64[Tensor, "*stack query_bin key_bin"]:
    """Entry (a, b) is the mass that a query of bin a pays to all keys of bin b, the mean over the queries of the bin.
    Rows that sum to 1 go on doing so; with as many bins as positions nothing changes."""
    n = pattern.shape[-1]
    bins = min(n, bins)
    index = torch.arange(n, device=pattern.device) * bins // n
    # In float64: in bfloat16 a sum of ones ends at 256.
    by_key = pattern.new_zeros(*pattern.shape[:-1], bins, dtype=torch.float64).index_add_(-1, index, pattern.double())
    total = by_key.new_zeros(*by_key.shape[:-2], bins, bins).index_add_(-2, index, by_key)
    return total / torch.bincount(index, minlength=bins)[:, None]


def pool_rows(values: Float64[Tensor, "*stack query"], bins: int = BINS) -> Float64[Tensor, "*stack query_bin"]:
    """The mean over the queries of each bin."""
    n = values.shape[-1]
    bins = min(n, bins)
    index = torch.arange(n, device=values.device) * bins // n
    total = values.new_zeros(*values.shape[:-1], bins).index_add_(-1, index, values)
    return total / torch.bincount(index, minlength=bins)


def pooled_pattern(
    q: Float[Tensor, "head query d_head"],
    k: Float[Tensor, "kv_head query d_head"],
    scale: float,
    bias: Float[Tensor, "head distance"] | None = None,
    bins: int = BINS,
    window: int | None = None,
) -> Float64[Tensor, "head query_bin key_bin"]:
    """``pool`` of the pattern softmax(scale q_t·k_i + bias[t - i]) over the keys t - window < i ≤ t, some rows of it at
    a time: O(T) memory.

    Rows are made as ``stream_attention`` makes them: half precision is read as float32.
    """
    n_heads, n, d_head = q.shape
    of_scores = score_dtype(q, k, scale, bias)
    q, k = q.to(of_scores), k.to(of_scores)
    bins = min(n, bins)
    index = torch.arange(n, device=q.device) * bins // n
    total = torch.zeros(n_heads, bins, bins, dtype=torch.float64, device=q.device)
    step = max(1, current().pattern_block // (n_heads * n))
    # The widest block goes first, so that all later ones find room in what it leaves; growing ones would find none.
    for start in range((n - 1) // step * step, -1, -step):
        end = min(start + step, n)
        rows = q[:, start:end].reshape(len(k), -1, d_head) @ k[:, :end].transpose(1, 2)
        rows = rows.view(n_heads, end - start, end) * scale
        distance = torch.arange(start, end, device=q.device)[:, None] - torch.arange(end, device=q.device)
        if bias is not None:
            rows = rows + bias.to(rows)[:, distance.clamp(min=0)]
        rows = rows.masked_fill((distance < 0) | (distance >= (window or n)), -torch.inf).softmax(-1)
        by_key = rows.new_zeros(n_heads, end - start, bins).index_add_(-1, index[:end], rows)
        total.index_add_(1, index[start:end], by_key.double())
    return (total / torch.bincount(index, minlength=bins)[:, None]).cpu()
