"""Subspaces that carry a concept, and the maps that take them out: least-squares concept erasure.

Belrose et al. 2023 (LEACE): of all affine maps after which no linear probe finds the concept z in x, the one that moves
x least. With W the whitening of x it is x - W⁺ Q Qᵀ W (x - x̄), Q an orthonormal basis of the columns of W Σ_xz. The
maintained ``concept-erasure`` package makes it.

Everything is fitted to features of unit variance and scaled back. The result is the same in exact arithmetic, and a
channel with huge values leaves the others' digits alone.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from concept_erasure import LeaceFitter
from jaxtyping import Float, Float64, Int, Shaped
from torch import Tensor

from probe.errors import ProbeError, unknown_name
from probe.position.probes.moments import eigen, least_variance, precision, unscale


@dataclass(frozen=True)
class Subspace:
    """A part of x that a projection takes out: ``left`` ``right`` (x - ``mean``), ``right`` ``left`` = 1."""

    left: Float64[Tensor, "feature rank"]
    right: Float64[Tensor, "rank feature"]
    mean: Float64[Tensor, "feature"]

    @property
    def rank(self) -> int:
        return self.left.shape[1]

    def part(self, x: Float[Tensor, "*stack feature"]) -> Float[Tensor, "*stack feature"]:
        """What lies in the subspace, 0 for the mean; on the device of x, in its dtype or, where that is half
        precision, in float32."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        left, right, mean = (each.to(x) for each in (self.left, self.right, self.mean))
        return ((x - mean) @ right.T) @ left.T

    @classmethod
    def nothing(cls, mean: Float64[Tensor, "feature"]) -> "Subspace":
        """The subspace of no dimension."""
        return cls(mean.new_zeros(len(mean), 0), mean.new_zeros(0, len(mean)), mean)

    def erased(self, x: Float[Tensor, "*stack feature"]) -> Float[Tensor, "*stack feature"]:
        """x without that part, in its own dtype."""
        return (x - self.part(x)).to(x)


@dataclass(frozen=True)
class TokenMeans:
    """The mean state of each token, over rows of x, and that of all rows for a token that is not among them."""

    table: Float64[Tensor, "token feature"]
    mean: Float64[Tensor, "feature"]

    @classmethod
    def of(cls, x: Float[Tensor, "row feature"], tokens: Int[Tensor, "row"]) -> "TokenMeans":
        n = int(tokens.max()) + 1
        count = tokens.bincount(minlength=n).double()[:, None]
        total = torch.zeros(n, x.shape[1], dtype=torch.float64).index_add_(0, tokens, x.double())
        mean = x.double().mean(0)
        return cls(torch.where(count > 0, total / count.clamp(min=1), mean), mean)

    @classmethod
    def beside_positions(
        cls, x: Float[Tensor, "row feature"], tokens: Int[Tensor, "row"], positions: Int[Tensor, "row"]
    ) -> "TokenMeans":
        """What each token adds where x is fitted by a number for each token and one for each position (least squares),
        about the mean of all rows.

        A plain mean of few rows also holds at which positions they happen to stand, and this does not. Where tokens and
        positions cannot be told apart, as where each token has places of its own, it is the token's.
        """
        # To fit one given the other in turn converges to least squares. Tokens come first, so that what both explain
        # stays theirs. Each round takes off what is wrong the squared correlation of tokens and positions: where tokens
        # stand at random places that is at most 1/4 for 40 of each in a thousand rows, and 50 rounds leave nothing.
        exact, (there, token) = x.double(), tokens.unique(return_inverse=True)
        of_positions = torch.zeros_like(exact)
        for _ in range(50):
            means = cls.of(exact - of_positions, token)
            of_positions = cls.of(exact - means(token), positions)(positions)
        mean = exact.mean(0)
        table = mean.repeat(int(tokens.max()) + 1, 1)
        table[there] = means.table
        return cls(table, mean)

    @classmethod
    def alike(cls, x: Float[Tensor, "row feature"]) -> "TokenMeans":
        """The mean of all rows, for every token."""
        mean = x.double().mean(0)
        return cls(mean.new_zeros(0, len(mean)), mean)

    def __call__(self, tokens: Int[Tensor, "*row"]) -> Float64[Tensor, "*row feature"]:
        table = torch.cat((self.table, self.mean[None]))
        return table[tokens.clamp(max=len(self.table))]


