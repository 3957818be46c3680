"""Statistics of attention at the price of one fused attention, for scores without a bias.

The fused kernel hands back ln Z_t = ln Σ_i exp s_ti and means under the pattern P of whatever is given as values. With
the keys themselves as values, E_P[s_t] = scale · q_t·E_P[k]; with positions, the attended distance. A template T whose
bias falls linearly from some distance on needs no pattern either: E_T[k] is a running mean, and the nearest distances
are a band. In float32 the results are usually within 1e-5 of float64 (relative, or absolute where they are below 1);
scores of a hundred nats bring 1e-4, since ln Z and E_P[s] are rounded apart from one another, at about eps · score.
"""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from probe.attention.streaming.template import StreamTemplate, log_normaliser, negative_entropy
from probe.limits import current

# A position is a stretch of keys and a place in it, so that the rounding of a mean position is that of a place.
_STRETCHES = 15  # at the least
_WIDTH = 8  # kernels are at their fastest where the width of a head is a multiple of it


def can_fuse(template: StreamTemplate) -> bool:
    """Whether the template is a line from some near distance on."""
    return template.slope is not None and template.near.shape[1] <= current().fused_band


def attend(
    q: Float[Tensor, "kv group query d"], k: Float[Tensor, "kv group query d"], scale: float
) -> tuple[Tensor, Tensor]:
    """E_P[k], "kv group query d", and ln Z, "kv group query", by one fused causal attention in float32."""
    if q.device.type == "cuda":
        mean, log_z, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            q, k, k, None, True, 0.0, True, scale=scale
        )
        return mean, log_z[..., : q.shape[2]].contiguous()  # the kernel pads its rows
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    mean, log_z = flash(q, k, k, dropout_p=0.0, is_causal=True, scale=scale)
    return mean, log_z.contiguous()


