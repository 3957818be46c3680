"""Distances between attention patterns: of two rows (``DISTANCES``), and of two patterns (``pattern_distance``).

A row is a distribution over keys: what one query attends to. All distances are taken in float64, with the natural
logarithm. To add one: write the function, add it to ``DISTANCES``.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor
from torch.special import xlogy

from probe.errors import ProbeError, unknown_name
from probe.limits import current
from probe.sequences import checked_lengths, valid_rows

Rows = Float[Tensor, "... key"]
Distance = Callable[[Tensor, Tensor], Tensor]

FLOOR = 1e-300  # stands for 0 in x ln x, which is then -7e-298; smaller numbers would make the logarithm slow


def jensen_shannon(p: Rows, q: Rows) -> Float64[Tensor, "..."]:
    """Jensen-Shannon divergence, H(M) - (H(P) + H(Q))/2 with M = (P + Q)/2 and H the entropy.

    In nats, in [0, ln 2]: 0 for equal rows only, ln 2 for rows that share no key. Its square root is a metric. Exact to
    about 1e-15; what rounding leaves below 0 is 0. Lin 1991, Eq. 4.1 with equal weights; Kazemnejad et al. 2023, §5.2.
    """
    p, q = p.double(), q.double()
    own = (_x_ln_x(p).sum(-1) + _x_ln_x(q).sum(-1)) / 2
    return (own - _x_ln_x((p + q) / 2).sum(-1)).clamp(min=0)


def _x_ln_x(x: Rows) -> Rows:
    """x ln x, exactly 0 where x is 0; a tenth of the time of ``torch.special.entr``."""
    return ln(x.clamp(min=FLOOR)).mul_(x)


def ln(x: Float64[Tensor, "..."], out: Tensor | None = None) -> Float64[Tensor, "..."]:
    """The logarithm of numbers from 0 on, into ``out`` where it is given. To one unit in the last place, either way:
    numpy's own for AVX-512 takes a third of the time of torch's; without AVX-512 numpy takes one number at a time."""
    if x.device.type == "cpu" and not x.requires_grad and torch.backends.cpu.get_cpu_capability() == "AVX512":
        out = torch.empty_like(x) if out is None else out
        with np.errstate(divide="ignore"):  # of 0: -inf, as torch has it
            np.log(x.numpy(), out=out.numpy())
        return out
    return torch.log(x, out=out)


def symmetric_kl(p: Rows, q: Rows) -> Float64[Tensor, "..."]:
    """Jeffreys' divergence KL(P‖Q) + KL(Q‖P) = Σ (p - q)(ln p - ln q), not halved.

    In nats, in [0, ∞]: +inf where one row has a key that the other gives exactly 0. Jeffreys 1946; Kullback &
    Leibler 1951, section 2.
    """
    p, q = p.double(), q.double()
    # Never NaN: where both are 0 the difference is 0 and so are both terms; where one is 0 just one term is infinite.
    return (xlogy(p - q, p) - xlogy(p - q, q)).sum(-1)


def total_variation(p: Rows, q: Rows) -> Float64[Tensor, "..."]:
    """½ Σ |p - q|: the attention mass that would have to be moved. A metric, without unit, in [0, 1]."""
    return (p.double() - q.double()).abs().sum(-1) / 2


def hellinger(p: Rows, q: Rows) -> Float64[Tensor, "..."]:
    """(½ Σ (√p - √q)²)^½, a metric, without unit, in [0, 1]: 1 for rows that share no key."""
    return (p.double().sqrt() - q.double().sqrt()).square().sum(-1).div(2).sqrt()


def wasserstein(p: Rows, q: Rows) -> Float64[Tensor, "..."]:
    """Earth mover's distance W₁ over key positions, Σ_i |Σ_{j ≤ i} (p_j - q_j)|.

    How far the attention mass has to be carried, on average. A metric, in tokens, in [0, key - 1].
    """
    # The last sum is left out: it is 0 for rows of equal sum, and rounding otherwise.
    return (p.double() - q.double()).cumsum(-1)[..., :-1].abs().sum(-1)


def mcgill_compat(p: Rows, q: Rows) -> Float64[Tensor, "..."]:
    """½ (KL(M‖P) + KL(M‖Q)) with M = (P + Q)/2: what the released code of Kazemnejad et al. 2023 calls JSD.

    The code hands its arguments to ``torch.nn.KLDivLoss`` in the wrong order, which turns both divergences round. It is
    no Jensen-Shannon divergence: it is unbounded, in [0, ∞] nats, +inf where one row has a key that the other gives
    exactly 0. The true one follows from the two published numbers,
    ``jensen_shannon = symmetric_kl / 4 - mcgill_compat``; (4.311374, 0.843930) gives 0.2339.
    """
    p, q = p.double(), q.double()
    m = (p + q) / 2
    return (xlogy(m, m) - (xlogy(m, p) + xlogy(m, q)) / 2).sum(-1)


def pattern_distance(
    p: Float[Tensor, "#batch #head query key"],
    q: Float[Tensor, "#batch #head query key"],
    distance: str = "jensen_shannon",
    lengths: Int[Tensor, "batch"] | None = None,
    *,
    sink: bool = False,
) -> Float64[Tensor, "batch head"]:
    """D(P, Q) = (1/T) Σ_t d(P_t, Q_t): the mean over a sequence's T query rows of the distance between two rows.

    Unit and range are those of the distance. Kazemnejad et al. 2023, §5.2.

    Args:
        p, q: causal patterns (see ``check_pattern``; keys after the query are not read). Batch and head broadcast.
        distance: a name in ``DISTANCES``.
        lengths: T of each sequence; rows beyond it do not count. All rows by default.
        sink: whether the heads have a learned sink. It then counts as one more key; its weight is 1 less a row's sum.

    Raises:
        ProbeError: for an unknown distance, lengths that do not fit, or a sink with a distance that needs to know where
            each key stands.
    """
    if distance not in DISTANCES:
        raise unknown_name("distance", distance, DISTANCES)
    if sink:
        check_takes_sink(distance)
    n_query = p.shape[-2]
    if lengths is not None:
        lengths = checked_lengths(lengths, max(len(p), len(q)), n_query)
    n_patterns = math.prod(torch.broadcast_shapes(p.shape[:2], q.shape[:2]))
    block = max(1, current().distance_block // max(1, n_patterns * n_query))
    compare, rows = DISTANCES[distance], []
    for start in range(0, n_query, block):
        end = start + block  # rows before it see no key beyond it: in all, half of the work
        blocks = (p[..., start:end, :end], q[..., start:end, :end])
        rows.append(compare(*map(with_sink, blocks)) if sink else compare(*blocks))
    by_row = torch.cat(rows, dim=-1)
    if lengths is None:
        return by_row.mean(-1)
    return by_row.where(valid_rows(lengths, n_query)[:, None], 0.0).sum(-1) / lengths[:, None]


def with_sink(rows: Rows) -> Float[Tensor, "... key_or_sink"]:
    """Rows with one more key, the last, that takes what they lack of 1: the share of a learned sink."""
    return torch.cat((rows, (1 - rows.sum(-1, keepdim=True)).clamp(min=0)), -1)


def check_takes_sink(distance: str) -> None:
    """Refuse a distance that needs to know where each key stands.

    Raises:
        ProbeError: for Wasserstein's.
    """
    if distance == "wasserstein":
        raise ProbeError(
            "the distance 'wasserstein' needs a position for every key, but the learned sink of this layer has none; "
            f"use one of {', '.join(name for name in sorted(DISTANCES) if name != distance)}"
        )


def check_pattern(
    pattern: Tensor, lengths: Tensor | None = None, tolerance: float | None = None, *, sink: bool = False
) -> None:
    """Refuse what is no causal attention pattern after the softmax.

    Args:
        pattern: floats of shape "batch head query key", with as many queries as keys.
        lengths: the number of rows of each sequence that count, "batch"; the others may hold anything, NaN too.
        tolerance: how far a row's sum may be from 1; by default the square root of the dtype's machine epsilon
            (3.5e-4 in float32, 0.09 in bfloat16).
        sink: whether rows may sum to less than 1, because a learned sink takes the rest.

    Raises:
        ProbeError: for a wrong shape, lengths that do not fit, a weight that is negative or NaN, any weight on a key
            after its query, or a row that does not sum to 1; it names batch, head and row.
    """
    if pattern.ndim != 4 or not pattern.is_floating_point() or 0 in pattern.shape or len({*pattern.shape[2:]}) != 1:
        raise ProbeError(
            "a pattern must hold floats of shape (batch, head, query, key) with as many queries as keys, "
            f"got {pattern.dtype} {tuple(pattern.shape)}"
        )
    n_batch, _, n_query, _ = pattern.shape
    lengths = checked_lengths(lengths, n_batch, n_query).to(pattern.device)
    if tolerance is None:
        tolerance = torch.finfo(pattern.dtype).eps ** 0.5
    valid = valid_rows(lengths, n_query)[:, None]

    lowest = pattern.amin(-1)  # NaN where the row holds a NaN
    _refuse(valid & ~(lowest >= 0), "weights >= 0", "has", lowest)
    future = pattern.triu(1).amax(-1)
    _refuse(valid & (future > 0), "no weight on keys after the query", "has", future)
    total = pattern.sum(-1, dtype=torch.float64)
    if sink:
        _refuse(
            valid & ~(total <= 1 + tolerance), f"rows that sum to at most 1 (within {tolerance:.1e})", "sums to", total
        )
        return
    _refuse(valid & ~((total - 1).abs() <= tolerance), f"rows that sum to 1 (within {tolerance:.1e})", "sums to", total)


def _refuse(
    bad: Bool[Tensor, "batch head query"], wanted: str, verb: str, got: Float[Tensor, "batch head query"]
) -> None:
    if bad.any():
        batch, head, row = bad.nonzero()[0].tolist()
        value = f"{float(got[batch, head, row]):.6g}"
        raise ProbeError(f"a pattern wants {wanted}, but batch {batch}, head {head}, row {row} {verb} {value}")


#: Distances between two rows of attention by name: functions of rows "... key" to numbers "...".
DISTANCES: dict[str, Distance] = {
    "jensen_shannon": jensen_shannon,
    "symmetric_kl": symmetric_kl,
    "total_variation": total_variation,
    "hellinger": hellinger,
    "wasserstein": wasserstein,
    "mcgill_compat": mcgill_compat,
}