@dataclass(frozen=True)
class Whitening:
    """The map to coordinates in which x has mean 0 and variance 1 in every direction: w = ``inverse`` (x - ``mean``),
    and back, x = ``mean`` + ``root`` w. Directions in which x does not vary beyond rounding are left out."""

    mean: Float64[Tensor, "feature"]
    root: Float64[Tensor, "feature feature"]
    inverse: Float64[Tensor, "feature feature"]
    rank: int  #: in how many dimensions x varies

    @classmethod
    def of(cls, x: Float[Tensor, "row feature"]) -> "Whitening":
        """The whitening of these rows, symmetric in features of unit variance."""
        mean, to_unit = x.double().mean(0), unscale(x)
        z = (x.double() - mean) * to_unit
        values, vectors = eigen(z.T @ z / len(z))
        there = values > least_variance(values, precision(x.dtype))
        values, vectors = values[there], vectors[:, there]
        scale = torch.where(to_unit > 0, 1 / to_unit, 0.0)
        root, inverse = vectors * values.sqrt() @ vectors.T, vectors / values.sqrt() @ vectors.T
        return cls(mean, scale[:, None] * root, inverse * to_unit, len(values))

    def random(
        self, n: int, generator: torch.Generator, apart_from: Subspace | None = None
    ) -> Float64[Tensor, "feature {n}"]:
        """Random vectors of whitened coordinates, orthogonal to those of a subspace."""
        # Drawn in the coordinates of x, not of its eigenvectors, whose signs are not determined.
        drawn = torch.randn(len(self.mean), n, generator=generator, dtype=torch.float64)
        drawn = self.inverse @ (self.root @ drawn)
        if apart_from is None:
            return drawn
        own = torch.linalg.qr(self.inverse @ apart_from.left)[0]
        return drawn - own @ (own.T @ drawn)

    def covariance(self, x: Float[Tensor, "row feature"], y: Shaped[Tensor, "row"]) -> Float64[Tensor, "feature"]:
        """The covariance of x and y, over the directions in which x varies."""
        centred = y.double() - y.double().mean()
        return self.root @ (self.inverse @ ((x.double() - self.mean).T @ centred / len(centred)))


def concept_subspace(x: Float[Tensor, "row feature"], z: Float[Tensor, "row concept"]) -> Subspace:
    """The subspace of the concept z: without it no linear probe does better than a constant on these rows.

    Raises:
        ProbeError: for values that are not finite, or a concept that x tells nothing of.
    """
    if not (x.isfinite().all() and z.isfinite().all()):
        raise ProbeError("erasure wants finite hidden states and concepts, got NaN or infinity")
    mean, to_unit = x.double().mean(0), unscale(x)
    z = z.double()
    spread = z.std(0, correction=0)
    if not (spread > 0).any():
        raise ProbeError("a concept must vary over the rows, got one value")
    z = (z - z.mean(0))[:, spread > 0] / spread[spread > 0]
    # Features that do not vary tell nothing, and where very many eigenvalues are 0 LAPACK may not converge.
    varies = to_unit > 0
    if not varies.any():
        raise ProbeError("there is nothing to erase: these hidden states tell nothing of the concept")
    # Everything that is there is erased (no shrinkage; the tolerance is relative to correlations of 1).
    fitter = LeaceFitter(int(varies.sum()), z.shape[1], dtype=torch.float64, shrinkage=False, svd_tol=1e-6)
    eraser = fitter.update(((x.double() - mean) * to_unit)[:, varies], z).eraser
    # The package keeps a column for every concept; those that the tolerance has set to 0 are dropped.
    kept = eraser.proj_left.norm(dim=0) > 0
    if not kept.any():
        raise ProbeError("there is nothing to erase: these hidden states tell nothing of the concept")
    left = x.new_zeros(x.shape[1], int(kept.sum()), dtype=torch.float64)
    right = torch.zeros_like(left.T)
    left[varies], right[:, varies] = eraser.proj_left[:, kept], eraser.proj_right[kept]
    scale = torch.where(varies, 1 / to_unit, 0.0)
    return Subspace(scale[:, None] * left, right * to_unit, mean)


