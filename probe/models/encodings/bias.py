"""Encodings that add to the scores what depends on positions alone."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor, nn
from torch.nn import functional as F

from probe.config import check_number, check_size
from probe.errors import ProbeError, unknown_name
from probe.limits import current
from probe.models.encodings.base import PositionEncoding, consecutive


def alibi_slopes(n_heads: int) -> Float64[Tensor, "head"]:
    """The ALiBi slope of each head, in nats per token.

    For n a power of two the slopes are 2^(-8k/n), k = 1…n. Otherwise they are those of the next lower power of two,
    followed by every other slope of the next higher one. Press et al. 2022, section 3, and its released code.
    """
    if n_heads < 1:
        raise ProbeError(f"n_heads must be at least 1, got {n_heads}")
    lower = 2 ** int(math.log2(n_heads))

    def geometric(n: int) -> list[float]:
        return [2.0 ** (-8.0 * k / n) for k in range(1, n + 1)]

    slopes = geometric(lower) + geometric(2 * lower)[0::2][: n_heads - lower]
    return torch.tensor(slopes, dtype=torch.float64, device="cpu")


def t5_bucket(distance: Int[Tensor, "..."], n_buckets: int = 32, max_distance: int = 128) -> Int[Tensor, "..."]:
    """T5's causal bucket of a distance = query - key; keys after the query fall into bucket 0.

    With h = n_buckets // 2: distances 0…h-1 have buckets of their own; a distance d >= h has
    min(h + floor(ln(d/h) / ln(max_distance/h) * (n_buckets - h)), n_buckets - 1). Raffel et al. 2020, section 2.1.
    """
    _check_buckets(n_buckets, max_distance)
    exact = n_buckets // 2
    distance = distance.clamp(min=0)
    # The logarithm is taken in float64: in float32 a distance on a bucket's edge could fall on the wrong side.
    log_ratio = torch.log(distance.clamp(min=exact).double() / exact) / math.log(max_distance / exact)
    logarithmic = exact + (log_ratio * (n_buckets - exact)).long()
    return torch.where(distance < exact, distance, logarithmic.clamp(max=n_buckets - 1))


def _check_buckets(n_buckets: int, max_distance: int) -> None:
    if n_buckets < 2 or max_distance <= n_buckets // 2:
        raise ProbeError(
            f"t5 buckets want n_buckets >= 2 and max_distance > n_buckets // 2, got {n_buckets} and {max_distance}"
        )


class RelativeBias(PositionEncoding):
    """An encoding whose bias depends on the distance = query - key alone: it overrides ``by_distance``."""

    def by_distance(self, distance: Int[Tensor, "distance"], like: Tensor) -> Float[Tensor, "head distance"]:
        """The bias of each head at each distance, before the softmax, in nats.

        Distances below 0 are of keys that the causal mask hides: any finite number will do there.
        """
        raise NotImplementedError

    def bias(
        self, query: Int[Tensor, "query"], key: Int[Tensor, "key"], like: Tensor
    ) -> Float[Tensor, "head query key"]:
        furthest, nearest = int(query.max() - key.min()), int(query.min() - key.max())
        table = self.by_distance(torch.arange(furthest, nearest - 1, -1), like)
        if consecutive(query) and consecutive(key):
            # Along a row the key grows, so the distance falls by one: each row is a window of the table, the next
            # row's window starts one entry earlier. A view, with a backward pass that adds in a fixed order.
            return table.unfold(-1, len(key), 1).flip(-2)
        index = (furthest - (query[:, None] - key[None, :])).to(table.device)
        return F.embedding(index, table.T.contiguous()).permute(2, 0, 1)


class T5(RelativeBias):
    """A learned bias for each bucket of distances and each head, shared by all layers. Raffel et al. 2020."""

    def __init__(self, *, n_buckets: int = 32, max_distance: int = 128, **dimensions: int):
        super().__init__(**dimensions)
        check_size("n_buckets", n_buckets, most=2**20)
        check_size("max_distance", max_distance)
        _check_buckets(n_buckets, max_distance)
        self.n_buckets, self.max_distance = n_buckets, max_distance
        self.weight = nn.Parameter(torch.empty(n_buckets, self.n_heads))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        nn.init.normal_(self.weight, std=self.d_model**-0.5, generator=generator)

    def by_distance(self, distance: Int[Tensor, "distance"], like: Tensor) -> Float[Tensor, "head distance"]:
        bucket = t5_bucket(distance, self.n_buckets, self.max_distance).to(self.weight.device)
        return F.embedding(bucket, self.weight).T.to(like)


class Alibi(RelativeBias):
    """The bias -m_h (query - key) with a fixed slope m_h for each head. Press et al. 2022."""

    def __init__(self, **dimensions: int):
        super().__init__(**dimensions)
        # A plain attribute, not a buffer: it follows from n_heads, stays float64, and does not belong in checkpoints.
        self.slopes = alibi_slopes(self.n_heads)

    def by_distance(self, distance: Int[Tensor, "distance"], like: Tensor) -> Float[Tensor, "head distance"]:
        return (-self.slopes[:, None] * distance.double()).to(like)


# What ``AlibiKeys`` rounds to.
_ROUNDED = {"none": torch.float64, "bfloat16": torch.bfloat16}


class AlibiKeys(PositionEncoding):
    """ALiBi as a bias of keys alone: scale · m_h i is added to the scores of the key at position i, for every query.

    -m_h (t - i) = m_h i - m_h t, and softmax does not see what is the same for all keys of a query: with scale = 1 this
    is ALiBi in exact arithmetic. In floating point its sums grow with the position, ALiBi's with the distance.

    ``rounded="bfloat16"`` rounds m_h, i and their product, one after the other, as Falcon's code does in any dtype
    (``build_alibi_tensor`` in Hugging Face's); its scale is d_head^-1/2, as that of its q·k. The bias is then no
    straight line in i, so that the pattern depends on more than distances. Where all slopes are powers of two (8 heads
    and fewer) the first position off the line is 257, else 3. The 32 heads of Falcon-RW-1B (Penedo et al. 2023) have
    biases of 2048 positions that are up to 0.90 nats away from every line; where q·k is 0, their last query attends
    otherwise than ALiBi's by a total variation of 0.14.
    """

    def __init__(self, *, scale: float = 1.0, rounded: str = "none", **dimensions: int):
        super().__init__(**dimensions)
        check_number("scale", scale)
        if not isinstance(rounded, str) or rounded not in _ROUNDED:
            raise unknown_name("rounding of alibi_keys", rounded, _ROUNDED)
        self.scale = scale
        # A plain attribute, as Alibi's: no cast of the decoder rounds it.
        self.slopes = alibi_slopes(self.n_heads).to(_ROUNDED[rounded])

    def bias(
        self, query: Int[Tensor, "query"], key: Int[Tensor, "key"], like: Tensor
    ) -> Float[Tensor, "head query key"]:
        # The product of a float and an integer tensor has the float's dtype, to which torch rounds both factors.
        by_key = (self.slopes[:, None] * key).double() * self.scale
        return by_key.to(like)[:, None].expand(-1, len(query), -1)


class AlibiLearned(RelativeBias):
    """ALiBi's bias -m_h (query - key) with learned slopes m_h = e^(``log_slopes``) > 0, shared by all layers.

    They start from ALiBi's own. Press et al. 2022, section 3, report that they tried to make them trainable.
    """

    def __init__(self, **dimensions: int):
        super().__init__(**dimensions)
        self.log_slopes = nn.Parameter(torch.empty(self.n_heads))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        self.log_slopes.copy_(alibi_slopes(self.n_heads).log())

    def by_distance(self, distance: Int[Tensor, "distance"], like: Tensor) -> Float[Tensor, "head distance"]:
        slopes = at_least_float(self.log_slopes).exp()
        return (-slopes[:, None] * distance.to(slopes)).to(like)


@dataclass(frozen=True)
class _Kernel:
    """A kernel of KERPLE: the bias of (r1, r2, distance), and the range of r2 and of the first draws."""

    bias: Callable[[Tensor, Tensor, Tensor], Tensor]
    r2: Callable[[Tensor], Tensor]  # from all numbers to those that r2 may be
    r2_inverse: Callable[[Tensor], Tensor]
    drawn: tuple[float, float]  # r1 and r2 are drawn from 0.01 up to these


def _softplus_inverse(x: Tensor) -> Tensor:
    return x + torch.log(-torch.expm1(-x))


_KERNELS = {
    "log": _Kernel(lambda r1, r2, d: -r1 * torch.log1p(r2 * d), F.softplus, _softplus_inverse, (2.0, 1.0)),
    "power": _Kernel(
        lambda r1, r2, d: -r1 * d**r2, lambda x: 2 * x.sigmoid(), lambda r2: torch.logit(r2 / 2), (1.0, 1.99)
    ),
}


class Kerple(RelativeBias):
    """KERPLE: the bias -r1 ln(1 + r2 d) ("log") or -r1 d^r2 ("power") of the distance d, r1 and r2 learned per head.

    r1 > 0 and r2 > 0, in the power kernel r2 < 2, as conditional positive definiteness wants. Chi et al. 2022,
    corollary 1. One pair a head, shared by all layers; the released code has one in each layer and clamps it (to 0.01
    and more, the exponent to 2 and less), here softplus and 2 · sigmoid keep it inside. First draws are those of the
    code: uniform, r1 below 2 and r2 below 1 (log), r1 below 1 and r2 below 2 (power).
    """

    def __init__(self, *, kernel: str = "log", **dimensions: int):
        super().__init__(**dimensions)
        if not isinstance(kernel, str) or kernel not in _KERNELS:
            raise unknown_name("kernel", kernel, _KERNELS)
        self.kernel = _KERNELS[kernel]
        self.raw_r1 = nn.Parameter(torch.empty(self.n_heads))
        self.raw_r2 = nn.Parameter(torch.empty(self.n_heads))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        most_r1, most_r2 = self.kernel.drawn
        self.raw_r1.copy_(_softplus_inverse(self.raw_r1.uniform_(0.01, most_r1, generator=generator)))
        self.raw_r2.copy_(self.kernel.r2_inverse(self.raw_r2.uniform_(0.01, most_r2, generator=generator)))

    def rates(self) -> tuple[Float[Tensor, "head"], Float[Tensor, "head"]]:
        """r1 and r2."""
        return F.softplus(at_least_float(self.raw_r1)), self.kernel.r2(at_least_float(self.raw_r2))

    def by_distance(self, distance: Int[Tensor, "distance"], like: Tensor) -> Float[Tensor, "head distance"]:
        r1, r2 = self.rates()
        return self.kernel.bias(r1[:, None], r2[:, None], distance.clamp(min=0).to(r1)).to(like)


class Sandwich(RelativeBias):
    """The bias Σ_i cos(d / 10000^(2i/D)) / c_h of the distance d, i = 0…D/2-1, D = d_bar, c_h = 8h/n_heads, h = 1….

    It is the product of two sinusoidal position vectors, without parameters, and c_h the head-wise compression ratio.
    Chi et al. 2023 (Dissecting Transformer Length Extrapolation), listing of appendix E. The paper's formula counts i
    from 1, the listing, followed here, from 0.
    """

    def __init__(self, *, d_bar: int = 128, **dimensions: int):
        super().__init__(**dimensions)
        check_size("d_bar", d_bar, least=2, most=2**20)
        if d_bar % 2:
            raise ProbeError(f"sandwich positions want an even d_bar, got {d_bar}")
        self.d_bar = d_bar

    def by_distance(self, distance: Int[Tensor, "distance"], like: Tensor) -> Float[Tensor, "head distance"]:
        even = torch.arange(0, self.d_bar, 2).double()
        product = (distance.double() / 10000 ** (even[:, None] / self.d_bar)).cos().sum(0)
        compression = 8 * torch.arange(1, self.n_heads + 1).double() / self.n_heads
        return (product / compression[:, None]).to(like)


class Fire(PositionEncoding):
    """The bias MLP(ψ(i - j) / ψ(max(i, L))) of query i and key j, ψ(x) = ln(|c| x + 1), c and L learned.

    The MLP has one hidden layer of ``width`` ReLUs and an output for each head. Li et al. 2024, section 3, and the
    listing of the appendix, with its first values: c = 0.1, L = |multiplier · threshold|, multiplier = 1, and 10^-6
    added to the denominator. One MLP for all layers, which is the paper's FIRE-S. Its output has no constant: that
    would be the same for all keys of a query, and softmax does not see it.
    """

    def __init__(self, *, width: int = 32, threshold: float = 512.0, **dimensions: int):
        super().__init__(**dimensions)
        check_size("width", width, most=2**20)
        check_number("threshold", threshold)
        self.threshold = threshold
        self.c, self.multiplier = nn.Parameter(torch.empty(())), nn.Parameter(torch.empty(()))
        self.in_weight, self.in_bias = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width))
        self.out_weight = nn.Parameter(torch.empty(self.n_heads, width))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        self.c.fill_(0.1)
        self.multiplier.fill_(1.0)
        # As torch draws its linear maps: uniform within 1/sqrt(inputs).
        for parameter, n_inputs in ((self.in_weight, 1), (self.in_bias, 1), (self.out_weight, len(self.in_weight))):
            parameter.uniform_(-(n_inputs**-0.5), n_inputs**-0.5, generator=generator)

    def bias(
        self, query: Int[Tensor, "query"], key: Int[Tensor, "key"], like: Tensor
    ) -> Float[Tensor, "head query key"]:
        c = at_least_float(self.c).abs()
        query, key = query.to(c), key.to(c)
        normaliser = torch.maximum(query, (self.multiplier * self.threshold).abs())
        distance = (query[:, None] - key).clamp(min=0)
        ratio = torch.log1p(c * distance) / (torch.log1p(c * normaliser) + 1e-6)[:, None]
        # Some queries at a time: there are ``width`` hidden numbers for each number of the bias.
        n_rows = max(1, current().fire_block // (len(key) * len(self.in_weight)))
        return torch.cat([self._mlp(rows) for rows in ratio.to(like).split(n_rows)]).permute(2, 0, 1)

    def _mlp(self, x: Float[Tensor, "query key"]) -> Float[Tensor, "query key head"]:
        weights = (self.in_weight, self.in_bias, self.out_weight)
        in_weight, in_bias, out_weight = (weight.to(x) for weight in weights)
        return F.linear(F.relu(x[..., None] * in_weight + in_bias), out_weight)


def at_least_float(x: Tensor) -> Tensor:
    """In float32 or better, so that what is made of a learned rate and a long distance is not rounded to bfloat16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
