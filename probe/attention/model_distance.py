"""How far models' attention is from one another, as tidy rows with intervals over sequences and training seeds."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float64, Int
from torch import Tensor

from probe.attention.comparison import check_comparable, check_names, checked_pattern, halves
from probe.attention.distances import DISTANCES
from probe.attention.head_pairs import head_pair_distances
from probe.errors import ProbeError
from probe.statistics import N_BOOTSTRAP, NONE, SEQUENCES, Bootstrap, Interval, over_trainings
from probe.tracing import PATTERN, Trace, distinct

Seeds = Trace | Sequence[Trace]
# The pairs of heads whose distances make a layer's, from the mean distances of all: a head of a and one of b each.
Aggregate = Callable[[Float64[Tensor, "head_a head_b"]], tuple[Int[Tensor, "chosen_pair"], Int[Tensor, "chosen_pair"]]]


def compare_models(
    traces: Mapping[str, Seeds],
    distance: str = "jensen_shannon",
    *,
    aggregate: str = "minimum",
    n_bootstrap: int = N_BOOTSTRAP,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """The distance between the attention of each two models on the same sequences. Kazemnejad et al. 2023, §5.2.

    At layer l it is the mean over sequences of D(P_h, Q_h′), see ``pattern_distance``, of those pairs of heads
    (h, h′) ∈ H × H′ that ``aggregate`` chooses; for the models it is the mean over layers. The pairs are chosen on the
    first half of the sequences and measured on the other half: the least of many noisy means is too small if it is
    measured on what it was chosen by. Of models with several seeds the distance
    is the mean over all pairs of a seed of one and a seed of the other; a model with 2 seeds or more is compared with
    itself as well, by the pairs of its different seeds. Unit and range are the distance's.

    ``interval`` says what ``low`` and ``high`` are over. "both": other sequences and other trainings, where each of the
    two models has at least 2 seeds (one that is compared with itself, at least 3), by the jackknife over seeds with
    Student's t (``probe.statistics.over_trainings``). "sequences": a bootstrap over sequences of these very trainings;
    of a model with a single seed nothing can be said of its other trainings. "none": where the value is infinite and
    trainings count, and for "mcgill", whose minimum is chosen and measured on the same sequences.

    Args:
        traces: patterns of every layer, by model name, one or one a seed; numbers of heads may differ.
        distance: a name in ``DISTANCES``.
        aggregate: a name in ``AGGREGATES``. "minimum": the nearest pair of heads, as in the paper. "matching": the
            mean over the pairs of the best one-to-one matching of heads, min(H, H′) of them, where the minimum may be
            that of a single common head. "mcgill": the minimum over pairs h < h′ only, which the authors' released code
            takes (with the distance "mcgill_compat"), measured on all sequences, as there; it depends on which model
            stands first.
        n_bootstrap, confidence, seed: number of draws, coverage in (0, 1), seed of the draws.

    Returns:
        Columns model_a, model_b (each unordered pair once), scope ("layer" or "mean"), layer, head_a, head_b (the
        chosen pair; missing where scope is "mean", where there are several seeds, and for a
        matching), distance, value, low, high, interval, n (sequences measured), aggregate, n_seeds_a, n_seeds_b.

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
        found = [measure.layer(a, b, layer) for layer in measure.layers]
        for layer, of_layer in zip(measure.layers, found, strict=True):
            head_a, head_b = of_layer.heads or (pd.NA, pd.NA)
            where = {"scope": "layer", "layer": layer, "head_a": head_a, "head_b": head_b}
            rows.append(pair | where | measure.row(of_layer) | of)
        where = {"scope": "mean", "layer": pd.NA, "head_a": pd.NA, "head_b": pd.NA}
        rows.append(pair | where | measure.row(_Pairs.mean(found)) | of)
    return pd.DataFrame(rows).astype({"layer": "Int64", "head_a": "Int64", "head_b": "Int64"})


