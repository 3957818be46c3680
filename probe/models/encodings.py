"""Position encodings. The base class does nothing, and that is NoPE.

A decoder asks its encoding three things, and each encoding overrides what it needs:

- ``embed``: what is added to the token embeddings (learned, sinusoidal);
- ``rotation``: the cosines and sines by which queries and keys are turned (rotary);
- ``bias``: what is added to the attention scores before the softmax (T5, ALiBi).

Positions are 0-based: ``<bos>`` stands at position 0. A distance is ``query - key``, so it is >= 0 wherever a causal
decoder looks. To add an encoding: write the class, add it to ``ENCODINGS``.
"""

import inspect
import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from probe.errors import ProbeError, unknown_name

Rotation = tuple[Float[Tensor, "1 pos d_head"], Float[Tensor, "1 pos d_head"]]


def alibi_slopes(n_heads: int) -> Float[Tensor, "head"]:
    """The ALiBi slope of each head, in nats per token, float64.

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
    exact = n_buckets // 2
    if exact < 1 or max_distance <= exact:
        raise ProbeError(
            f"t5 buckets want n_buckets >= 2 and max_distance > n_buckets // 2, got {n_buckets} and {max_distance}"
        )
    distance = distance.clamp(min=0)
    # The logarithm is taken in float64: in float32 a distance on a bucket's edge could fall on the wrong side.
    log_ratio = torch.log(distance.clamp(min=exact).double() / exact) / math.log(max_distance / exact)
    logarithmic = exact + (log_ratio * (n_buckets - exact)).long()
    return torch.where(distance < exact, distance, logarithmic.clamp(max=n_buckets - 1))


def rotate(x: Float[Tensor, "batch head pos d_head"], rotation: Rotation) -> Float[Tensor, "batch head pos d_head"]:
    """Turn each pair (x_j, x_{j + d/2}) of queries or keys by its angle (the half-split layout of Llama)."""
    cos, sin = (part.unsqueeze(1) for part in rotation)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class PositionEncoding(nn.Module):
    """No position encoding (NoPE), and the interface of all others.

    Positions arrive as integers on the CPU, where what depends on them is computed in float64; results are handed on
    in the dtype and on the device of ``like``.
    """

    embeds = False  # whether it acts on the embeddings, and so on the whole model rather than on single layers

    def __init__(self, *, d_model: int, n_heads: int, d_head: int, n_ctx: int):
        super().__init__()
        self.d_model, self.n_heads, self.d_head, self.n_ctx = d_model, n_heads, d_head, n_ctx

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the initial parameters; encodings without parameters have none to draw."""

    def embed(
        self, x: Float[Tensor, "batch pos d_model"], positions: Int[Tensor, "pos"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """Token embeddings with whatever the encoding adds to them."""
        return x

    def rotation(self, positions: Int[Tensor, "pos"], like: Tensor) -> Rotation | None:
        """(cos, sin) for ``rotate``, or None where nothing is turned."""
        return None

    def bias(
        self, query: Int[Tensor, "query"], key: Int[Tensor, "key"], like: Tensor
    ) -> Float[Tensor, "head query key"] | None:
        """What is added to the scores of queries at positions ``query`` and keys at ``key``, or None."""
        return None


class RelativeBias(PositionEncoding):
    """An encoding whose bias depends on the distance = query - key alone: it overrides ``by_distance``."""

    def by_distance(self, distance: Int[Tensor, "distance"], like: Tensor) -> Float[Tensor, "head distance"]:
        """The bias of each head at each distance, before the softmax, in nats."""
        raise NotImplementedError

    def bias(self, query, key, like):
        furthest, nearest = int(query.max() - key.min()), int(query.min() - key.max())
        table = self.by_distance(torch.arange(furthest, nearest - 1, -1), like)
        if _consecutive(query) and _consecutive(key):
            # Along a row the key grows, so the distance falls by one: each row is a window of the table, the next
            # row's window starts one entry earlier. A view, with a backward pass that adds in a fixed order.
            return table.unfold(-1, len(key), 1).flip(-2)
        index = (furthest - (query[:, None] - key[None, :])).to(table.device)
        return nn.functional.embedding(index, table.T.contiguous()).permute(2, 0, 1)


def _consecutive(positions: Int[Tensor, "pos"]) -> bool:
    return bool((positions.diff() == 1).all())


class Learned(PositionEncoding):
    """A learned vector for each position 0…n_ctx-1, added to the embedding."""

    embeds = True

    def __init__(self, **dims: int):
        super().__init__(**dims)
        self.weight = nn.Parameter(torch.empty(self.n_ctx, self.d_model))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        nn.init.normal_(self.weight, std=0.02, generator=generator)

    def embed(self, x, positions):
        last = int(positions.max())
        if last >= self.n_ctx:
            raise ProbeError(
                f"the learned position table has {self.n_ctx} positions (n_ctx), got a sequence that reaches position "
                f"{last}"
            )
        return x + self.weight[positions.to(x.device)]


class Sinusoidal(PositionEncoding):
    """sin(p / base^(2i/d_model)) in dimension 2i, the cosine in 2i + 1. Vaswani et al. 2017, section 3.5."""

    embeds = True

    def __init__(self, *, base: float = 10000.0, **dims: int):
        super().__init__(**dims)
        if self.d_model % 2:
            raise ProbeError(f"sinusoidal positions want an even d_model, got {self.d_model}")
        self.base = base

    def embed(self, x, positions):
        return x + self.table(positions).to(x)

    def table(self, positions: Int[Tensor, "pos"]) -> Float[Tensor, "pos d_model"]:
        """The encoding itself, float64."""
        even = torch.arange(0, self.d_model, 2)
        angle = positions[:, None].double() / self.base ** (even.double() / self.d_model)
        return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2)


class T5(RelativeBias):
    """A learned bias for each bucket of distances and each head, shared by all layers. Raffel et al. 2020."""

    def __init__(self, *, n_buckets: int = 32, max_distance: int = 128, **dims: int):
        super().__init__(**dims)
        t5_bucket(torch.zeros(1, dtype=torch.long), n_buckets, max_distance)  # refuses impossible sizes at once
        self.n_buckets, self.max_distance = n_buckets, max_distance
        self.weight = nn.Parameter(torch.empty(n_buckets, self.n_heads))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        nn.init.normal_(self.weight, std=self.d_model**-0.5, generator=generator)

    def by_distance(self, distance, like):
        bucket = t5_bucket(distance, self.n_buckets, self.max_distance).to(self.weight.device)
        return nn.functional.embedding(bucket, self.weight).T.to(like)


class Alibi(RelativeBias):
    """The bias -m_h (query - key) with a fixed slope m_h for each head. Press et al. 2022."""

    def __init__(self, **dims: int):
        super().__init__(**dims)
        # A plain attribute, not a buffer: it follows from n_heads, stays float64, and does not belong in checkpoints.
        self.slopes = alibi_slopes(self.n_heads)

    def by_distance(self, distance, like):
        return (-self.slopes[:, None] * distance.double()).to(like)


class Rotary(PositionEncoding):
    """Queries and keys turned by the angle p · base^(-2j/d_head) in their j-th plane. Su et al. 2021."""

    def __init__(self, *, base: float = 10000.0, **dims: int):
        super().__init__(**dims)
        if self.d_head % 2:
            raise ProbeError(f"rotary positions want an even d_head, got {self.d_head}")
        self.base = base

    def rotation(self, positions, like):
        even = torch.arange(0, self.d_head, 2)
        angle = positions[:, None].double() / self.base ** (even.double() / self.d_head)
        angle = torch.cat((angle, angle), dim=-1)[None]
        return angle.cos().to(like), angle.sin().to(like)


def make_encoding(name: str, options: dict, *, d_model: int, n_heads: int, d_head: int, n_ctx: int) -> PositionEncoding:
    """The encoding of that name; an unknown name or option is refused."""
    if name not in ENCODINGS:
        raise unknown_name("encoding", name, ENCODINGS)
    known = [
        p.name
        for p in inspect.signature(ENCODINGS[name].__init__).parameters.values()
        if p.kind is p.KEYWORD_ONLY and p.name not in ("d_model", "n_heads", "d_head", "n_ctx")
    ]
    for option in options:
        if option not in known:
            raise ProbeError(f"encoding {name!r} has no option {option!r}; it has: {', '.join(known) or 'none'}")
    return ENCODINGS[name](d_model=d_model, n_heads=n_heads, d_head=d_head, n_ctx=n_ctx, **options)


ENCODINGS: dict[str, type[PositionEncoding]] = {
    "none": PositionEncoding,
    "learned": Learned,
    "sinusoidal": Sinusoidal,
    "t5": T5,
    "alibi": Alibi,
    "rotary": Rotary,
}
