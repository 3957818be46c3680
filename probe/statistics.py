"""Intervals and tests: the one home of every number that says how sure another number is.

Three kinds of interval, and a row says in ``interval`` which one it has where there could be several:

- over "sequences" (texts, examples): a bootstrap with expanded percentiles (``Bootstrap``). It says what other
  sequences of the same kind would give, of these very models;
- over "trainings" (or tasks): Student's t over models that were trained alike (``student``), or the jackknife where a
  number belongs to pairs of them (``over_trainings``). It says what other trainings would give;
- over "both": the variances of both added (``over_trainings``).

From a single training nothing can be said of others, so that there is no interval over trainings then.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64
from scipy import stats
from torch import Tensor

from probe.config import check_number
from probe.errors import ProbeError

N_BOOTSTRAP = 1000  #: draws of a bootstrap by default
ROUNDING = 1e-6  #: nats a token: less is what rounding makes of a change that is none

SEQUENCES, TRAININGS, BOTH, TASKS, NONE = "sequences", "trainings", "both", "tasks", "none"  #: kinds of interval


def drawn_shares(n: int, n_draws: int, generator: torch.Generator) -> Float64[Tensor, "{n_draws} {n}"]:
    """Draw n of n things with replacement, n_draws times: what share of a draw each of them is."""
    drawn = torch.randint(n, (n_draws, n), generator=generator)
    count = torch.zeros(n_draws, n, dtype=torch.float64)
    return count.scatter_add_(1, drawn, torch.ones_like(count)) / n


def expanded_tail(confidence: float, n: int) -> float:
    """The share of a bootstrap's draws to leave out on each side, for n things that were drawn from.

    Percentiles of draws are too narrow for few things: they know neither that a variance of n has n - 1 degrees of
    freedom, nor Student's t. Hesterberg 2015, section 3.4: the percentiles that stand where the t interval of a mean
    ends, Φ(-t √(n / (n - 1))). With 1,000 draws there are such percentiles from n = 6 on; for fewer things the interval
    ends at the outermost draws, and is too narrow.
    """
    if n < 2:
        return (1 - confidence) / 2
    return float(stats.norm.cdf(-stats.t.ppf((1 + confidence) / 2, n - 1) * math.sqrt(n / (n - 1))))


@dataclass(frozen=True)
class Bootstrap:
    """The same draws of n sequences for all that is measured on them, so that differences are paired."""

    weights: Float64[Tensor, "draw sequence"]
    confidence: float

    @classmethod
    def draw(cls, n_sequences: int, n_draws: int, confidence: float, seed: int | torch.Generator) -> "Bootstrap":
        """Draw n_draws times n of n sequences; ``weights`` says what share of a draw each sequence is.

        Raises:
            ProbeError: for no draw at all, or a confidence outside (0, 1).
        """
        if n_draws < 1:
            raise ProbeError(f"n_bootstrap must be at least 1, got {n_draws}")
        if not 0 < confidence < 1:
            raise ProbeError(f"confidence must be in (0, 1), got {confidence}")
        generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
        return cls(drawn_shares(n_sequences, n_draws, generator), confidence)

    @property
    def value_and_draws(self) -> Float64[Tensor, "one_and_draw sequence"]:
        """``weights`` with the mean over all sequences, which is the value itself, as the first row."""
        n = self.weights.shape[1]
        return torch.cat((torch.full((1, n), 1 / n, dtype=torch.float64), self.weights))

    def means(self, values: Float64[Tensor, "sequence *rest"]) -> Float64[Tensor, "draw *rest"]:
        """The mean of each draw; infinite where an infinite value was drawn."""
        infinite = values.isinf()
        means = torch.tensordot(self.weights, values.masked_fill(infinite, 0.0), dims=1)
        if not infinite.any():
            return means
        # 0 · inf would be NaN, so infinite values are counted instead of weighted; distances have no -inf.
        return means.masked_fill(torch.tensordot(self.weights, infinite.double(), dims=1) > 0, math.inf)

    def interval(
        self, means: Float64[Tensor, "draw *rest"]
    ) -> tuple[Float64[Tensor, "*rest"], Float64[Tensor, "*rest"]]:
        """The expanded percentiles of the draws (``expanded_tail``): order statistics, rounded outward and not
        interpolated, so that infinite ones stay infinite. NaN for a single sequence, which has no interval."""
        if self.weights.shape[1] == 1:
            none = torch.full(means.shape[1:], math.nan, dtype=torch.float64)
            return none, none
        ordered, last = means.sort(dim=0).values, len(means) - 1
        tail = expanded_tail(self.confidence, self.weights.shape[1])
        return ordered[math.floor(tail * last)], ordered[math.ceil((1 - tail) * last)]


@dataclass(frozen=True)
class Interval:
    """A value with its interval, NaN where there is none, and over what it is."""

    value: float
    low: float
    high: float
    kind: str

    def within(self, least: float, most: float) -> "Interval":
        """The same, where no value is below ``least`` or above ``most``."""
        return Interval(self.value, max(self.low, least), min(self.high, most), self.kind)


def student(values: Sequence[float] | np.ndarray, confidence: float, kind: str = TRAININGS) -> Interval:
    """The mean of independent values and its Student t interval; none for a single value."""
    check_number("confidence", confidence, 0, 1)
    x = np.asarray(values, dtype=float)
    if len(x) < 2:
        return Interval(float(x.mean()), math.nan, math.nan, NONE)
    half = float(stats.t.ppf((1 + confidence) / 2, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)))
    return Interval(float(x.mean()), float(x.mean()) - half, float(x.mean()) + half, kind)


def jackknife_variance(left_out: Sequence[float] | np.ndarray) -> float:
    """The variance of an estimate, from its values θ₋ᵢ without each of n independent things in turn.

    It is (n - 1)/n Σ (θ₋ᵢ - θ̄)². Tukey 1958; Efron & Tibshirani 1993, chapter 11.
    """
    x = np.asarray(left_out, dtype=float)
    return float((len(x) - 1) / len(x) * ((x - x.mean()) ** 2).sum())


def jackknife(
    value: float, left_out: Sequence[float] | np.ndarray, confidence: float, kind: str = SEQUENCES
) -> Interval:
    """An estimate with Student's t times the jackknife's standard error; none where an estimate is not a number."""
    if len(left_out) < 2 or not np.isfinite([value, *left_out]).all():
        return Interval(value, math.nan, math.nan, NONE)
    half = float(stats.t.ppf((1 + confidence) / 2, len(left_out) - 1)) * math.sqrt(jackknife_variance(left_out))
    return Interval(value, value - half, value + half, kind)


def over_trainings(
    value: float,
    left_out: Sequence[Sequence[float]],
    draws: Float[Tensor, "draw"],
    n_sequences: int,
    confidence: float,
    positive: bool = False,
) -> Interval:
    """The interval of an estimate from several trainings of one or more models, on the same sequences.

    The variance over trainings is the jackknife's, summed over the models, whose trainings are independent; that over
    sequences is the variance of the bootstrap's draws, which all trainings share. Their sum gets Student's t with as
    many degrees of freedom as the model with the fewest trainings has, less 1. That is conservative: the degrees of
    freedom of Welch & Satterthwaite are more, and with 3 trainings their intervals hold the truth in 91 of 100 cases.

    Args:
        value: the estimate.
        left_out: for each model, the estimate without each of its trainings in turn: at least 2 of each.
        draws: the estimate on draws of the sequences.
        n_sequences: how many there are.
        confidence: in (0, 1).
        positive: take everything on a logarithmic scale, for an estimate that varies as a variance does: the mean
            distance of a model's own trainings from each other is one.

    Returns:
        The interval, of kind "both", or "trainings" for a single sequence; none where a value is infinite.
    """
    if not np.isfinite([value, *itertools.chain(*left_out)]).all() or not draws.isfinite().all():
        return Interval(value, math.nan, math.nan, NONE)
    if positive:
        if not (np.array([value, *itertools.chain(*left_out)]) > 0).all() or not (draws > 0).all():
            return Interval(value, math.nan, math.nan, NONE)
        logs = [[math.log(v) for v in of] for of in left_out]
        found = over_trainings(math.log(value), logs, draws.log(), n_sequences, confidence)
        return Interval(value, math.exp(found.low), math.exp(min(found.high, 700)), found.kind)
    variance, kind = sum(jackknife_variance(of) for of in left_out), TRAININGS
    if n_sequences > 1 and len(draws) > 1:
        variance += float(draws.double().var(correction=0)) * n_sequences / (n_sequences - 1)
        kind = BOTH
    freedom = min(len(of) for of in left_out) - 1
    half = float(stats.t.ppf((1 + confidence) / 2, freedom)) * math.sqrt(variance)
    return Interval(value, value - half, value + half, kind)


def correlation_interval(r: float, n: int, confidence: float, rank: bool = False) -> tuple[float, float]:
    """Fisher's interval of a correlation of n independent pairs: tanh(artanh r ∓ z / √(n - 3)), for Spearman's rank
    correlation √((1 + r²/2) / (n - 3)) in place of 1/√(n - 3) (Bonett & Wright 2000). NaN for fewer than 4 pairs."""
    if n < 4:
        return math.nan, math.nan
    # r is at most one rounding short of 1, where artanh ends.
    centre = math.atanh(max(-1 + 1e-15, min(1 - 1e-15, r)))
    half = float(stats.norm.ppf((1 + confidence) / 2)) * math.sqrt((1 + r * r / 2 if rank else 1) / (n - 3))
    return math.tanh(centre - half), math.tanh(centre + half)


def wilson(held: int, n: int, confidence: float) -> tuple[float, float]:
    """Wilson's interval of a share, of which ``held`` of ``n`` were counted. Wilson 1927."""
    found = stats.binomtest(held, n).proportion_ci(confidence, method="wilson")
    return float(found.low), float(found.high)


