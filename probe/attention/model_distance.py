"""How far models' attention is from one another, as tidy rows with intervals over sequences and training seeds."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float64
from torch import Tensor

from probe.attention.comparison import check_comparable, check_names, checked_pattern
from probe.attention.distances import DISTANCES
from probe.attention.head_pairs import head_pair_distances
from probe.bootstrap import Bootstrap, drawn_shares
from probe.errors import ProbeError
from probe.tracing import Trace, distinct

Seeds = Trace | Sequence[Trace]
PerDraw = Float64[Tensor, "draw"]
# From the distances of all pairs of heads, in the mean and in each draw: the layer's, and the pair whose it is.
Aggregate = Callable[
    [Float64[Tensor, "head_a head_b"], Float64[Tensor, "draw head_a head_b"]],
    tuple[Float64[Tensor, ""], PerDraw, tuple[int, int] | None],
]


def compare_models(
    traces: Mapping[str, Seeds],
    distance: str = "jensen_shannon",
    *,
    aggregate: str = "minimum",
    n_bootstrap: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """The distance between the attention of each two models on the same sequences. Kazemnejad et al. 2023, §5.2.

    At layer l it is made by ``aggregate`` from the mean over sequences of D(P_h, Q_h′) for all pairs of heads
    (h, h′) ∈ H × H′, see ``pattern_distance``; for the models it is the mean over layers. Of models with several
    seeds it is the mean over all pairs of a seed of one and a seed of the other; a model with 2 seeds or more is
    compared with itself as well, by the pairs of its different seeds. Unit and range are the distance's.

    ``low`` and ``high`` are a percentile bootstrap interval: in each draw sequences are drawn with replacement, and of
    each model its seeds. So with several seeds it covers other sequences and other trainings of the models; of a model
    with one seed it says nothing about its other trainings. With 2 or 3 seeds it is rough, and too narrow. A model is
    compared with itself in draws that hold 2 different seeds at least, and never a seed with itself: of 2 seeds that
    is always the one pair, and the interval is over sequences. The minimum is taken anew in each draw. A minimum of
    noisy means is biased downward, and so is the interval; it narrows as sequences are added.

    Args:
        traces: patterns of every layer, by model name, one or one a seed; numbers of heads may differ.
        distance: a name in ``DISTANCES``.
        aggregate: a name in ``AGGREGATES``. "minimum": the nearest pair of heads, as in the paper. "matching": the
            mean over the pairs of the best one-to-one matching of heads, min(H, H′) of them, where the minimum may be
            that of a single common head; the matching of the mean is kept in all draws. "mcgill": the minimum over
            pairs h < h′ only, which the authors' released code takes (with the distance "mcgill_compat"); it depends
            on which model stands first.
        n_bootstrap, confidence, seed: number of draws, coverage in (0, 1), seed of the draws.

    Returns:
        Columns model_a, model_b (each unordered pair once), scope ("layer" or "mean"), layer, head_a, head_b (the
        nearest pair; missing where scope is "mean", where there are several seeds, and for a matching), distance,
        value, low, high, n (sequences), aggregate, n_seeds_a, n_seeds_b.

    Raises:
        ProbeError: for nothing to compare, models of different numbers of layers, traces of different sequences,
            unknown names, or values that are no attention patterns.
    """
    models, measure = _prepare(traces, distance, aggregate, n_bootstrap, confidence, seed)
    pairs = [
        (a, b)
        for a, b in itertools.combinations_with_replacement(models.values(), 2)
        if a is not b or len(a.traces) > 1
    ]
    if not pairs:
        raise ProbeError(
            f"a comparison wants at least 2 models, got {len(traces)}: {', '.join(traces) or 'none'} (1 seed)"
        )
    rows: list[dict[str, Any]] = []
    for a, b in pairs:
        pair = {"model_a": a.name, "model_b": b.name}
        of = {"n_seeds_a": len(a.traces), "n_seeds_b": len(b.traces)}
        found = [measure.layer(a, b, layer) for layer in range(measure.n_layers)]
        for layer, (value, draws, heads) in enumerate(found):
            head_a, head_b = heads or (pd.NA, pd.NA)
            where = {"scope": "layer", "layer": layer, "head_a": head_a, "head_b": head_b}
            rows.append(pair | where | measure.row(value, draws) | of)
        where = {"scope": "mean", "layer": pd.NA, "head_a": pd.NA, "head_b": pd.NA}
        rows.append(pair | where | measure.row(*_mean_over_layers(found)) | of)
    return pd.DataFrame(rows).astype({"layer": "Int64", "head_a": "Int64", "head_b": "Int64"})


def compare_to(
    traces: Mapping[str, Seeds],
    reference: str,
    distance: str = "jensen_shannon",
    *,
    aggregate: str = "minimum",
    n_bootstrap: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Which of two models is nearer to the reference, and how sure that is.

    For each two others X and Y the difference D(reference, X) - D(reference, Y) of the distances that
    ``compare_models`` gives for the models, with a paired interval: the same draws of sequences and of the reference's
    seeds on both sides. An interval that does not hold 0 tells the two apart, as far as it covers (see there).

    Args: those of ``compare_models``, and
        reference: a name in ``traces``.

    Returns:
        A row for each two others, in the order of their distance, so that ``model_a`` is the nearer one: columns
        reference, model_a, model_b, distance, aggregate, value_a, value_b, difference (0 at most), low, high, n
        (sequences), n_seeds_reference, n_seeds_a, n_seeds_b.

    Raises:
        ProbeError: as ``compare_models``; also for an unknown reference, fewer than 2 others, or infinite distances.
    """
    check_names("reference model", [reference], traces)
    models, measure = _prepare(traces, distance, aggregate, n_bootstrap, confidence, seed)
    fixed = models.pop(reference)
    if len(models) < 2:
        raise ProbeError(f"an order of models wants at least 2 beside the reference, got {', '.join(models) or 'none'}")
    found = {}
    for name, model in models.items():
        of_layers = [measure.layer(fixed, model, layer) for layer in range(measure.n_layers)]
        found[name] = _mean_over_layers(of_layers)
        if not found[name][0].isfinite():
            raise ProbeError(f"differences want finite distances, but that of {reference!r} and {name!r} is infinite")
    rows = []
    for a, b in itertools.combinations(sorted(found, key=lambda name: float(found[name][0])), 2):
        (value_a, draws_a), (value_b, draws_b) = found[a], found[b]
        row = measure.row(value_a - value_b, draws_a - draws_b)
        rows.append(
            {"reference": reference, "model_a": a, "model_b": b, "distance": distance, "aggregate": aggregate}
            | {"value_a": float(value_a), "value_b": float(value_b), "difference": row["value"]}
            | {"low": row["low"], "high": row["high"], "n": row["n"], "n_seeds_reference": len(fixed.traces)}
            | {"n_seeds_a": len(models[a].traces), "n_seeds_b": len(models[b].traces)}
        )
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class _Model:
    """A model's seeds, and what share of each draw they are; ``apart`` for draws that hold two different ones."""

    name: str
    traces: Sequence[Trace]
    shares: Float64[Tensor, "draw seed"]
    apart: Float64[Tensor, "draw seed"] | None


