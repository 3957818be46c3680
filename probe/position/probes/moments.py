"""First and second moments of hidden states and targets: all that a linear probe needs to know of the tokens.

Hidden states stream by and are forgotten. What stays is one matrix whose size does not depend on how many there were.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Float64
from scipy.linalg.blas import dsyrk, ssyrk
from torch import Tensor

from probe.errors import ProbeError
from probe.limits import current


def eigen(
    matrix: Float64[Tensor, "feature feature"],
) -> tuple[Float64[Tensor, "feature"], Float64[Tensor, "feature feature"]]:
    """Eigenvalues of a symmetric matrix without negative ones, in ascending order, and its eigenvectors.

    LAPACK's divide and conquer sometimes does not converge where very many eigenvalues are 0; the singular values are
    the same numbers, found in another way.
    """
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # torch does not list it
        vectors, values, _ = torch.linalg.svd(matrix)
        values, vectors = values.flip(0), vectors.flip(1)
    return values, vectors


def precision(dtype: torch.dtype) -> float:
    """How far, as a share of their size, rounding may move hidden states that a model computes in a dtype: some sixteen
    times in float32 and float64, in half precision by the last rounding of all, since its sums are float32."""
    eps = float(torch.finfo(dtype).eps)
    return max(eps, 16 * min(eps, float(torch.finfo(torch.float32).eps)))


def unit_scale(
    std: Float64[Tensor, "feature"], mean: Float64[Tensor, "feature"], eps: float
) -> Float64[Tensor, "feature"]:
    """What brings each feature to unit variance: 1 / its standard deviation, and 0 for a feature that is constant to
    the relative precision ``eps`` of the rows. All linear probes and edits go by this rule."""
    return torch.where(std > eps * mean.abs(), 1 / std, 0.0)


def unscale(x: Float[Tensor, "row feature"]) -> Float64[Tensor, "feature"]:
    """``unit_scale`` of the features of these rows."""
    std, mean = torch.std_mean(x.double(), dim=0, correction=0)
    return unit_scale(std, mean, precision(x.dtype))


def least_variance(values: Float64[Tensor, "feature"], eps: float) -> Float64[Tensor, ""]:
    """The variance up to which a direction counts as none, of the eigenvalues of a covariance in ascending order: what
    is smaller was made by rounding, of the rows with their relative precision ``eps`` or of the decomposition."""
    return values[-1].clamp(min=0) * max(eps**2, len(values) * torch.finfo(torch.float64).eps)


@dataclass(frozen=True)
class Moments:
    """The moments of rows z = (x, y), x of ``n_features`` features and y of some targets: Σ (z - o, 1)(z - o, 1)ᵀ.

    ``gram`` is that matrix, float64: the second moments about the ``origin`` o, bordered by the first ones and by the
    number of rows; it is symmetric, and the triangle below the diagonal is what is kept up to date. o stands among the
    rows, so that little cancels. Moments of disjoint sets of rows add up, and those of a part can be subtracted; Σ x xᵀ
    is there once for all targets.

    Sums are float64. The products that are summed are of a chunk of rows, in ``products``: in float32, at half the
    cost, an entry is within about 1e-7 √(Mᵢᵢ Mⱼⱼ), and a direction is lost which varies less than a three-thousandth as
    much as the features that it is made of. An R² moves by about 1e-7, coefficients by as much as the features are
    ill-conditioned, and with them an R² on other rows that vary where these do not: those of a few tokens want float64.
    """

    origin: Float64[Tensor, "column"]
    lower: Float64[Tensor, "bordered bordered"]  #: ``gram``, of which what stands above the diagonal means nothing
    n_features: int
    eps: float  #: the relative precision of the rows, below which a feature counts as constant
    products: torch.dtype

    @classmethod
    def of(
        cls, x: Float[Tensor, "row feature"], y: Float[Tensor, "row target"], products: torch.dtype | None = None
    ) -> "Moments":
        """The moments of these rows about their means."""
        return cls.about(x, y, products).and_rows(x, y)

    @classmethod
    def about(
        cls, x: Float[Tensor, "row feature"], y: Float[Tensor, "row target"], products: torch.dtype | None = None
    ) -> "Moments":
        """Those of no row, about the means of these rows: where to begin a stream that they are the first part of.
        Products are float64 where the rows are, float32 for all others, unless ``products`` says another."""
        # Any origin will do; one that is not finite would hide what is wrong with the rows.
        origin = torch.cat((x.double().mean(0), y.to(x.device).double().mean(0))).nan_to_num(0.0, 0.0, 0.0)
        # A number that float32 holds, so that rows of either dtype are centred on the very same one.
        origin = origin.float().double()
        n = len(origin) + 1
        products = products or (torch.float64 if x.dtype == torch.float64 else torch.float32)
        return cls(origin, origin.new_zeros(n, n), x.shape[1], precision(x.dtype), products)

    def and_rows(self, x: Float[Tensor, "row feature"], y: Float[Tensor, "row target"]) -> "Moments":
        """These moments and those of more rows."""
        d, total, n_rows = self.n_features, self.lower.clone(), current().moment_rows
        origin, y = self.origin.to(self.products), y.to(x.device)
        z = x.new_empty(min(n_rows, len(x)), len(total), dtype=self.products)
        z[:, -1] = 1
        product = torch.zeros_like(total, dtype=self.products)
        for i in range(0, len(x), n_rows):
            rows = z[: len(x) - i]
            torch.sub(x[i : i + n_rows], origin[:d], out=rows[:, :d])
            # Targets are float64, and may be far from what float32 holds: they are centred first.
            rows[:, d:-1] = y[i : i + n_rows] - self.origin[d:]
            if z.device.type == "cpu":
                # Half the work of a product that does not know its result to be symmetric. Fortran takes every matrix
                # for its transpose: the rows, and the triangle above the diagonal.
                syrk = dsyrk if self.products == torch.float64 else ssyrk
                syrk(1.0, rows.numpy().T, c=product.numpy().T, overwrite_c=1)
            else:
                torch.mm(rows.T, rows, out=product)
            total += product
        return replace(self, lower=total)

    def emptied(self) -> "Moments":
        """The moments of no row, about the same origin."""
        return replace(self, lower=torch.zeros_like(self.lower))

    @functools.cached_property
    def gram(self) -> Float64[Tensor, "bordered bordered"]:
        """The whole matrix."""
        return self.lower.tril() + self.lower.tril(-1).T

    @property
    def n(self) -> int:
        """The number of rows."""
        return round(float(self.lower[-1, -1]))

    def __add__(self, other: "Moments") -> "Moments":
        return replace(self, lower=self.lower + other.moved_to(self.origin).lower)

    def __sub__(self, other: "Moments") -> "Moments":
        return replace(self, lower=self.lower - other.moved_to(self.origin).lower)

    def moved_to(self, origin: Float64[Tensor, "column"]) -> "Moments":
        """The same about another origin: T M Tᵀ, where T adds the way from the new origin to the old."""
        if len(origin) != len(self.origin):
            raise ProbeError(f"moments of {len(origin)} columns and of {len(self.origin)} cannot be added")
        if torch.equal(origin, self.origin):
            return self
        move = torch.eye(len(self.gram), dtype=torch.float64, device=self.gram.device)
        move[:-1, -1] = self.origin - origin
        return replace(self, origin=origin, lower=move @ self.gram @ move.T)

    def of_targets(self, targets: Sequence[int]) -> "Moments":
        """The moments with only these targets, in this order."""
        d = self.n_features
        kept = torch.tensor([*range(d), *(d + t for t in targets), len(self.origin)], device=self.gram.device)
        return replace(self, origin=self.origin[kept[:-1]], lower=self.gram[kept][:, kept])

    @property
    def means(self) -> tuple[Float64[Tensor, "feature"], Float64[Tensor, "target"]]:
        """The means of features and targets."""
        mean = self.origin + self.gram[:-1, -1] / self.gram[-1, -1]
        return mean[: self.n_features], mean[self.n_features :]

    @property
    def scatter(self) -> Float64[Tensor, "column column"]:
        """Σ (z - z̄)(z - z̄)ᵀ."""
        sums = self.gram[:-1, -1]
        return self.gram[:-1, :-1] - torch.outer(sums, sums) / self.gram[-1, -1]

    def squared_errors(
        self, coef: Float64[Tensor, "*strength feature target"], intercept: Float64[Tensor, "*strength target"]
    ) -> Float64[Tensor, "*strength target"]:
        """Σ (y - x·w - b)² of a linear map on these rows, though they are gone: with e = (-w, 1 at the target, o_y -
        o_x·w - b) it is eᵀ M e."""
        d = self.n_features
        at_target = torch.eye(coef.shape[-1], dtype=torch.float64, device=coef.device).expand(*coef.shape[:-2], -1, -1)
        last = self.origin[d:] - self.origin[:d] @ coef - intercept
        e = torch.cat((-coef, at_target, last[..., None, :]), dim=-2)
        return (e * (self.gram @ e)).sum(-2)

    def r2(
        self, coef: Float64[Tensor, "*strength feature target"], intercept: Float64[Tensor, "*strength target"]
    ) -> Float64[Tensor, "*strength target"]:
        """1 - Σ (y - x·w - b)² / Σ (y - ȳ)² of a linear map on these rows; at most 1, and below 0 worse than ȳ."""
        return 1 - self.squared_errors(coef, intercept) / self.scatter.diagonal()[self.n_features :]

    def checked(self, where: str, targets: Sequence[str]) -> "Moments":
        """These moments, if a probe can be fitted to them.

        Raises:
            ProbeError: for fewer than two rows, values that are not finite, or a target that does not vary.
        """
        if not self.gram.isfinite().all():
            raise ProbeError(f"hidden states at {where!r} must be finite, got NaN or infinity")
        if self.n < 2:
            raise ProbeError(
                f"a probe of {', '.join(targets)} wants at least 2 tokens where it is defined, got {self.n}"
            )
        spread = (self.scatter.diagonal()[self.n_features :] / self.n).clamp(min=0).sqrt()
        _, mean = self.means
        for name, constant in zip(targets, (spread <= 1e-12 * (1 + mean.abs())).tolist(), strict=True):
            if constant:
                raise ProbeError(f"target {name!r} must vary over the training tokens, got one value")
        return self


def as_columns(y: np.ndarray) -> Float64[Tensor, "row target"]:
    """Targets as a float64 matrix, a vector as one column."""
    columns = torch.as_tensor(np.require(y, np.float64, "W"))  # torch wants to be able to write
    return columns[:, None] if columns.ndim == 1 else columns
