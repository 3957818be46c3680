"""What a fitted split says: its parts with every freedom settled, their shares of the variance, f_rel's shape."""

import itertools
import math
from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from jaxtyping import Float64
from torch import Tensor

from probe.attention.score_split.design import Design
from probe.attention.score_split.sums import PARTS
from probe.limits import current
from probe.models.encodings import t5_bucket
from probe.statistics import Bootstrap

# A variance that is less of that of all scores is what rounding made: there is nothing of which a share could be had.
NOTHING = 1e-12

CURVES = {"key": "f_abs", "query": "g", "distance": "f_rel"}

Stack = Float64[Tensor, "draw head"]  # the first draw is the value
Stacks = dict[tuple[str, str, str], Stack]  # by scope, part, metric


def settled(theta: Float64[Tensor, "*stack unknown"], design: Design) -> Float64[Tensor, "*stack part=3 position"]:
    """The parts by key, query and distance after what no data determine is settled: f_abs without a slope over the keys
    1…T-1 (weighted by cells), its linear trend being f_rel's, and each part with mean 0 over cells."""
    n = design.n
    parts = theta[..., : 3 * n].unflatten(-1, (3, n))
    cells = design.diagonal[: 3 * n].view(3, n)
    at = torch.arange(n, dtype=torch.float64)
    slope = _slope(parts[..., 0, 1:], cells[0, 1:])[..., None]
    parts = parts + slope[..., None] * at * torch.tensor([[-1.0], [1.0], [-1.0]])
    means = (parts * cells).sum(-1, keepdim=True) / cells.sum(-1, keepdim=True)
    # What no cell has (the distances beyond a window) is 0 here, and no row is made of it.
    return torch.where(cells > 0, parts - means, 0.0)


def _slope(y: Float64[Tensor, "*stack position"], weights: Float64[Tensor, "position"]) -> Float64[Tensor, "*stack"]:
    """The slope of the weighted least squares line through y at 0, 1, 2, …; 0 where one point has all the weight."""
    x = torch.arange(len(weights), dtype=torch.float64)
    x = x - (weights * x).sum() / weights.sum()
    spread = (weights * x.square()).sum()
    return (weights * x * y).sum(-1) / spread if spread > 0 else torch.zeros_like(y[..., 0])


def subsets(parts: Sequence[str]) -> list[tuple[str, ...]]:
    return [s for size in range(1, len(parts) + 1) for s in itertools.combinations(parts, size)]


Left = Mapping[tuple[str, ...], Float64[Tensor, "sequence head"]]  # what each subset of the parts leaves unexplained


def share_rows(left: Left, within_rows: Left, weights: Tensor | None) -> Stacks:
    """All shares of variance, from what each subset of the parts leaves unexplained: of the squares of all scores, and
    of scores less the mean of their row."""

    def drawn(of: Left) -> dict[tuple[str, ...], Tensor]:
        return {s: v.sum(0, keepdim=True) if weights is None else weights @ v for s, v in of.items()}

    unexplained, seen = drawn(left), drawn(within_rows)
    rows: Stacks = {}
    for scope, get in (("all", unexplained), ("seen", seen)):
        of = max(get, key=len)
        whole = or_nan(get[()], unexplained[()])
        for part in of:
            others = [s for s in [(), *subsets([p for p in of if p != part])]]
            gains = (
                math.factorial(len(s))
                * math.factorial(len(of) - len(s) - 1)
                * (get[s] - get[tuple(p for p in of if p == part or p in s)])
                for s in others
            )
            rows[scope, part, "share"] = sum(gains) / math.factorial(len(of)) / whole
        rows[scope, "residual", "share"] = get[of] / whole
    rows["seen", "distance", "toeplitz_r2"] = 1 - seen["distance",] / whole
    return rows


def or_nan(variance: Stack, of_all: Float64[Tensor, "#draw head"]) -> Stack:
    """A variance, NaN where it is none beside that of all scores."""
    return variance.where(variance > NOTHING * of_all, math.nan)


