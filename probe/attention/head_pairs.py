"""The distance of every head of one model from every head of another.

It is ``pattern_distance`` for all pairs, by formulas that do a head's work once and not once for every pair: two matrix
products give all symmetric Kullback-Leibler divergences, and of a pair's Jensen-Shannon divergence only the entropy of
the mixture is its own. To add a distance that sums over entries give: add it to ``FORMULAS``; all others are taken pair
by pair.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from probe.attention.distances import DISTANCES, FLOOR, check_takes_sink, ln, pattern_distance, with_sink
from probe.errors import unknown_name
from probe.limits import current
from probe.sequences import checked_lengths

# Of the rows of a sequence, one after the other: the keys that they see.
EntriesA = Float64[Tensor, "head_a entry"]
EntriesB = Float64[Tensor, "head_b entry"]
Sums = Float64[Tensor, "head_a head_b"]

# Differences of large sums leave some 1e-14 of rounding. A pair that is closer than this is taken anew, entry by entry,
# so that equal heads are at 0 and small distances keep their digits.
NEAR = 1e-6


def head_pair_distances(
    a: Float[Tensor, "batch head_a query key"],
    b: Float[Tensor, "batch head_b query key"],
    distance: str = "jensen_shannon",
    lengths: Int[Tensor, "batch"] | None = None,
    *,
    sink: bool = False,
) -> Float64[Tensor, "batch head_a head_b"]:
    """D(P_h, Q_h′) of each sequence and each two heads: ``pattern_distance`` to 1e-12. Unit and range are its own.

    Args:
        a, b: causal patterns on the same sequences (see ``check_pattern``; keys after the query are not read).
        distance: a name in ``DISTANCES``.
        lengths: the number of rows of each sequence that count; all of them by default.
        sink: whether the heads have a learned sink. It then counts as one more key; its weight is 1 less a row's sum.

    Raises:
        ProbeError: as ``pattern_distance``.
    """
    if distance not in DISTANCES:
        raise unknown_name("distance", distance, DISTANCES)
    if sink:
        check_takes_sink(distance)
    lengths = checked_lengths(lengths, len(a), a.shape[-1])
    if distance not in FORMULAS:
        return torch.stack(
            [pattern_distance(head, b, distance, lengths, sink=sink) for head in a.split(1, dim=1)], dim=1
        )
    sequences = zip(a, b, lengths.tolist(), strict=True)
    values = torch.stack([_of_sequence(*of, FORMULAS[distance], sink) for of in sequences])
    for h, k in (values < NEAR).any(0).nonzero().tolist():
        values[:, h, k] = pattern_distance(a[:, h : h + 1], b[:, k : k + 1], distance, lengths, sink=sink)[:, 0]
    return values


def _of_sequence(
    p: Float[Tensor, "head_a query key"],
    q: Float[Tensor, "head_b query key"],
    length: int,
    formula: Callable[[EntriesA, EntriesB], Sums],
    sink: bool,
) -> Sums:
    """The mean over the rows, taken as the sum over a block of entries at a time."""
    row, key = torch.tril_indices(length, length)
    if sink:  # the last key of every row
        p, q = with_sink(p.double()), with_sink(q.double())
        row = torch.cat((row, torch.arange(length)))
        key = torch.cat((key, torch.full((length,), p.shape[-1] - 1)))
    seen, p_flat, q_flat = row * p.shape[-1] + key, p.flatten(1), q.flatten(1)
    sums = torch.zeros(len(p), len(q), dtype=torch.float64)
    for entries in seen.split(max(1, current().head_pair_block // max(len(p), len(q)))):
        p_block, q_block = (x.gather(1, entries.expand(len(x), -1)).double() for x in (p_flat, q_flat))
        sums += formula(p_block, q_block)
    return sums / length


def _symmetric_kl(p: EntriesA, q: EntriesB) -> Sums:
    """Σ (p - q)(ln p - ln q) = Σ p ln p + Σ q ln q - Σ p ln q - Σ q ln p; +inf where exactly one of a pair is 0."""
    ln_p, ln_q = ln(p), ln(q)
    has_zeros = bool(torch.minimum(p.amin(), q.amin()) == 0)
    if has_zeros:  # 0 ln 0 = 0; a pair with one zero is infinite whatever stands here
        ln_p, ln_q = ln_p.where(p > 0, 0.0), ln_q.where(q > 0, 0.0)
    own_p, own_q = torch.linalg.vecdot(p, ln_p), torch.linalg.vecdot(q, ln_q)
    sums = own_p[:, None] + own_q - p @ ln_q.T - ln_p @ q.T
    if has_zeros:
        zero_p, zero_q = (p == 0).double(), (q == 0).double()
        one_sided = zero_p @ (1 - zero_q).T + (1 - zero_p) @ zero_q.T
        sums = sums.masked_fill(one_sided > 0, math.inf)
    return sums


def _jensen_shannon(p: EntriesA, q: EntriesB) -> Sums:
    """½ Σ p ln p + ½ Σ q ln q - Σ m ln m, with m = (p + q)/2. Memory grows with the heads, not with their pairs."""
    p, q = p.clamp(min=FLOOR), q.clamp(min=FLOOR)
    own_p, own_q = ln(p).mul_(p).sum(-1) / 2, ln(q).mul_(q).sum(-1) / 2
    p, q = p.div_(2), q.div_(2)
    m, m_ln_m, mixed = torch.empty_like(q), torch.empty_like(q), p.new_empty(len(p), len(q))
    for head, sums in zip(p, mixed, strict=True):
        torch.add(q, head, out=m)
        ln(m, out=m_ln_m)
        torch.sum(m_ln_m.mul_(m), dim=-1, out=sums)
    return own_p[:, None] + own_q - mixed


def _mcgill_compat(p: EntriesA, q: EntriesB) -> Sums:
    """By the identity between the released distance and the true one, see ``distances.mcgill_compat``."""
    return _symmetric_kl(p, q) / 4 - _jensen_shannon(p, q)


FORMULAS: dict[str, Callable[[EntriesA, EntriesB], Sums]] = {
    "jensen_shannon": _jensen_shannon,
    "symmetric_kl": _symmetric_kl,
    "mcgill_compat": _mcgill_compat,
}
