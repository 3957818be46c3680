"""How the best temperature grows with the length, and which heads want it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from probe.bootstrap import Bootstrap
from probe.errors import ProbeError


@dataclass(frozen=True)
class LogLaw:
    """λ(s) = 1 + slope · ln s, s the factor by which the context is longer than the trained one.

    Wang et al. 2024 find .3973 with R² .977 for TinyLlama without position encoding.
    """

    slope: float  #: of λ - 1 over ln s, through the origin
    low: float  #: of the slope: the t interval of the regression; NaN where one point alone fixes it
    high: float  #: likewise
    r2: float  #: of λ about its mean; NaN where λ is the same everywhere
    n: int  #: points

    def __call__(self, extension: float) -> float:
        return 1 + self.slope * float(np.log(extension))


def fit_log_law(extensions: Sequence[float], scales: Sequence[float], confidence: float = 0.95) -> LogLaw:
    """The least squares fit of ``LogLaw``: slope = Σ ln s (λ - 1) / Σ ln² s.

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
    rest = float(np.sum((y - 1 - slope * x) ** 2))
    total = float(np.sum((y - y.mean()) ** 2))
    half = np.nan
    if len(x) > 1:
        half = float(stats.t.ppf((1 + confidence) / 2, len(x) - 1) * np.sqrt(rest / (len(x) - 1) / (x @ x)))
    return LogLaw(slope, slope - half, slope + half, 1 - rest / total if total else np.nan, len(x))


def scale_against(
    scale: np.ndarray, quantity: np.ndarray, *, n_bootstrap: int = 1000, confidence: float = 0.95, seed: int = 0
) -> pd.DataFrame:
    """Correlation over heads of their λ with something else of theirs, such as the entropy of their attention.

    Returns:
        Columns metric ("pearson", "spearman"), value, low, high (percentile intervals over heads), p (of no
        correlation) and n (heads).

    Raises:
        ProbeError: for fewer than three heads, or a quantity that is the same for all.
    """
    x, y = (np.asarray(a, dtype=float).ravel() for a in (scale, quantity))
    if x.shape != y.shape or len(x) < 3:
        raise ProbeError(f"as many scales as quantities, three heads at least, were wanted, got {len(x)} and {len(y)}")
    for what, values in (("scale", x), ("quantity", y)):
        if np.ptp(values) == 0:
            raise ProbeError(f"a {what} that differs between heads was wanted, got {values[0]:g} for all")
    bootstrap = Bootstrap.draw(len(x), n_bootstrap, confidence, seed)
    weights = bootstrap.weights.numpy()
    rows = []
    tests: dict[str, tuple[Any, tuple[np.ndarray, np.ndarray]]] = {
        "pearson": (stats.pearsonr(x, y), (x, y)),
        "spearman": (stats.spearmanr(x, y), (stats.rankdata(x), stats.rankdata(y))),
    }
    for metric, (found, of) in tests.items():
        draws = _correlations(weights, *of)
        tail = (1 - confidence) / 2
        low, high = np.nanquantile(draws, (tail, 1 - tail))
        rows.append((metric, float(found.statistic), float(low), float(high), float(found.pvalue), len(x)))
    return pd.DataFrame(rows, columns=["metric", "value", "low", "high", "p", "n"])


def _correlations(weights: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pearson's correlation of each draw; NaN where one head alone was drawn."""
    dx, dy = x - (weights @ x)[:, None], y - (weights @ y)[:, None]
    xx, yy, xy = ((weights * each).sum(1) for each in (dx * dx, dy * dy, dx * dy))
    with np.errstate(invalid="ignore", divide="ignore"):
        return xy / np.sqrt(xx * yy)
