"""Statistics of attention straight from queries and keys; the pattern is never held whole.

P is the causal pattern softmax_{i ≤ t}(scale q_t·k_i + b(t - i)) of a head, t a query and i a key.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.linalg import vecdot
from torch.nn import functional as F

from probe.attention.streaming import fused
from probe.attention.streaming.template import StreamTemplate, log_normaliser
from probe.errors import ProbeError, unknown_name
from probe.limits import current
from probe.shown import Shown

PATHS = ("auto", "fused", "blocks")

# Scores that may be larger than this, in nats, are made in float64. Float32 rounds them by 6e-8 of their size, and the
# fused path rounds ln Z and the mean score apart from one another: its entropy is off by some 1e-7 of that size.
LARGEST_IN_FLOAT32 = 500.0


@dataclass(frozen=True)
class Divergence:
    """How far each row of a pattern P is from the same row of a template T, in nats."""

    kl: Float[Tensor, "... head query"]  #: KL(P‖T), in [0, ∞)
    reverse_kl: Float[Tensor, "... head query"]  #: KL(T‖P), in [0, ∞)
    jensen_shannon: Float[Tensor, "... head query"] | None = None  #: in [0, ln 2]; where it was asked for

    @property
    def symmetric_kl(self) -> Float[Tensor, "... head query"]:
        """KL(P‖T) + KL(T‖P), not halved, as ``distances.symmetric_kl``."""
        return self.kl + self.reverse_kl


@dataclass(frozen=True)
class StreamedAttention(Shown):
    """What is known of every row of a causal pattern, without the pattern."""

    log_normaliser: Float[Tensor, "... head query"]  #: ln Σ_i exp of the scores
    entropy: Float[Tensor, "... head query"]  #: in nats, in [0, ln n] for the n keys that are seen
    mean_distance: Float[Tensor, "... head query"]  #: Σ_i p_i (t - i), in tokens, in [0, t]
    first: Float[Tensor, "... head query"]  #: the mass on key 0
    previous: Float[Tensor, "... head query"]  #: the mass on key t - 1, 0 where there is none
    self_: Float[Tensor, "... head query"]  #: the mass on key t
    divergence: dict[str, Divergence] = field(default_factory=dict)  #: by template
    histogram: Float[Tensor, "... head distance"] | None = None  #: mean over rows of the mass by distance; sums to 1


@torch.no_grad()
def stream_attention(
    q: Float[Tensor, "head query d_head"],
    k: Float[Tensor, "kv_head key d_head"],
    *,
    scale: float,
    bias: Float[Tensor, "head distance"] | None = None,
    window: int | None = None,
    templates: Mapping[str, StreamTemplate] | None = None,
    histogram: bool = False,
    jensen_shannon: bool = False,
    path: str = "auto",
) -> StreamedAttention:
    """Statistics of every row of softmax(scale q_t·k_i + bias[t - i]), t - window < i ≤ t, of one sequence.

    Two paths give the same numbers, within 1e-4 of float64 (absolute, or relative above 1). "fused" costs little more
    than one fused attention, but it knows no bias, no window, no histogram and no Jensen-Shannon divergence, and only
    templates that are a line from some distance on (ALiBi, T5). "blocks" makes the pattern some rows at a time and
    knows everything. Memory: O(query). Half precision is read as float32. Float64 goes by blocks, and so do scores that
    may be above ``LARGEST_IN_FLOAT32``, which are made in float64.

    Args:
        q, k: as they enter the scores, after any rotation; each key head serves head / kv_head query heads.
        scale: what q·k is multiplied with, usually d_head^-1/2.
        bias: what is added to the scores at each distance 0, 1, …, in nats.
        window: how many keys a query sees at most, its own included; all up to its own where None. Templates, too, are
            of the keys that are seen.
        templates: what to compare with, by name.
        histogram: whether to collect the mass by distance.
        jensen_shannon: whether to take that divergence from the templates, too.
        path: "fused", "blocks", or "auto": fused where it can.

    Raises:
        ProbeError: for shapes that do not fit, NaN or infinity, or a path that cannot do what is asked.
    """
    templates = templates or {}
    _check(q, k, scale, bias, templates, path)
    if window is not None and window < 1:
        raise ProbeError(f"window must be at least 1, got {window}")
    dtype = torch.promote_types(q.dtype, torch.float32)
    of_scores = score_dtype(q, k, scale, bias)
    q, k = q.to(of_scores), k.to(of_scores)
    needs_blocks = (
        q.dtype == torch.float64
        or q.device.type not in ("cpu", "cuda")
        or bias is not None
        or (window is not None and window < q.shape[1])
        or histogram
        or jensen_shannon
        or not all(fused.can_fuse(template) for template in templates.values())
    )
    if needs_blocks and path == "fused":
        raise ProbeError(
            "the fused path knows no float64, bias, window, histogram, Jensen-Shannon or template without a tail, nor "
            f"scores that may be above {LARGEST_IN_FLOAT32:g} nats: use 'blocks'"
        )
    if needs_blocks or path == "blocks":
        return _by_blocks(q, k, scale, bias, window or q.shape[1], templates, histogram, jensen_shannon, dtype)
    return _by_fused_attention(q, k, scale, templates)


def score_dtype(
    q: Float[Tensor, "head query d_head"],
    k: Float[Tensor, "kv_head key d_head"],
    scale: float,
    bias: Float[Tensor, "head distance"] | None,
) -> torch.dtype:
    """The dtype in which scores are made: float32 or better, float64 where one may exceed ``LARGEST_IN_FLOAT32``.

    |scale q·k| is at most |scale| ‖q‖ ‖k‖ (Cauchy & Schwarz), and of a bias what is highest so far has the mass.
    """
    if q.dtype == torch.float64 or q.device.type == "mps":  # which has no float64
        return torch.promote_types(q.dtype, torch.float32)
    of_queries, of_keys = (x.float().norm(dim=-1).amax(-1) for x in (q, k))
    largest = abs(scale) * (of_queries.view(len(k), -1) * of_keys[:, None]).max()
    if bias is not None:
        largest = largest + bias.cummax(-1).values.abs().max()
    return torch.float64 if largest > LARGEST_IN_FLOAT32 else torch.float32


def _by_fused_attention(
    q: Tensor, k: Tensor, scale: float, templates: Mapping[str, StreamTemplate]
) -> StreamedAttention:
    n_heads, n, _ = q.shape
    q = q.view(len(k), -1, *q.shape[1:])
    log_z, score, distance = fused.means(q, k, scale)
    to = k[:, None]
    first = (q @ to[:, :, 0, :, None]).squeeze(-1)
    previous = F.pad(fused.dot(q[:, :, 1:], to[:, :, :-1]), (1, 0), value=-math.inf)
    own = fused.dot(q, to)
    divergence = {
        name: fused.divergences(q, k, scale, log_z, score, distance, template) for name, template in templates.items()
    }

    def heads(x: Tensor) -> Tensor:
        return x.reshape(n_heads, n)

    def mass(products: Tensor) -> Tensor:
        return heads((scale * products - log_z).exp().clamp(max=1))

    return StreamedAttention(
        log_normaliser=heads(log_z),
        entropy=heads(log_z - score).clamp(min=0),
        mean_distance=heads(distance),
        first=mass(first),
        previous=mass(previous),
        self_=mass(own),
        divergence={name: Divergence(*(heads(kl) for kl in both)) for name, both in divergence.items()},
    )


def _by_blocks(
    q: Tensor,
    k: Tensor,
    scale: float,
    bias: Tensor | None,
    window: int,
    templates: Mapping[str, StreamTemplate],
    histogram: bool,
    jensen_shannon: bool,
    dtype: torch.dtype,
) -> StreamedAttention:
    n_heads, n, d_head = q.shape
    biases = {name: template.bias(n).to(q.device) for name, template in templates.items()}
    kinds = ("kl", "reverse_kl", "jensen_shannon") if jensen_shannon else ("kl", "reverse_kl")
    divergence = {name: Divergence(*(torch.empty_like(q[..., 0], dtype=dtype) for _ in kinds)) for name in templates}
    names = ("log_normaliser", "entropy", "mean_distance", "first", "previous", "self_")
    rows = {name: torch.empty_like(q[..., 0], dtype=dtype) for name in names}
    total = torch.zeros(n_heads, n, dtype=torch.float64, device=q.device) if histogram else None
    q = q.view(len(k), -1, n, d_head)
    most = current().pattern_rows
    step = min(max(1, current().pattern_block // (n_heads * min(n, window + most))), most)
    # The widest block goes first, so that all later ones find room in what it leaves; growing ones would find none.
    for start in range((n - 1) // step * step, -1, -step):
        end = min(start + step, n)
        seen = slice(max(0, start - window + 1), end)  # the keys that some row of the block sees
        scores = q[:, :, start:end].reshape(len(k), -1, d_head) @ k[:, seen].transpose(1, 2)
        scores = scores.view(n_heads, end - start, -1).mul_(scale)
        if bias is not None:
            scores += _by_query(bias[:, : scores.shape[-1]].to(scores), end - start)
        here = (..., slice(start, end))
        query = torch.arange(start, end, device=q.device)
        key = torch.arange(seen.start, end, device=q.device)
        masked, hidden = _hidden(query, key, window)
        scores[masked].masked_fill_(hidden, -math.inf)
        highest = scores.amax(-1, keepdim=True)
        p = _exp(scores.sub_(highest))
        p[masked].masked_fill_(hidden, 0.0)
        z = p.sum(-1, keepdim=True)
        p /= z
        log_p = scores.sub_(z.log())
        log_p[masked].masked_fill_(hidden, 0.0)

        back = start - key
        rows["log_normaliser"][here] = (highest + z.log()).squeeze(-1)
        rows["entropy"][here] = -vecdot(p, log_p)
        # Divided by its own sum: rounding leaves one that is off by about eps · score, times the length of a block.
        mass, moment = (p @ torch.stack((torch.ones_like(back), back), dim=-1).to(p)).unbind(-1)
        rows["mean_distance"][here] = moment / mass + (query - start)
        rows["first"][here] = p[..., 0] if seen.start == 0 else 0.0
        before = (query - 1 - seen.start).clamp(min=0)[:, None].expand(n_heads, -1, 1)
        rows["previous"][here] = p.gather(-1, before).squeeze(-1) * ((query > 0) & (window > 1))
        rows["self_"][here] = p[..., start - seen.start :].diagonal(dim1=-2, dim2=-1)
        if total is not None:
            total[:, : p.shape[-1]] += _mass_by_distance(p)
        for name, b in biases.items():
            log_z = log_normaliser(b[:, : min(end, window)])[:, query.clamp(max=window - 1)]
            for kind, values in zip(kinds, _compare(p, log_p, b, log_z, masked, hidden, jensen_shannon), strict=True):
                getattr(divergence[name], kind)[here] = values
    rows["mean_distance"].clamp_(min=0)
    return StreamedAttention(**rows, divergence=divergence, histogram=None if total is None else (total / n).to(dtype))


def _hidden(query: Tensor, key: Tensor, window: int) -> tuple[tuple[Any, ...], Tensor]:
    """The part of a block's rows and keys in which some keys are hidden, as an index, and which of them are."""
    masked: tuple[Any, ...] = (...,)
    if len(key) <= window:  # no key is too far for any row: only those of the block's own rows can be hidden
        masked, key = (..., slice(len(key) - len(query), None)), query
    distance = query[:, None] - key
    return masked, (distance < 0) | (distance >= window)


