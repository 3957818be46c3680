"""The least squares of an additive model of scores, from their sums.

The model is s(t, i) ≈ key_i + query_t + distance_{t-i}, over the cells i ≤ t of all sequences, with, where it is asked
for, a number for each pair of tokens.
"""

import functools
import math
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int
from scipy.sparse import csr_array
from torch import Tensor

from probe.attention.score_split.sums import PARTS
from probe.models.hidden_keys import nearest_keys
from probe.sequences import valid_rows

_TOLERANCE = 1e-13


@dataclass(frozen=True)
class PairCounts:
    """How often each (query token, key token) pair meets each key, query and distance, over the cells of all sequences;
    ``index`` is the pair of every cell, one number beyond the last pair where there is no cell."""

    counts: Float64[Tensor, "part=3 pair position"]
    index: Int[Tensor, "sequence query key"]

    @classmethod
    def of(cls, tokens: Int[Tensor, "sequence position"], seen: Bool[Tensor, "sequence query key"]) -> "PairCounts":
        """Those of the cells that are ``seen``."""
        n = tokens.shape[1]
        pairs = tokens[:, :, None] * (int(tokens.max()) + 1) + tokens[:, None, :]
        found, number = pairs[seen].unique(return_inverse=True)
        index = torch.full(pairs.shape, len(found))
        index[seen] = number
        _, query, key = seen.nonzero(as_tuple=True)
        counts = torch.stack(
            [torch.bincount(number * n + at, minlength=len(found) * n) for at in (key, query, query - key)]
        )
        return cls(counts.view(3, len(found), n).double(), index)

    def __len__(self) -> int:
        return self.counts.shape[1]

    def sums(self, cells: Float64[Tensor, "sequence head query key"]) -> Float64[Tensor, "sequence head pair"]:
        """The sum of the cells of each pair."""
        index = self.index[:, None].expand(cells.shape).flatten(-2)
        total = cells.new_zeros(*cells.shape[:2], len(self) + 1)
        return total.scatter_add_(-1, index, cells.tril().flatten(-2))[..., :-1]

    @functools.cached_property
    def by_row(self) -> csr_array:
        """How often each pair stands in each row of each sequence: a sparse matrix "(sequence query) pair"."""
        pairs = self.index.flatten(0, 1)
        row, key = (pairs < len(self)).nonzero(as_tuple=True)
        once = np.ones(len(row))
        return csr_array((once, (row.numpy(), pairs[row, key].numpy())), shape=(len(pairs), len(self)))

    def row_sums(self, content: Float64[Tensor, "right pair"]) -> Float64[Tensor, "right sequence query"]:
        """The sum, over the cells of each row, of one value per pair."""
        return torch.from_numpy(self.by_row @ content.numpy().T).T.unflatten(-1, self.index.shape[:2])

    def of_rows(self, rows: Float64[Tensor, "right sequence query"]) -> Float64[Tensor, "right pair"]:
        """The sum, over the cells of each pair, of one value per row: the transpose of ``row_sums``."""
        return torch.from_numpy(self.by_row.T @ rows.flatten(1).numpy().T).T


