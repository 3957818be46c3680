"""Sums of scores over each key, each query and each distance, without ever holding what is summed.

Least squares of the additive model s(t, i) ≈ key_i + query_t + distance_{t-i} (``design``) asks for nothing else of the
scores, but the sum of their squares, for the variance. In a layer that hides keys, only the cells that are seen count:
those of the nearest keys of each query. Where scores are scale · q·k + b(t - i), all of these follow from q and k in
O(T log T): sums over keys and queries are cumulative sums, sums over distances a correlation, sums of squares a running
Gram matrix. So the model is fitted exactly at lengths at which no T × T matrix fits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from probe.attention.distance_family import by_distance
from probe.errors import ProbeError
from probe.limits import current
from probe.sequences import valid_rows

PARTS = ("key", "query", "distance")


@dataclass(frozen=True)
class ScoreSums:
    """Sums of scores over the cells of each sequence that are seen: i ≤ t, or t - window < i ≤ t.

    ``sums[..., p, j]`` is the sum over the cells whose key (p = 0), query (1) or distance (2) is j; ``squares`` the sum
    of squares over all of them; ``window`` the number of keys that a query sees at most, None where it sees all.
    """

    sums: Float64[Tensor, "sequence head part=3 position"]
    squares: Float64[Tensor, "sequence head"]
    window: int | None = None

    @classmethod
    def of_scores(
        cls, scores: Float[Tensor, "sequence head query key"], lengths: Int[Tensor, "sequence"]
    ) -> "ScoreSums":
        """Those of scores that are held, 0 where a key is hidden; rows beyond a sequence's length, and keys after the
        query, do not count."""
        valid = valid_rows(lengths, scores.shape[-1])[:, None, :, None]
        scores = scores.double().tril().where(valid, 0.0)
        sums = torch.stack((scores.sum(-2), scores.sum(-1), by_distance(scores).sum(-2)), dim=-2)
        return cls(sums, scores.square().sum((-2, -1)))

    @classmethod
    def of_queries_and_keys(
        cls,
        q: Float[Tensor, "head query d_head"],
        k: Float[Tensor, "kv_head query d_head"],
        scale: float,
        bias: Float[Tensor, "head distance"] | None = None,
        window: int | None = None,
    ) -> "ScoreSums":
        """Those of one sequence's scale · q_t·k_i + b(t - i), which is never held: O(T log T) time, O(T) memory.

        Args:
            q, k: queries and keys of one sequence as they enter the scores.
            scale: what q·k is multiplied with.
            bias: b by distance, in nats; none where None.
            window: how many keys a query sees at most, its own included; all up to its own where None.

        Raises:
            ProbeError: for shapes that do not fit, or values that are not finite.
        """
        _check_queries_and_keys(q, k, bias)
        group, n = len(q) // len(k), q.shape[1]
        width = n if window is None else min(window, n)
        heads = [_of_head(q[h].double() * scale, k[h // group].double(), width) for h in range(len(q))]
        sums = torch.stack([s for s, _ in heads])
        squares = torch.stack([s for _, s in heads])
        if bias is not None:
            b = bias[:, :n].to(sums)
            b = b.where(torch.arange(n, device=b.device) < width, 0.0)
            seen = torch.arange(n, 0, -1, device=b.device)  # T - d: how many cells have the distance d
            squares = squares + 2 * (sums[:, PARTS.index("distance")] * b).sum(-1) + (b.square() * seen).sum(-1)
            cumulative = b.cumsum(-1)  # beyond the window b is 0, so that this stays what it is at the window's end
            sums = sums + torch.stack((cumulative.flip(-1), cumulative, b * seen), dim=-2)
        return cls(sums[None].cpu(), squares[None].cpu(), window)

    @classmethod
    def together(cls, parts: Sequence["ScoreSums"]) -> "ScoreSums":
        """Those of several sequences of one length and window."""
        sums, squares = torch.cat([part.sums for part in parts]), torch.cat([part.squares for part in parts])
        return cls(sums, squares, parts[0].window)


def _of_head(
    q: Float64[Tensor, "query d_head"], k: Float64[Tensor, "query d_head"], window: int
) -> tuple[Tensor, Tensor]:
    n, d = q.shape
    # A window's sum is a running sum less the one that stood a window before.
    queries, keys = q.flip(0).cumsum(0), k.cumsum(0)
    queries[window:] -= queries[:-window].clone()
    keys[window:] -= keys[:-window].clone()
    over_queries = (k * queries.flip(0)).sum(-1)
    over_keys = (q * keys).sum(-1)
    # Σ_t q_t·k_{t-d}, for all d at once: a correlation, one coordinate of the head at a time.
    spectrum = sum(torch.fft.rfft(q[:, j], 2 * n) * torch.fft.rfft(k[:, j], 2 * n).conj() for j in range(d))
    over_rows = torch.fft.irfft(spectrum, 2 * n)[:n].where(torch.arange(n, device=q.device) < window, 0.0)
    if window < n:
        return torch.stack((over_queries, over_keys, over_rows)), _squares_in_window(q, k, window)
    # Σ_{i ≤ t} (q_t·k_i)² = q_tᵀ (Σ_{i ≤ t} k_i k_iᵀ) q_t: the Gram matrix of the keys before a block, and the block.
    squares, gram, n_block = q.new_zeros(()), q.new_zeros(d, d), current().squares_block
    for start in range(0, n, n_block):
        queries, keys = q[start : start + n_block], k[start : start + n_block]
        squares = squares + ((queries @ gram) * queries).sum() + (queries @ keys.T).tril().square().sum()
        gram = gram + keys.T @ keys
    return torch.stack((over_queries, over_keys, over_rows)), squares


def _squares_in_window(q: Float64[Tensor, "query d_head"], k: Float64[Tensor, "query d_head"], window: int) -> Tensor:
    """The sum of squared scores over the cells of a sliding window, some queries at a time: O(T window)."""
    squares, n_block = q.new_zeros(()), current().squares_block
    for start in range(0, len(q), n_block):
        first = max(0, start - window + 1)
        scores = q[start : start + n_block] @ k[first : start + n_block].T
        distance = torch.arange(start, start + len(scores))[:, None] - torch.arange(first, first + scores.shape[1])
        seen = ((distance >= 0) & (distance < window)).to(q.device)
        squares = squares + scores.where(seen, 0.0).square().sum()
    return squares


def _check_queries_and_keys(q: Tensor, k: Tensor, bias: Tensor | None) -> None:
    if q.ndim != 3 or k.ndim != 3 or q.shape[1:] != k.shape[1:] or len(q) % len(k):
        raise ProbeError(
            "queries and keys must be (head, position, d_head), the keys' heads dividing the queries', got "
            f"{tuple(q.shape)} and {tuple(k.shape)}"
        )
    if not (q.isfinite().all() and k.isfinite().all()):
        raise ProbeError("queries and keys must be finite, got NaN or infinity")
    if bias is not None and (len(bias) != len(q) or bias.shape[1] < q.shape[1] or not bias.isfinite().all()):
        raise ProbeError(
            f"a bias by distance must be finite, {len(q)} heads × {q.shape[1]} distances or more, got "
            f"{tuple(bias.shape)}"
        )