def _compare(
    p: Tensor, log_p: Tensor, bias: Tensor, log_z: Tensor, masked: tuple[Any, ...], hidden: Tensor, jensen_shannon: bool
) -> list[Float[Tensor, "head row"]]:
    """The divergences of rows of P from those of the template of a bias (float64, by distance) of that normaliser."""
    n_rows, n_keys = p.shape[-2:]
    # Rows of a block have nearly the same normaliser: taken off in float64, what is left for float32 is small wherever
    # the template has any mass.
    log_t = _by_query((bias[:, :n_keys] - log_z[:, :1]).to(p), n_rows)
    log_t -= (log_z - log_z[:, :1]).to(p)[..., None]
    t = _exp(log_t)
    t[masked].masked_fill_(hidden, 0.0)
    difference = torch.sub(log_p, log_t, out=log_t)
    values = [vecdot(p, difference), -vecdot(t, difference)]
    if jensen_shannon:
        # ln(p/m) = ln 2 - softplus(ln t - ln p) with m = (p + t)/2, and for t likewise: finite where one of them is 0.
        shared = vecdot(p, F.softplus(-difference)) + vecdot(t, F.softplus(difference))
        values.append(math.log(2) - shared / 2)
    return [value.clamp(min=0) for value in values]


def _by_query(table: Float[Tensor, "head distance"], n_rows: int) -> Float[Tensor, "head row key"]:
    """The last rows of the matrix whose row t holds table[t - i] at key i ≤ t, zeros after that."""
    windows = F.pad(table.flip(-1), (0, n_rows - 1)).unfold(-1, table.shape[-1], 1)
    return windows[:, torch.arange(n_rows - 1, -1, -1, device=table.device)]  # flip would leave keys apart in memory


