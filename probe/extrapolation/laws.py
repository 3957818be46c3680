"""How the best temperature grows with the length, and which heads want it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from probe.errors import ProbeError
from probe.statistics import correlation_interval, permuted_correlation


@dataclass(frozen=True)
class LogLaw:
    """λ(s) = 1 + slope · ln s, s the factor by which the context is longer than the trained one.

    Wang et al. 2024 find .3973 with R² .977 for TinyLlama without position encoding.
    """

    slope: float  #: of λ - 1 over ln s, through the origin
    low: float  #: of the slope: the t interval of the regression; NaN where one point alone fixes it
    high: float  #: likewise
    r2: float  #: of λ about its mean, the points at s = 1 among them; NaN where λ is the same everywhere
    n: int  #: points that say something of the slope: those with s other than 1

    def __call__(self, extension: float) -> float:
        return 1 + self.slope * float(np.log(extension))


def fit_log_law(extensions: Sequence[float], scales: Sequence[float], confidence: float = 0.95) -> LogLaw:
    """The least squares fit of ``LogLaw``: slope = Σ ln s (λ - 1) / Σ ln² s.

    A point at s = 1 says nothing of the slope, and λ = 1 there by construction where the scale is relative to the
    trained length: it gives no degree of freedom. The interval assumes that all points scatter alike about the line.

    Args:
        extensions: s, as many as scales, above 0.
        scales: λ at each, above 0.
        confidence: coverage of the slope's interval, in (0, 1).

    Raises:
        ProbeError: for numbers that are not above 0, or no extension other than 1.
    """
    s, y = np.asarray(extensions, dtype=float), np.asarray(scales, dtype=float)
    if s.shape != y.shape or s.ndim != 1 or not (s > 0).all() or not (y > 0).all() or not np.isfinite(s + y).all():
        raise ProbeError(
            f"as many scales as extensions, all above 0, were wanted, got {list(scales)}, {list(extensions)}"
        )
    x = np.log(s)
    if not (x != 0).any():
        raise ProbeError(f"at least one extension other than 1 was wanted, got {list(extensions)}")
    slope = float(x @ (y - 1) / (x @ x))
    squares, total = (y - 1 - slope * x) ** 2, float(np.sum((y - y.mean()) ** 2))
    informs = x != 0
    half, n = np.nan, int(informs.sum())
    if n > 1:
        error = np.sqrt(float(squares[informs].sum()) / (n - 1) / float(x @ x))
        half = float(stats.t.ppf((1 + confidence) / 2, n - 1) * error)
    return LogLaw(slope, slope - half, slope + half, 1 - float(squares.sum()) / total if total else np.nan, n)


def scale_against(scale: np.ndarray, quantity: np.ndarray, *, confidence: float = 0.95, seed: int = 0) -> pd.DataFrame:
    """Correlation over heads of their λ with something else of theirs, such as the entropy of their attention.

    Args:
        scale: λ of each head, in any shape.
        quantity: the other number of each head, in the same shape.
        confidence: coverage of the intervals, in (0, 1).
        seed: of the permutations that are drawn where there are more than 8 heads.

    Returns:
        Columns metric ("pearson", "spearman"), value, low, high (Fisher's intervals; missing for 3 heads), p
        (two-sided, of heads paired at random) and n (heads).

    Raises:
        ProbeError: for fewer than three heads, or a quantity that is the same for all.
    """
    x, y = (np.asarray(a, dtype=float).ravel() for a in (scale, quantity))
    if x.shape != y.shape or len(x) < 3:
        raise ProbeError(f"as many scales as quantities, three heads at least, were wanted, got {len(x)} and {len(y)}")
    for what, values in (("scale", x), ("quantity", y)):
        if np.ptp(values) == 0:
            raise ProbeError(f"a {what} that differs between heads was wanted, got {values[0]:g} for all")
    rows = []
    for metric, (a, b) in {"pearson": (x, y), "spearman": (stats.rankdata(x), stats.rankdata(y))}.items():
        r = float(stats.pearsonr(a, b).statistic)
        low, high = correlation_interval(r, len(x), confidence, rank=metric == "spearman")
        rows.append((metric, r, low, high, permuted_correlation(a, b, seed), len(x)))
    return pd.DataFrame(rows, columns=["metric", "value", "low", "high", "p", "n"])