@dataclass(frozen=True)
class _Measure:
    """All that comparisons have in common."""

    n_layers: int
    distance: str
    aggregate: str
    bootstrap: Bootstrap

    def layer(self, a: _Model, b: _Model, layer: int) -> tuple[Tensor, PerDraw, tuple[int, int] | None]:
        """The distance at a layer, in the mean and in each draw, and the heads whose it is, if it is of two."""
        if a is b:
            assert a.apart is not None  # a model is compared with itself where it has two seeds
            seeds, shares = list(itertools.combinations(range(len(a.traces)), 2)), (a.apart, a.apart)
        else:
            seeds, shares = list(itertools.product(range(len(a.traces)), range(len(b.traces)))), (a.shares, b.shares)
        values, draws, weights = [], [], []
        for i, j in seeds:
            p = checked_pattern(a.traces[i], layer, f"model {a.name!r}, ")
            q = checked_pattern(b.traces[j], layer, f"model {b.name!r}, ")
            each = head_pair_distances(p, q, self.distance, a.traces[i].lengths)
            value, of_draws, heads = AGGREGATES[self.aggregate](each.mean(0), self.bootstrap.means(each))
            values.append(value)
            draws.append(of_draws)
            weights.append(shares[0][:, i] * shares[1][:, j])
        weight, of_draws = torch.stack(weights), torch.stack(draws)
        # Infinite distances of seeds that are not in the draw are not in its mean: 0 · inf would be NaN.
        mean = (weight * of_draws).where(weight > 0, 0.0).sum(0) / weight.sum(0)
        return torch.stack(values).mean(), mean, heads if len(seeds) == 1 else None

    def row(self, value: Tensor, draws: PerDraw) -> dict[str, Any]:
        low, high = self.bootstrap.interval(draws)
        return {
            "distance": self.distance,
            "value": float(value),
            "low": float(low),
            "high": float(high),
            "n": self.bootstrap.weights.shape[1],
            "aggregate": self.aggregate,
        }


