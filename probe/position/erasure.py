"""Subspaces that carry a concept, and the maps that take them out: least-squares concept erasure.

Belrose et al. 2023 (LEACE): of all affine maps after which no linear probe finds the concept z in x, the one that moves
x least. With W the whitening of x it is x - W⁺ Q Qᵀ W (x - x̄), Q an orthonormal basis of the columns of W Σ_xz. The
maintained ``concept-erasure`` package makes it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from concept_erasure import LeaceFitter
from jaxtyping import Float, Float64, Int
from torch import Tensor

from probe.errors import ProbeError, unknown_name


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

    def erased(self, x: Float[Tensor, "*stack feature"]) -> Float[Tensor, "*stack feature"]:
        """x without that part, in its own dtype."""
        return (x - self.part(x)).to(x)


def concept_subspace(x: Float[Tensor, "row feature"], z: Float[Tensor, "row concept"]) -> Subspace:
    """The subspace of the concept z: without it no linear probe does better than a constant on these rows.

    Raises:
        ProbeError: for values that are not finite, or a concept that x tells nothing of.
    """
    if not (x.isfinite().all() and z.isfinite().all()):
        raise ProbeError("erasure wants finite hidden states and concepts, got NaN or infinity")
    x, z = x.double(), z.double()
    spread = z.std(0, correction=0)
    if not (spread > 0).any():
        raise ProbeError("a concept must vary over the rows, got one value")
    z = (z - z.mean(0))[:, spread > 0] / spread[spread > 0]
    # Everything that is there is erased (no shrinkage; the tolerance is relative to correlations of 1).
    fitter = LeaceFitter(x.shape[1], z.shape[1], dtype=torch.float64, shrinkage=False, svd_tol=1e-6)
    eraser = fitter.update(x, z).eraser
    left, right = eraser.proj_left, eraser.proj_right
    # The package keeps a column for every concept; those that the tolerance has set to 0 are dropped.
    kept = left.norm(dim=0) > 0
    if not kept.any():
        raise ProbeError("there is nothing to erase: these hidden states tell nothing of the concept")
    return Subspace(left[:, kept], right[kept], x.mean(0))


def random_subspace(x: Float[Tensor, "row feature"], rank: int, generator: torch.Generator) -> Subspace:
    """A subspace of that rank that has nothing to do with any concept: random directions of whitened x, taken out by
    the same kind of map. The control of ``concept_subspace``."""
    mean, (root, inverse, there) = x.double().mean(0), square_root(x)
    if rank > there:
        raise ProbeError(f"a random subspace of at most {there} dimensions was wanted, got {rank}")
    # Drawn in the coordinates of x, not of its eigenvectors, whose signs are not determined.
    drawn = torch.randn(x.shape[1], rank, generator=generator, dtype=torch.float64)
    q, _ = torch.linalg.qr(root @ inverse @ drawn)
    return Subspace(root @ q, q.T @ inverse, mean)


def square_root(x: Float[Tensor, "row feature"]) -> tuple[Tensor, Tensor, int]:
    """The symmetric square root of the covariance of x, its inverse where x varies, and in how many dimensions."""
    x = x.double() - x.double().mean(0)
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    there = values > values[-1] * len(values) * torch.finfo(torch.float32).eps
    values, vectors = values[there], vectors[:, there]
    return vectors * values.sqrt() @ vectors.T, vectors / values.sqrt() @ vectors.T, int(there.sum())


def _position(positions: Int[Tensor, "row"]) -> Float64[Tensor, "row concept"]:
    """Its number: erased from any linear regression, rank 1."""
    return positions[:, None].double()


def _classes(positions: Int[Tensor, "row"]) -> Float64[Tensor, "row concept"]:
    """One indicator each: erased from any linear classifier, rank up to T - 1."""
    return torch.nn.functional.one_hot(positions).double()


def concept(name: str, positions: Int[Tensor, "row"]) -> Float64[Tensor, "row concept"]:
    """The values of a concept at these positions."""
    if name not in CONCEPTS:
        raise unknown_name("concept", name, CONCEPTS)
    return CONCEPTS[name](positions)


CONCEPTS: dict[str, Callable[[Tensor], Tensor]] = {"position": _position, "classes": _classes}