def _exp(x: Tensor) -> Tensor:
    """exp x, or 1e-26 where it would be less: no mass to speak of, and processors are slow at denormal numbers."""
    return x.clamp(min=-60.0).exp_()


def _mass_by_distance(p: Float[Tensor, "head row key"]) -> Float[Tensor, "head distance"]:
    """The sum over rows of the mass at each distance; the last row is the query that sees all keys.

    Behind n_rows - 1 zeros, and with strides by which each row starts one entry later than the one before, keys of
    equal distance stand in one column, the furthest one in the first.
    """
    n_heads, n_rows, n_keys = p.shape
    padded = F.pad(p, (n_rows - 1, 0))
    width = padded.shape[-1]
    skewed = padded.as_strided((n_heads, n_rows, n_keys), (n_rows * width, width + 1, 1))
    return skewed.sum(-2).flip(-1)


def _check(
    q: Tensor, k: Tensor, scale: float, bias: Tensor | None, templates: Mapping[str, StreamTemplate], path: str
) -> None:
    if path not in PATHS:
        raise unknown_name("path", path, PATHS)
    if q.ndim != 3 or k.ndim != 3 or q.shape[1:] != k.shape[1:] or 0 in q.shape or 0 in k.shape:
        raise ProbeError(
            "q and k must be of shape (head, query, d_head) and (kv_head, query, d_head), as many queries as keys, "
            f"got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if len(q) % len(k):
        raise ProbeError(f"the number of heads ({len(q)}) must be divisible by that of kv_heads ({len(k)})")
    if not q.is_floating_point() or q.dtype != k.dtype:
        raise ProbeError(f"q and k must hold floats of one dtype, got {q.dtype} and {k.dtype}")
    if not math.isfinite(scale):
        raise ProbeError(f"scale must be finite, got {scale}")
    for name, x in (("q", q), ("k", k), ("bias", bias)):
        # A sum is cheap, and NaN or infinite wherever one of its terms is.
        if x is not None and not x.sum(dtype=torch.float32).isfinite() and not x.isfinite().all():
            raise ProbeError(f"{name} must be finite, got NaN or infinity")
    if bias is not None and bias.shape != q.shape[:2]:
        raise ProbeError(f"bias must be of shape {tuple(q.shape[:2])} (head, distance), got {tuple(bias.shape)}")
    for name, template in templates.items():
        if template.n_heads != len(q):
            raise ProbeError(f"template {name!r} must be one for {len(q)} heads, got one for {template.n_heads}")