def _prepare(
    traces: Mapping[str, Seeds], distance: str, aggregate: str, n_bootstrap: int, confidence: float, seed: int
) -> tuple[dict[str, _Model], _Measure]:
    check_names("distance", [distance], DISTANCES)
    check_names("aggregate", [aggregate], AGGREGATES)
    given = {name: [found] if isinstance(found, Trace) else list(found) for name, found in traces.items()}
    seeds = {
        name: [distinct(trace, f"the trace of {name!r}") for trace in of_model] for name, of_model in given.items()
    }
    for name, of_model in seeds.items():
        if not of_model:
            raise ProbeError(f"at least one trace of each model is wanted, got none of {name!r}")
    if not seeds:
        raise ProbeError("a comparison wants at least 2 models, got 0: none")
    first = next(iter(seeds))
    for name, of_model in seeds.items():
        for trace in of_model:
            check_comparable(first, seeds[first][0], name, trace)
    generator = torch.Generator().manual_seed(seed)
    bootstrap = Bootstrap.draw(len(seeds[first][0].tokens), n_bootstrap, confidence, generator)
    models = {}
    for name, of_model in seeds.items():
        n = len(of_model)
        apart = drawn_shares(n, n_bootstrap, generator, at_least=2) if n > 1 else None
        models[name] = _Model(name, of_model, drawn_shares(n, n_bootstrap, generator), apart)
    return models, _Measure(seeds[first][0].n_layers, distance, aggregate, bootstrap)


def _mean_over_layers(found: list[tuple[Tensor, PerDraw, tuple[int, int] | None]]) -> tuple[Tensor, PerDraw]:
    values, draws, _ = zip(*found, strict=True)
    return torch.stack(values).mean(), torch.stack(draws).mean(0)


def _nearest(mean: Tensor, draws: Tensor, pairs: Tensor) -> tuple[Tensor, PerDraw, tuple[int, int]]:
    """The minimum over these pairs of heads, "pair 2"; taken anew in each draw."""
    head_a, head_b = pairs[mean[pairs[:, 0], pairs[:, 1]].argmin()].tolist()
    return mean[head_a, head_b], draws[:, pairs[:, 0], pairs[:, 1]].amin(1), (head_a, head_b)


def _minimum(mean: Tensor, draws: Tensor) -> tuple[Tensor, PerDraw, tuple[int, int]]:
    return _nearest(mean, draws, torch.cartesian_prod(torch.arange(mean.shape[0]), torch.arange(mean.shape[1])))


def _mcgill(mean: Tensor, draws: Tensor) -> tuple[Tensor, PerDraw, tuple[int, int]]:
    pairs = torch.triu_indices(mean.shape[0], mean.shape[1], offset=1).T
    if not len(pairs):
        raise ProbeError(f"pairs of heads h < h′ want 2 heads or more, got {mean.shape[0]} and {mean.shape[1]}")
    return _nearest(mean, draws, pairs)


def _matching(mean: Tensor, draws: Tensor) -> tuple[Tensor, PerDraw, None]:
    from scipy.optimize import linear_sum_assignment  # a quarter of a second that nothing else here wants

    # Infinite pairs only where nothing else is left; the assignment wants numbers.
    finite = mean.where(mean.isfinite(), 0.0)
    cost = mean.where(mean.isfinite(), 1 + finite.max() * len(mean))
    heads_a, heads_b = (torch.from_numpy(heads) for heads in linear_sum_assignment(cost.numpy()))
    return mean[heads_a, heads_b].mean(), draws[:, heads_a, heads_b].mean(1), None


#: How the distances of all pairs of heads become that of a layer, by name; ``compare_models`` says what each does.
AGGREGATES: dict[str, Aggregate] = {"minimum": _minimum, "matching": _matching, "mcgill": _mcgill}
