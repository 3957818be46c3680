"""Encodings that add to the scores what depends on the queries and keys, too."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from probe.config import check_size
from probe.errors import ProbeError
from probe.models.encodings.absolute import sinusoids
from probe.models.encodings.base import PositionEncoding, consecutive, future_keys


class TransformerXL(PositionEncoding):
    """The scores scale · ((q_i + u)·k_j + (q_i + v)·W_R r_(i-j)), r being the sinusoids of the distance.

    Dai et al. 2019, section 3.3. W_R differs from layer to layer, u and v from head to head; they are shared by all
    layers, as in the paper's formulas and in the released code (where ``untie_r`` is off). The code has all sines
    before all cosines, here they take turns: W_R is that of the code with its columns in another order. u and v are
    drawn from N(0, 0.02²), as there, W_R from N(0, 1/d_model), as the decoder's linear maps.
    """

    reads_content = True

    def __init__(self, **dimensions: int):
        super().__init__(**dimensions)
        if self.d_model % 2:
            raise ProbeError(f"transformer_xl positions want an even d_model, got {self.d_model}")
        self.W_R = nn.Parameter(torch.empty(self.n_layers, self.n_heads, self.d_head, self.d_model))
        self.u, self.v = (nn.Parameter(torch.empty(self.n_heads, self.d_head)) for _ in range(2))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        nn.init.normal_(self.W_R, std=self.d_model**-0.5, generator=generator)
        for vector in (self.u, self.v):
            nn.init.normal_(vector, std=0.02, generator=generator)

    def content_bias(
        self,
        layer: int,
        q: Float[Tensor, "batch head query d_head"],
        k: Float[Tensor, "batch head key d_head"],
        query: Int[Tensor, "query"],
        key: Int[Tensor, "key"],
        scale: float,
    ) -> Float[Tensor, "batch head query key"]:
        by_key = torch.einsum("hd,bhkd->bhk", self.u, k)[:, :, None]
        in_order = consecutive(key) and torch.equal(query, key[-len(query) :])
        by_distance = (self._shifted if in_order else self._scattered)(self.W_R[layer], q, query, key)
        return scale * (by_key + by_distance)

    def _shifted(
        self, W_R: Tensor, q: Tensor, query: Int[Tensor, "query"], key: Int[Tensor, "key"]
    ) -> Float[Tensor, "batch head query key"]:
        """(q_i + v)·W_R r_(i-j) where both count up by one to the same end: once a distance, then sorted to keys.

        Columns are the distances n_key-1…-1. Row i wants those from query_i - key_0 on, one more to the left than the
        row above: read without its rows' ends, from the first wanted entry on, the table has all of them in their
        place. Dai et al. 2019, appendix B. What a row reads beyond its end are future keys.
        """
        n_query, n_key = len(query), len(key)
        relative = W_R @ sinusoids(torch.arange(n_key - 1, -2, -1), self.d_model).to(q).T
        table = ((q + self.v[:, None]) @ relative).flatten(-2)
        return table[..., n_query - 1 : n_query - 1 + n_query * n_key].unflatten(-1, (n_query, n_key))

    def _scattered(
        self, W_R: Tensor, q: Tensor, query: Int[Tensor, "query"], key: Int[Tensor, "key"]
    ) -> Float[Tensor, "batch head query key"]:
        """The same for any positions. With s and c for the entries of W_Rᵀ(q_i + v) at the sine and cosine of ω,

            s sin(ω(i-j)) + c cos(ω(i-j)) = (c sin ωi - s cos ωi) sin ωj + (s sin ωi + c cos ωi) cos ωj,

        so it is a product of one vector a query and the sinusoids of the key.
        """
        sine, cosine = sinusoids(query, self.d_model).to(q).unflatten(-1, (-1, 2)).unbind(-1)
        s, c = ((q + self.v[:, None]) @ W_R).unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((c * sine - s * cosine, s * sine + c * cosine), dim=-1).flatten(-2)
        return turned @ sinusoids(key, self.d_model).to(q).T


class Cope(PositionEncoding):
    """Contextual position encoding: q_i·e[p_ij] is added to the scores of query i and key j, where p_ij is counted.

    Gates g_ik = σ(scale · q_i·k_k) say which keys count; p_ij = Σ_{k=j…i} g_ik, at most npos_max - 1; between whole
    numbers e is interpolated. Golovneva et al. 2024, section 4; its formulas have no scale at all, so this follows the
    listing of the appendix: gates read the scaled scores, q·e is added unscaled. e, "layer position d_head", is shared
    by the heads of a layer and starts from 0.
    """

    reads_content = True

    def __init__(self, *, npos_max: int = 64, **dimensions: int):
        super().__init__(**dimensions)
        check_size("npos_max", npos_max, most=2**20)
        self.embedding = nn.Parameter(torch.empty(self.n_layers, npos_max, self.d_head))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        nn.init.zeros_(self.embedding)

    def content_bias(
        self,
        layer: int,
        q: Float[Tensor, "batch head query d_head"],
        k: Float[Tensor, "batch head key d_head"],
        query: Int[Tensor, "query"],
        key: Int[Tensor, "key"],
        scale: float,
    ) -> Float[Tensor, "batch head query key"]:
        e = self.embedding[layer]
        scores = (q * scale) @ k.transpose(-1, -2)
        future = future_keys(len(query), len(key), q.device)
        # Counted in float32 at least: bfloat16 tells no quarters apart from 32 on.
        gates = scores.to(torch.promote_types(q.dtype, torch.float32)).sigmoid().masked_fill(future, 0)
        position = gates.flip(-1).cumsum(-1).flip(-1).clamp(max=len(e) - 1)
        below = position.floor()
        at_integers = q @ e.T
        lower, upper = (at_integers.gather(-1, index.long()) for index in (below, position.ceil()))
        return torch.lerp(lower.to(position), upper.to(position), position - below).to(q)