class Curves:
    """The parts of one layer, and how they move from draw to draw.

    ``basis[0]`` is the split and ``basis[b]`` the pull of sequence b: a draw is ``coefficients @ basis``. So what is
    linear is taken of the basis, and what is quadratic of its inner products, and the draws, which at a long length
    would fill the memory, are made for some positions at a time.
    """

    def __init__(
        self,
        basis: Float64[Tensor, "one_and_sequence head part=3 position"],
        weights: Float64[Tensor, "draw sequence"] | None,
        design: Design,
    ):
        n = len(basis) - 1
        # All keys and queries are in some cell; distances beyond the widest row of keys are in none, and end here.
        self.cells = design.diagonal[2 * design.n : 2 * design.n + design.window]
        self.parts = dict(zip(PARTS, basis.unbind(-2), strict=True))
        self.parts["distance"] = self.parts["distance"][..., : design.window]
        if weights is None:
            self.coefficients = torch.ones(1, 1, dtype=torch.float64)
        else:
            self.coefficients = torch.cat((torch.ones(len(weights), 1, dtype=torch.float64), n * weights - 1), dim=1)

    def shape(self, variance: Float64[Tensor, "head"]) -> Stacks:
        """What f_rel looks like: its slope, and how much of it a line, a logarithm and T5's buckets explain; the last
        are NaN where f_rel is none beside the variance of all scores."""
        f_rel = self.parts["distance"]
        whole = or_nan(self._squares(f_rel), variance[None])
        rows = {("seen", "distance", "slope"): -self.coefficients @ _slope(f_rel, self.cells)}
        for name, fitted in self._imitations().items():
            rows["seen", "distance", f"{name}_r2"] = 1 - self._squares(f_rel - fitted) / whole
        return rows

    def _squares(self, x: Float64[Tensor, "one_and_sequence head distance"]) -> Float64[Tensor, "draw head"]:
        """The sum of squares over cells, in every draw."""
        products = torch.einsum("ahd,bhd,d->hab", x, x, self.cells)
        return torch.einsum("ka,hab,kb->kh", self.coefficients, products, self.coefficients)

    def _imitations(self) -> dict[str, Float64[Tensor, "one_and_sequence head distance"]]:
        """What is nearest to f_rel, by least squares over cells, among ALiBi's lines, multiples of ln(1 + d), and T5's
        biases; f_rel has mean 0 over cells, and so have they."""
        f_rel, cells = self.parts["distance"], self.cells

        def line(x: Float64[Tensor, "distance"]) -> Tensor:
            x = x - (cells * x).sum() / cells.sum()
            return x * ((cells * x * f_rel).sum(-1) / (cells * x.square()).sum())[..., None]

        distance = torch.arange(f_rel.shape[-1])
        t5 = self._by_bucket()[..., t5_bucket(distance)]
        return {"alibi": line(distance.double()), "logarithm": line(distance.double().log1p()), "t5": t5}

    def _by_bucket(self) -> Float64[Tensor, "one_and_sequence head bucket"]:
        """The mean of f_rel over the cells of each of T5's buckets."""
        f_rel, cells = self.parts["distance"], self.cells
        bucket = t5_bucket(torch.arange(len(cells))).expand(f_rel.shape)
        total = f_rel.new_zeros(*f_rel.shape[:-1], int(bucket.max()) + 1)
        return total.scatter_add(-1, bucket, f_rel * cells) / total.scatter_add(-1, bucket, cells.expand(f_rel.shape))

    def rows(self, bootstrap: Bootstrap | None) -> pd.DataFrame:
        """Columns head, curve, index, value, low, high."""
        imitations = {f"f_rel_{name}": fitted for name, fitted in self._imitations().items() if name != "logarithm"}
        named = {CURVES[part]: values for part, values in self.parts.items()} | imitations
        frames = []
        for curve, values in (named | {"t5_bucket": self._by_bucket()}).items():
            head, index = torch.meshgrid(*(torch.arange(size) for size in values.shape[1:]), indexing="ij")
            split = values.flatten(1).split(current().curve_block, dim=1)
            chunks = [with_interval(self.coefficients @ chunk, bootstrap) for chunk in split]
            columns = {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
            frames.append(pd.DataFrame({"head": head.flatten(), "curve": curve, "index": index.flatten()} | columns))
        return pd.concat(frames)


def with_interval(stack: Float64[Tensor, "draw entry"], bootstrap: Bootstrap | None) -> dict[str, Tensor]:
    missing = torch.full_like(stack[0], math.nan)
    low, high = (missing, missing) if bootstrap is None or len(stack) == 1 else bootstrap.interval(stack[1:])
    return {"value": stack[0], "low": low, "high": high}