class Design:
    """The normal equations XᵀX θ = Xᵀs of the additive model, applied without being written down.

    θ holds T values each for keys, queries and distances, then one for each pair of tokens where there are ``pairs``.
    With w_t the number of sequences that reach row t, and r_t the number of keys that row t sees (its nearest; t + 1
    where none is hidden), the three blocks of XᵀX θ are

        key i:       Σ_{t: t - r_t < i ≤ t} w_t (key_i + query_t + distance_{t-i})
        query t:     w_t (r_t query_t + Σ_{t - r_t < i ≤ t} key_i + Σ_{d < r_t} distance_d)
        distance d:  Σ_{t: d < r_t} w_t (distance_d + query_t + key_{t-d})

    which are cumulative sums, and correlations where r_t = min(t + 1, window): O(T log T). Elsewhere (attention in
    chunks) a matrix stands for the correlations.

    With ``centred``, ``apply`` and ``solve`` are about XᵀCX, where C takes from each cell the mean of its row, in its
    sequence: softmax sees nothing else. Without pairs every sequence has the same X, and the keys' and distances' θ
    that solves these equations is the one that is fitted together with query_t, so nothing need be solved anew.
    """

    def __init__(
        self,
        lengths: Int[Tensor, "sequence"],
        n_position: int,
        pairs: PairCounts | None = None,
        n_visible: Int[Tensor, "position"] | None = None,
    ):
        all_keys = torch.arange(1, n_position + 1)
        self.valid = valid_rows(lengths, n_position)
        self.weights = self.valid.sum(0).double()
        self.n, self.pairs = n_position, pairs
        self.n_visible = all_keys if n_visible is None else n_visible
        self.window = int(self.n_visible.max())
        self._crossing = None
        if not torch.equal(self.n_visible, all_keys.clamp(max=self.window)):
            # How many cells key i and distance d share: one for each sequence that reaches the row i + d, if it sees i.
            row = torch.arange(n_position)[:, None] + torch.arange(n_position)
            there = row.clamp(max=n_position - 1)
            seen = (row < n_position) & (torch.arange(n_position) < self.n_visible[there])
            self._crossing = self.weights[there].where(seen, 0.0)
        #: the cells that count: all of them, and those of each sequence
        self.n_cells = float((self.weights * self.n_visible).sum())
        self.cells_of_each = self.n_visible.cumsum(0)[lengths - 1].double()
        own = torch.stack(
            (self._to_keys(self.weights), self.weights * self.n_visible, self._to_distances(self.weights))
        ).flatten()
        if pairs is not None:
            own = torch.cat((own, pairs.counts[PARTS.index("query")].sum(-1)))
        self.diagonal = own  # how many cells each unknown stands in

    def _over_keys(self, x: Float64[Tensor, "*stack position"]) -> Float64[Tensor, "*stack position"]:
        """Σ_{t - r_t < i ≤ t} x_i for each query t."""
        total = torch.nn.functional.pad(x.cumsum(-1), (1, 0))
        after = torch.arange(1, self.n + 1)
        return total[..., after] - total[..., after - self.n_visible]

    def _over_distances(self, x: Float64[Tensor, "*stack position"]) -> Float64[Tensor, "*stack position"]:
        """Σ_{d < r_t} x_d for each query t."""
        return x.cumsum(-1)[..., self.n_visible - 1]

    def _to_keys(self, x: Float64[Tensor, "*stack position"]) -> Float64[Tensor, "*stack position"]:
        """Σ x_t over the queries t that see each key."""
        at = torch.arange(self.n)
        change = torch.zeros(*x.shape[:-1], self.n + 1, dtype=x.dtype)
        change.index_add_(-1, at + 1 - self.n_visible, x)
        return change.index_add_(-1, at + 1, -x).cumsum(-1)[..., :-1]

    def _to_distances(self, x: Float64[Tensor, "*stack position"]) -> Float64[Tensor, "*stack position"]:
        """Σ x_t over the queries t that see a key at each distance."""
        return _tail(torch.zeros_like(x).index_add_(-1, self.n_visible - 1, x))

    def _keys_of(self, distance: Float64[Tensor, "right position"]) -> Float64[Tensor, "right position"]:
        """Σ_t w_t distance_{t-i} over the queries t that see each key i."""
        if self._crossing is not None:
            return distance @ self._crossing.T
        return _correlation(self.weights, distance.where(torch.arange(self.n) < self.window, 0.0))

    def _distances_of(self, key: Float64[Tensor, "right position"]) -> Float64[Tensor, "right position"]:
        """Σ_t w_t key_{t-d} over the queries t that see a key at each distance d."""
        if self._crossing is not None:
            return key @ self._crossing
        return _correlation(self.weights, key).where(torch.arange(self.n) < self.window, 0.0)

    def of(self, parts: Collection[str]) -> Float64[Tensor, "unknown"]:
        """1 for the unknowns of those parts (``PARTS`` and "content"), 0 for the others."""
        mask = torch.tensor([name in parts for name in PARTS]).repeat_interleave(self.n)
        if self.pairs is not None:
            mask = torch.cat((mask, torch.full((len(self.pairs),), "content" in parts)))
        return (mask & (self.diagonal > 0)).double()

    def apply(self, theta: Float64[Tensor, "right unknown"], centred: bool = False) -> Float64[Tensor, "right unknown"]:
        """XᵀX θ, or XᵀCX θ."""
        if centred:
            return self.apply(theta) - self._of_rows(self._row_means(theta))
        w, positional = self.weights, theta[:, : 3 * self.n].unflatten(-1, (3, self.n))
        key, query, distance = positional.unbind(-2)
        cells_of_key, _, cells_of_distance = self.diagonal[: 3 * self.n].unflatten(-1, (3, self.n))
        rows = w * (self._over_keys(key) + self._over_distances(distance) + query * self.n_visible)
        keys = cells_of_key * key + self._to_keys(w * query) + self._keys_of(distance)
        distances = cells_of_distance * distance + self._to_distances(w * query) + self._distances_of(key)
        result = torch.stack((keys, rows, distances), dim=-2)
        if self.pairs is None:
            return result.flatten(-2)
        content = theta[:, 3 * self.n :]
        counts = self.pairs.counts
        result = result + torch.einsum("rp,kpj->rkj", content, counts)
        met = torch.einsum("rkj,kpj->rp", positional, counts) + content * self.diagonal[3 * self.n :]
        return torch.cat((result.flatten(-2), met), dim=-1)

    def _row_means(self, theta: Float64[Tensor, "right unknown"]) -> Float64[Tensor, "right #sequence query"]:
        """The mean of X θ over the cells of each row of each sequence."""
        key, query, distance = theta[:, : 3 * self.n].unflatten(-1, (3, self.n)).unbind(-2)
        rows = (self._over_keys(key) + self._over_distances(distance) + query * self.n_visible)[:, None]
        if self.pairs is not None:
            rows = rows + self.pairs.row_sums(theta[:, 3 * self.n :])
        return (rows / self.n_visible).where(self.valid, 0.0)

    def _of_rows(self, rows: Float64[Tensor, "right sequence query"]) -> Float64[Tensor, "right unknown"]:
        """Xᵀ of cells that have the same value within each row."""
        total = rows.sum(1)
        positional = torch.cat((self._to_keys(total), total * self.n_visible, self._to_distances(total)), dim=-1)
        if self.pairs is None:
            return positional
        return torch.cat((positional, self.pairs.of_rows(rows)), dim=-1)

    def with_queries(
        self, theta: Float64[Tensor, "right unknown"], right: Float64[Tensor, "right unknown"]
    ) -> Float64[Tensor, "right unknown"]:
        """θ with the query_t that are the best beside its other parts; ``right`` is Xᵀs."""
        query = self.of({"query"})
        return theta + (right - self.apply(theta)) * query / self.diagonal.clamp(min=1.0)

    def solve(
        self,
        right: Float64[Tensor, "right unknown"],
        parts: Collection[str],
        beside: Float64[Tensor, "right unknown"] | None = None,
        centred: bool = False,
    ) -> Float64[Tensor, "right unknown"]:
        """θ with only those parts, by conjugate gradients, each unknown scaled by the number of its cells.

        It is right to 1e-13 of the right side, or of a right side ``beside`` it where that is larger (a residual may be
        rounding and nothing else).

        A linear trend over the keys 1…T-1 is no key's but the distances' (see ``decomposition``): without the part
        "distance", it is left out. Without pairs it takes some 20 steps at any length. What the scores do not determine
        (constants; pairs that stand at one position only) is as small as can be in that scaling.
        """
        mask = self.of(parts)
        scale = torch.where(mask > 0, self.diagonal, 1.0)
        trend = self._trend() * mask if "distance" not in parts else torch.zeros_like(mask)
        against = scale * trend  # the projection is orthogonal in the scaling: its transpose acts on right sides

        def allowed(side: Tensor) -> Tensor:
            return side * mask - (side @ trend)[:, None] * against

        theta, residual = torch.zeros_like(right), allowed(right)
        z = residual / scale
        direction, energy = z, (residual * z).sum(-1, keepdim=True)
        enough = energy
        if beside is not None:
            beside = allowed(beside)
            enough = torch.maximum(energy, (beside.square() / scale).sum(-1, keepdim=True))
        enough = _TOLERANCE**2 * enough
        for _ in range(10 * (200 + int(mask.sum()))):
            if (energy <= enough).all():
                return theta
            image = allowed(self.apply(direction, centred))
            curvature = (direction * image).sum(-1, keepdim=True)
            # A right side that is solved already has no direction left: 0/0 is no step.
            step = torch.where(energy > enough, energy / curvature, 0.0)
            theta, residual = theta + step * direction, residual - step * image
            z = residual / scale
            previous, energy = energy, (residual * z).sum(-1, keepdim=True)
            direction = z + torch.where(previous > 0, energy / previous, 0.0) * direction
        raise ArithmeticError(f"conjugate gradients stopped at {math.sqrt(float((energy / enough).max())):.1e} of 1")

    def _trend(self) -> Float64[Tensor, "unknown"]:
        """A linear trend over the keys 1…T-1, of mean 0 and norm 1, both weighted by cells."""
        cells = self.diagonal[1 : self.n]
        x = torch.arange(1, self.n, dtype=torch.float64)
        x = x - (cells * x).sum() / cells.sum()
        spread = (cells * x.square()).sum()
        trend = torch.zeros_like(self.diagonal)
        if spread > 0:
            trend[1 : self.n] = x / spread.sqrt()
        return trend

    def fitted(self, theta: Float64[Tensor, "head unknown"]) -> Float64[Tensor, "#sequence head query key"]:
        """X θ as cells."""
        n = self.n
        key, query, distance = theta[:, : 3 * n].unflatten(-1, (3, n)).unbind(-2)
        at = torch.arange(n)
        cells = (key[:, None, :] + query[:, :, None] + distance[:, (at[:, None] - at).clamp(min=0)])[None]
        if self.pairs is not None:
            content = torch.nn.functional.pad(theta[:, 3 * n :], (0, 1))
            cells = cells + content[:, self.pairs.index].transpose(0, 1)
        return cells.where(nearest_keys(self.n_visible), 0.0)


def _tail(x: Float64[Tensor, "*rest position"]) -> Float64[Tensor, "*rest position"]:
    """Σ_{t ≥ j} x_t."""
    return x.flip(-1).cumsum(-1).flip(-1)


def _correlation(w: Float64[Tensor, "position"], x: Float64[Tensor, "right position"]) -> Tensor:
    """Σ_{t ≥ j} w_t x_{t-j}."""
    n = len(w)
    return torch.fft.irfft(torch.fft.rfft(w, 2 * n) * torch.fft.rfft(x, 2 * n).conj(), 2 * n)[..., :n]