def compare_to(
    traces: Mapping[str, Seeds],
    reference: str,
    distance: str = "jensen_shannon",
    *,
    aggregate: str = "minimum",
    n_bootstrap: int = N_BOOTSTRAP,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Which of two models is nearer to the reference, and how sure that is.

    For each two others X and Y the difference D(reference, X) - D(reference, Y) of the distances that
    ``compare_models`` gives for the models, with a paired interval: the same sequences and the same seeds of the
    reference on both sides. An interval that does not hold 0 tells the two apart. It is over "both", sequences and
    trainings, where all three models have at least 2 seeds, else over "sequences" only.

    Args: those of ``compare_models``, and
        reference: a name in ``traces``.

    Returns:
        A row for each two others, in the order of their distance, so that ``model_a`` is the nearer one: columns
        reference, model_a, model_b, metric (which distance), aggregate, value_a, value_b, value (the first less the
        second, 0 at most), low, high, interval,
        n (sequences), n_seeds_reference, n_seeds_a, n_seeds_b.

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
        found[name] = _Pairs.mean([measure.layer(fixed, model, layer) for layer in measure.layers])
        if not math.isfinite(found[name].value()):
            raise ProbeError(f"differences want finite distances, but that of {reference!r} and {name!r} is infinite")
    rows = []
    for a, b in itertools.combinations(sorted(found, key=lambda name: found[name].value()), 2):
        interval = measure.difference(found[a], found[b])
        rows.append(
            {"reference": reference, "model_a": a, "model_b": b, "metric": distance, "aggregate": aggregate}
            | {"value_a": found[a].value(), "value_b": found[b].value(), "value": interval.value}
            | {"low": interval.low, "high": interval.high, "interval": interval.kind, "n": measure.n_sequences}
            | {"n_seeds_reference": len(fixed.traces)}
            | {"n_seeds_a": len(models[a].traces), "n_seeds_b": len(models[b].traces)}
        )
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class _Model:
    """A model's seeds."""

    name: str
    traces: Sequence[Trace]


@dataclass(frozen=True)
class _Pairs:
    """The distance of each seed of a from each of b: ``values``, and ``draws`` of sequences. Of a model and itself only
    the pairs i < j count. ``heads``: whose the distance is, if it is of two."""

    values: Float64[Tensor, "seed_a seed_b"]
    draws: Float64[Tensor, "draw seed_a seed_b"]
    itself: bool
    heads: tuple[int, int] | None

    @classmethod
    def mean(cls, found: Sequence["_Pairs"]) -> "_Pairs":
        """The mean over layers."""
        values, draws = (torch.stack([getattr(p, name) for p in found]).mean(0) for name in ("values", "draws"))
        return cls(values, draws, found[0].itself, None)

    def counted(self, without_a: int | None = None, without_b: int | None = None) -> Bool[Tensor, "seed_a seed_b"]:
        """The pairs of seeds that count, without those of a seed of a and one of b."""
        counted = torch.ones_like(self.values, dtype=torch.bool)
        if without_a is not None:
            counted[without_a] = False
        if without_b is not None:
            counted[:, without_b] = False
        return counted.triu(1) if self.itself else counted

    def value(self, without_a: int | None = None, without_b: int | None = None) -> float:
        """The mean over pairs of seeds."""
        return float(self.values[self.counted(without_a, without_b)].mean())

    def of_draws(self) -> Float64[Tensor, "draw"]:
        """The same in each draw of the sequences."""
        return self.draws[:, self.counted()].mean(1)

    @property
    def n_seeds(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]


@dataclass(frozen=True)
class _Measure:
    """All that comparisons have in common."""

    layers: Sequence[int]
    distance: str
    aggregate: str
    chosen_on: slice
    measured_on: slice
    bootstrap: Bootstrap

    @property
    def n_sequences(self) -> int:
        return self.bootstrap.weights.shape[1]

    def layer(self, a: _Model, b: _Model, layer: int) -> _Pairs:
        """The distances of all pairs of seeds at a layer."""
        values = torch.zeros(len(a.traces), len(b.traces), dtype=torch.float64)
        draws = values.new_zeros(len(self.bootstrap.weights), *values.shape)
        heads = None
        for i, j in itertools.product(range(len(a.traces)), range(len(b.traces))):
            if a is b and i >= j:
                continue
            p = checked_pattern(a.traces[i], layer, f"model {a.name!r}, ")
            q = checked_pattern(b.traces[j], layer, f"model {b.name!r}, ")
            lengths, sink = a.traces[i].lengths, layer in a.traces[i].sinks
            each = head_pair_distances(p, q, self.distance, lengths, sink=sink)
            head_a, head_b = AGGREGATES[self.aggregate](each[self.chosen_on].mean(0))
            of_sequence = each[self.measured_on][:, head_a, head_b].mean(1)
            values[i, j], draws[:, i, j] = of_sequence.mean(), self.bootstrap.means(of_sequence)
            heads = (int(head_a), int(head_b)) if len(head_a) == 1 and self.aggregate != "matching" else None
        return _Pairs(values, draws, a is b, heads if values.numel() == 1 or (a is b and len(a.traces) == 2) else None)

    def _over_sequences(self, value: float, draws: Float64[Tensor, "draw"]) -> Interval:
        low, high = self.bootstrap.interval(draws)
        return Interval(value, float(low), float(high), SEQUENCES)

    def interval(self, pairs: _Pairs) -> Interval:
        """The distance of two models with its interval."""
        n_a, n_b = pairs.n_seeds
        value, draws = pairs.value(), pairs.of_draws()
        if self.aggregate == MCGILL:
            return Interval(value, math.nan, math.nan, NONE)
        if min(n_a, n_b) < (3 if pairs.itself else 2):
            return self._over_sequences(value, draws)
        if pairs.itself:
            left_out = [[pairs.value(i, i) for i in range(n_a)]]
        else:
            left_out = [[pairs.value(i) for i in range(n_a)], [pairs.value(None, j) for j in range(n_b)]]
        return over_trainings(value, left_out, draws, self.n_sequences, self.bootstrap.confidence, pairs.itself)

    def difference(self, a: _Pairs, b: _Pairs) -> Interval:
        """The distance of a from the reference less that of b; the reference's seeds are the first of both."""
        value, draws = a.value() - b.value(), a.of_draws() - b.of_draws()
        n_reference, n_a, n_b = a.n_seeds[0], a.n_seeds[1], b.n_seeds[1]
        if self.aggregate == MCGILL:
            return Interval(value, math.nan, math.nan, NONE)
        if min(n_reference, n_a, n_b) < 2:
            return self._over_sequences(value, draws)
        left_out = [
            [a.value(i) - b.value(i) for i in range(n_reference)],
            [a.value(None, j) - b.value() for j in range(n_a)],
            [a.value() - b.value(None, j) for j in range(n_b)],
        ]
        return over_trainings(value, left_out, draws, self.n_sequences, self.bootstrap.confidence)

    def row(self, pairs: _Pairs) -> dict[str, Any]:
        interval = self.interval(pairs)
        return {
            "metric": self.distance,
            "value": interval.value,
            "low": interval.low,
            "high": interval.high,
            "interval": interval.kind,
            "n": self.n_sequences,
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
    n = len(seeds[first][0].tokens)
    every = slice(0, n)
    chosen_on, measured_on = (every, every) if aggregate == MCGILL or n == 1 else halves(seeds[first][0])
    bootstrap = Bootstrap.draw(measured_on.stop - measured_on.start, n_bootstrap, confidence, seed)
    models = {name: _Model(name, of_model) for name, of_model in seeds.items()}
    return models, _Measure(seeds[first][0].layers_at(PATTERN), distance, aggregate, chosen_on, measured_on, bootstrap)


def _nearest(mean: Float64[Tensor, "head_a head_b"], pairs: Int[Tensor, "pair 2"]) -> tuple[Tensor, Tensor]:
    """The nearest of these pairs of heads."""
    head_a, head_b = pairs[mean[pairs[:, 0], pairs[:, 1]].argmin()]
    return head_a[None], head_b[None]


def _minimum(mean: Tensor) -> tuple[Tensor, Tensor]:
    return _nearest(mean, torch.cartesian_prod(torch.arange(mean.shape[0]), torch.arange(mean.shape[1])))


def _mcgill(mean: Tensor) -> tuple[Tensor, Tensor]:
    pairs = torch.triu_indices(mean.shape[0], mean.shape[1], offset=1).T
    if not len(pairs):
        raise ProbeError(f"pairs of heads h < h′ want 2 heads or more, got {mean.shape[0]} and {mean.shape[1]}")
    return _nearest(mean, pairs)


def _matching(mean: Tensor) -> tuple[Tensor, Tensor]:
    from scipy.optimize import linear_sum_assignment  # a quarter of a second that nothing else here wants

    # Infinite pairs only where nothing else is left; the assignment wants numbers.
    finite = mean.where(mean.isfinite(), 0.0)
    cost = mean.where(mean.isfinite(), 1 + finite.max() * len(mean))
    heads_a, heads_b = (torch.from_numpy(heads) for heads in linear_sum_assignment(cost.numpy()))
    return heads_a, heads_b


MCGILL = "mcgill"
#: Whose heads' distances become that of a layer, by name; ``compare_models`` says what each does.
AGGREGATES: dict[str, Aggregate] = {"minimum": _minimum, "matching": _matching, MCGILL: _mcgill}