def means(
    q: Float[Tensor, "kv group query d_head"], k: Float[Tensor, "kv query d_head"], scale: float
) -> tuple[Float[Tensor, "kv group query"], Float[Tensor, "kv group query"], Float[Tensor, "kv group query"]]:
    """ln Z_t, the mean score E_P[s_t] and the attended distance E_P[t - i] of every row."""
    n, d_head = k.shape[1:]
    position = torch.arange(n, device=q.device)
    n_stretches = max(_STRETCHES, -(-n // current().fused_stretch))
    length = -(-n // n_stretches)
    place = (position % length - (length - 1) / 2)[:, None]
    stretch = torch.nn.functional.one_hot(position // length, n_stretches)
    extra = torch.cat((place, stretch), dim=-1).to(q)
    extra = torch.nn.functional.pad(extra, (0, -(d_head + extra.shape[1]) % _WIDTH))
    # The queries have zeros there, so what is added to the keys does not change the scores.
    keys = torch.cat((k, extra.expand(len(k), -1, -1)), dim=-1)
    queries = torch.cat((q, q.new_zeros(()).expand(*q.shape[:3], extra.shape[1])), dim=-1)
    mean, log_z = attend(queries, keys[:, None].expand(-1, q.shape[1], -1, -1), scale)
    score = scale * dot(q, mean[..., :d_head])
    mass = mean[..., d_head + 1 : d_head + 1 + n_stretches]
    centre = torch.arange(n_stretches, device=q.device) * length + (length - 1) / 2
    distance = dot(mass, (position[:, None] - centre).to(q)) - mean[..., d_head]
    return log_z, score, distance.clamp(min=0)


def divergences(
    q: Float[Tensor, "kv group query d_head"],
    k: Float[Tensor, "kv query d_head"],
    scale: float,
    log_z: Float[Tensor, "kv group query"],
    score: Float[Tensor, "kv group query"],
    distance: Float[Tensor, "kv group query"],
    template: StreamTemplate,
) -> tuple[Float[Tensor, "kv group query"], Float[Tensor, "kv group query"]]:
    """KL(P‖T) = E_P[ln P] - E_P[ln T] and KL(T‖P) = E_T[ln T] - E_T[ln P] of every row, in nats.

    With b(d) = line(d) + bend(d), the bend 0 from D on: E_P[b] = line(E_P[d]) + the band's Σ_{d < D} p_{t-d} bend(d).
    """
    n, reach = k.shape[1], template.near.shape[1]
    tail, slope = template.tail, template.slope
    assert tail is not None and slope is not None  # can_fuse
    bias = template.bias(n)
    template_log_z = log_normaliser(bias)

    def rows(x: Float64[Tensor, "head query"]) -> Tensor:
        return x.view(*q.shape[:2], -1).to(q)

    line = tail[:, None] + slope[:, None] * (reach - torch.arange(reach, dtype=torch.float64))
    start = (tail + slope * reach)[:, None]  # line(0)
    template_under_p = rows(start - template_log_z) - rows(slope[:, None]) * distance
    p_under_template = torch.zeros_like(log_z)
    if reach:
        bent, p_under_template = _band(q, k, scale, log_z, template, template.near - line, template_log_z)
        template_under_p += bent
    if n > reach:
        tail_log_z = log_normaliser(-slope[:, None] * torch.arange(n - reach))
        share = rows((tail[:, None] + tail_log_z - template_log_z[:, reach:]).exp())
        tail_score = scale * _running_mean_products(q[:, :, reach:], k[:, : n - reach], slope, tail_log_z)
        p_under_template[..., reach:] += share * (tail_score - log_z[..., reach:])
    forward = score - log_z - template_under_p
    backward = rows(negative_entropy(bias)) - p_under_template
    return forward.clamp(min=0), backward.clamp(min=0)


def dot(x: Float[Tensor, "... d"], y: Float[Tensor, "... d"]) -> Float[Tensor, "..."]:
    """Σ_d x_d y_d, without a tensor of the products."""
    return (x.unsqueeze(-2) @ y.unsqueeze(-1)).squeeze(-1).squeeze(-1)


def _running_mean_products(
    q: Float[Tensor, "kv group pos d_head"],
    k: Float[Tensor, "kv pos d_head"],
    slope: Float64[Tensor, "head"],
    log_z: Float64[Tensor, "head pos"],
) -> Float[Tensor, "kv group pos"]:
    """q_u · M_u with M_u = Σ_{i ≤ u} exp(-slope (u - i)) k_i / Z_u, the mean of the keys under the line.

    In blocks: with u0 the first row of a block, M_u = gain_u Σ_{u0 ≤ i ≤ u} w_{ui} k_i + keep_u M_{u0 - 1}. All three
    factors lie in [0, 1], whatever the sign of the slope.
    """
    n, n_block = k.shape[1], current().fused_block
    row = torch.arange(n_block, dtype=torch.float64)
    highest = (-slope[:, None] * row).clamp(min=0)  # of the exponents in a block's row
    exponent = -slope[:, None, None] * (row[:, None] - row) - highest[..., None]
    weight = exponent.exp().tril().view(*q.shape[:2], n_block, n_block).to(q)
    place = torch.arange(n) % n_block
    before = torch.nn.functional.pad(log_z, (1, 0), value=-torch.inf)[:, torch.arange(n) - place]
    gain = (highest[:, place] - log_z).exp().view(*q.shape[:2], n, 1).to(q)
    keep = (before - slope[:, None] * (place + 1) - log_z).exp().view(*q.shape[:2], n, 1).to(q)
    products = q.new_empty(q.shape[:3])
    last = q.new_zeros(())
    for start in range(0, n, n_block):
        block = slice(start, min(start + n_block, n))
        size = block.stop - start
        mean = (weight[..., :size, :size] @ k[:, None, block]).mul_(gain[:, :, block])
        mean += keep[:, :, block] * last
        last = mean[:, :, -1:]
        products[:, :, block] = dot(q[:, :, block], mean)
    return products


def _band(
    q: Float[Tensor, "kv group query d_head"],
    k: Float[Tensor, "kv query d_head"],
    scale: float,
    log_z: Float[Tensor, "kv group query"],
    template: StreamTemplate,
    bend: Float64[Tensor, "head near"],
    template_log_z: Float64[Tensor, "head query"],
) -> tuple[Float[Tensor, "kv group query"], Float[Tensor, "kv group query"]]:
    """Σ_{d < D} p_{t-d} bend(d) and Σ_{d < D} T_{t-d} ln p_{t-d}: both from the scores of the D nearest keys."""
    kv, group, n, _ = q.shape
    reach, n_block = bend.shape[1], current().fused_block
    # Row r of a block sees column c of its window at distance r + reach - 1 - c; -1 stands for outside of the band.
    away = torch.arange(n_block)[:, None] + reach - 1 - torch.arange(n_block + reach - 1)
    inside = (away >= 0) & (away < reach)

    def window(table: Float64[Tensor, "head near"], outside: float) -> Tensor:
        return table[:, away.clamp(0, reach - 1)].masked_fill(~inside, outside)

    bends = window(bend, 0.0).view(kv, group, *away.shape).to(q)
    bias = window(template.near, -torch.inf)
    # The highest bias that a row sees: early rows see only the first few.
    highest = template.near.cummax(-1).values[:, torch.arange(n).clamp(max=reach - 1)]
    gain = (highest - template_log_z).exp().view(kv, group, n).to(q)
    bent, log_p_mean = torch.empty_like(log_z), torch.empty_like(log_z)
    for start in range(0, n, n_block):
        end = min(start + n_block, n)
        first = max(0, start - reach + 1)
        seen = (..., slice(0, end - start), slice(reach - 1 - (start - first), reach - 1 + end - start))
        if start < reach + n_block:  # from there on every row sees the whole band
            rows = highest[:, torch.arange(start, start + n_block).clamp(max=n - 1), None]
            weight = (bias - rows).clamp(max=0).exp().view_as(bends).to(q)
        queries = q[:, :, start:end].reshape(kv, -1, q.shape[-1])
        log_p = torch.baddbmm(
            -log_z[:, :, start:end].reshape(kv, -1, 1), queries, k[:, first:end].transpose(1, 2), alpha=scale
        ).view(kv, group, end - start, end - first)
        log_p_mean[:, :, start:end] = dot(weight[seen], log_p)
        # Future keys may have a "probability" above 1, even infinity, which their zero bend would make NaN. Those below
        # e^-60 are no mass to speak of, and processors are slow at denormal numbers.
        bent[:, :, start:end] = dot(bends[seen], log_p.clamp_(-60.0, 0.0).exp_())
    return bent, gain * log_p_mean