def random_subspace(
    whitening: Whitening, rank: int, generator: torch.Generator, apart_from: Subspace | None = None
) -> Subspace:
    """A subspace of that rank that has nothing to do with any concept: random directions of whitened states, orthogonal
    there to those of ``apart_from``, taken out by the same kind of map. The control of ``concept_subspace``.

    Raises:
        ProbeError: for a rank above the number of dimensions in which the states vary, less those of ``apart_from``.
    """
    most = whitening.rank - (0 if apart_from is None else apart_from.rank)
    if rank > most:
        raise ProbeError(f"rank must be at most {max(most, 0)}, the number of dimensions there are to draw, got {rank}")
    q, _ = torch.linalg.qr(whitening.random(rank, generator, apart_from))
    return Subspace(whitening.root @ q, q.T @ whitening.inverse, whitening.mean)


def control_subspaces(
    x: Float[Tensor, "row feature"],
    concept: Subspace,
    n: int,
    generator: torch.Generator,
    apart_from: Subspace | None = None,
) -> list[Subspace]:
    """``n`` random subspaces orthogonal to ``apart_from``, which holds the concept's subspace and is that one by
    default, of the concept's rank or, where fewer dimensions are left, of all that are left; none where none is."""
    whitening, apart_from = Whitening.of(x), concept if apart_from is None else apart_from
    rank = min(concept.rank, whitening.rank - apart_from.rank)
    return [random_subspace(whitening, rank, generator, apart_from) for _ in range(n)] if rank > 0 else []


POWERS = 4  # of the position


def powers(positions: Int[Tensor, "row"]) -> Float64[Tensor, "row concept"]:
    """The position to the powers 1 … POWERS. A control that is orthogonal to its number alone may still hold how it
    bends, and from which position on something is so: nearly all of that is in the first powers."""
    t = positions.double()
    t = (t - t.mean()) / t.std(correction=0).clamp(min=1)  # of the size of 1, so that powers can be told apart
    return torch.stack([t**k for k in range(1, POWERS + 1)], dim=1)


def _position(positions: Int[Tensor, "row"]) -> Float64[Tensor, "row concept"]:
    """Its number: erased from any linear regression, rank 1."""
    return positions[:, None].double()


def _classes(positions: Int[Tensor, "row"]) -> Float64[Tensor, "row concept"]:
    """One indicator each: erased from any linear classifier, rank one less than there are positions."""
    return torch.nn.functional.one_hot(positions).double()


def concept(name: str, positions: Int[Tensor, "row"]) -> Float64[Tensor, "row concept"]:
    """The values of a concept at these positions."""
    if name not in CONCEPTS:
        raise unknown_name("concept", name, CONCEPTS)
    return CONCEPTS[name](positions)


CONCEPTS: dict[str, Callable[[Tensor], Tensor]] = {"position": _position, "classes": _classes}


def with_controls(
    name: str,
    x: Float[Tensor, "row feature"],
    positions: Int[Tensor, "row"],
    less: Callable[[Float64[Tensor, "row concept"]], Float64[Tensor, "row concept"]],
    n_random: int,
    generator: torch.Generator,
) -> dict[str, list[Subspace]]:
    """The subspace of a concept of the position ("none"), and random ones apart from it and, where it is the
    number, from its powers ("random").

    Args:
        less: takes off the values of a concept what is not to count of them.
    """

    def subspace(z: Tensor) -> Subspace:
        z = less(z)
        return concept_subspace(x, z) if x.any() and z.any() else Subspace.nothing(x.double().mean(0))

    found = subspace(concept(name, positions))
    # What tells all positions apart holds their powers already.
    all_of_it = subspace(powers(positions)) if name == "position" and found.rank else found
    return {"none": [found], "random": control_subspaces(x, found, n_random, generator, all_of_it)}