def p_value(effect: float, controls: Sequence[float]) -> float:
    """By how many of the controls an effect is reached, itself among them: (1 + #{control ≥ effect}) / (1 + n).

    Phipson & Smyth 2010: a p that is never 0, and at most α in at most a share α of cases if the effect is one more
    control. NaN without controls.
    """
    return (1 + sum(c >= effect for c in controls)) / (1 + len(controls)) if controls else math.nan


def sign_flip(differences: np.ndarray, seed: int) -> float:
    """The two-sided p of a mean difference when every sign is a coin's; exact for at most 16 differences."""
    if len(differences) < 2 or not differences.any():
        return 1.0
    test = stats.permutation_test(
        (differences,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=2**16,
        rng=np.random.default_rng(seed),
    )
    return float(test.pvalue)


def permuted_correlation(x: np.ndarray, y: np.ndarray, seed: int) -> float:
    """The two-sided p of a correlation of x and y, of pairing them at random; exact for at most 8 pairs."""
    x, y = (a - a.mean() for a in (x, y))
    # Rounded: pairings that give the same correlation in another order of sums are equal.
    test = stats.permutation_test(
        (x,),
        lambda a, axis=-1: np.abs((a * y).sum(axis)).round(9),
        permutation_type="pairings",
        vectorized=True,
        alternative="greater",
        n_resamples=math.factorial(8),
        rng=np.random.default_rng(seed),
    )
    return float(test.pvalue)


def holm(p: np.ndarray) -> np.ndarray:
    """p values corrected for their number, step by step downward. Holm 1979."""
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    corrected = np.empty_like(stepped)
    corrected[order] = np.minimum(stepped, 1.0)
    return corrected
