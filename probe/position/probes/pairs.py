"""Distances between two positions of a sequence, read off the two hidden states."""

import math
from collections.abc import Callable, Sequence

import pandas as pd
import torch
from jaxtyping import Float64, Int
from torch import Tensor, nn

from probe.config import check_size
from probe.device import gradients
from probe.errors import ProbeError, unknown_name
from probe.position.probes.controls import CONTROLS, Probed, beside_controls
from probe.position.probes.moments import eigen
from probe.position.probes.reading import RandomProjection, Reader, Rows
from probe.position.probes.ridge import ALPHAS, LinearProbe
from probe.position.probes.scores import METRICS, Draws, token_sums
from probe.position.probes.splits import Split
from probe.position.probes.targets import TargetContext, target_values
from probe.sequences import Integers, Sequences, TokenIds
from probe.statistics import N_BOOTSTRAP
from probe.tracing import EMBED, RESID_POST

COLUMNS = ["site", "layer_encoding", "probe", "control", "metric", "value", "low", "high", "n", "n_train", "n_test"]


def pair_probe(
    model: nn.Module,
    tokens: TokenIds,
    sites: Sequence[str] = (EMBED, RESID_POST),
    *,
    lengths: Integers | None = None,
    probes: Sequence[str] = ("bilinear", "structural"),
    controls: Sequence[str] = tuple(CONTROLS),
    untrained: nn.Module | None = None,
    rank: int = 16,
    n_pairs: int = 20_000,
    test: float | Int[Tensor, "test"] = 0.3,
    n_bootstrap: int = N_BOOTSTRAP,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Fit probes of the distance between two positions t > i of a sequence, and score them on other sequences.

    ``bilinear``: h̃_tᵀ B h̃_i for the signed distance t - i (half of the pairs are taken the other way round, so that
    it has both signs). h̃ is 1 beside what ridge regressions of the position, its logarithm, its inverse and its waves
    predict from h, in at most ``rank`` components: so B has the rank ``rank`` + 1 and holds linear probes, too.

    ``structural``: ‖A (h_t - h_i)‖² for |t - i|, A of that rank (Hewitt & Manning 2019, equation 1, with squared
    errors), fitted by L-BFGS.

    Args:
        rank: of B and A.
        n_pairs: at most so many pairs are looked at on either side of the split, drawn with equal shares from all
            sequences: the memory that is taken is 2 · n_pairs · d_model numbers.

    The other arguments, and the errors, are those of ``probe_positions``. The controls "shuffled" deal the positions
    of each sequence out anew.

    Returns:
        One row a number: site, layer_encoding, probe, control, metric (r2, mean_absolute_error and mean_squared_error
        in tokens, and for controls selectivity), value, low, high, n (pairs scored), n_train, n_test (sequences).
    """
    for kind in probes:
        if kind not in PAIR_PROBES:
            raise unknown_name("probe", kind, PAIR_PROBES)
    check_size("rank", rank)
    check_size("n_pairs", n_pairs, least=2)
    split = Split.by_sequence(tokens, lengths, test, seed)
    reader = Reader(split, ("position",), TargetContext(), seed)
    draws = Draws.of(len(split.test), n_bootstrap, confidence, seed)
    parts = []
    for kind in probes:

        def fit(
            source: nn.Module | RandomProjection, sites: Sequence[str], shuffled: bool, kind: str = kind
        ) -> dict[str, Probed]:
            return {
                site: _fit_site(source, site, shuffled, reader, PAIR_PROBES[kind], rank, n_pairs, seed)
                for site in reader.sites(source, sites)
            }

        rows = beside_controls(
            fit,
            [model],
            sites,
            controls,
            untrained=untrained,
            seed=seed,
            reader=reader,
            draws=draws,
            metrics=METRICS,
        )
        parts.append(rows.assign(probe=kind))
    return pd.concat(parts, ignore_index=True)[COLUMNS]


# Hidden states of the first and second of each pair, their positions, and the sequence.
Pairs = tuple[
    Float64[Tensor, "pair feature"],
    Float64[Tensor, "pair feature"],
    Float64[Tensor, "pair target"],
    Float64[Tensor, "pair target"],
    Int[Tensor, "pair"],
]
Predict = Callable[[Tensor, Tensor], Float64[Tensor, "pair"]]
PairProbe = tuple[bool, Callable[..., Predict]]  # whether the distance is signed, and the fit


def _collect(
    source: nn.Module | RandomProjection, site: str, shuffled: bool, reader: Reader, part: Sequences, n: int, seed: int
) -> Pairs:
    each = max(1, n // len(part))
    generator = torch.Generator().manual_seed(seed)
    kept: list[Pairs] = []

    def keep(_: str, x: Tensor, rows: Rows) -> None:
        sequences, sizes = rows.group.unique_consecutive(return_counts=True)
        starts = sizes.cumsum(0) - sizes
        of = torch.arange(len(sequences)).repeat_interleave(each)
        of = of[sizes[of] > 1]
        first = (torch.rand(len(of), generator=generator, dtype=torch.float32) * sizes[of]).long()
        # Any other place of the sequence.
        step = 1 + (torch.rand(len(of), generator=generator, dtype=torch.float32) * (sizes[of] - 1)).long()
        second = starts[of] + (first + step) % sizes[of]
        first = starts[of] + first
        device = x.device
        if not x.isfinite().all():
            raise ProbeError(f"hidden states at {site!r} must be finite, got NaN or infinity")
        a, b = (x[index.to(device)].cpu().double() for index in (first, second))
        kept.append((a, b, rows.y[first], rows.y[second], sequences[of]))

    reader.read(source, part, [site], shuffled, keep)
    a, b, t, i, sequence = (torch.cat(values) for values in zip(*kept, strict=True))
    return a, b, t, i, sequence


def _fit_site(
    source: nn.Module | RandomProjection,
    site: str,
    shuffled: bool,
    reader: Reader,
    probe: PairProbe,
    rank: int,
    n_pairs: int,
    seed: int,
) -> Probed:
    signed, fit = probe
    sides = (reader.split.train, reader.split.test)
    train, test = (_collect(source, site, shuffled, reader, part, n_pairs, seed) for part in sides)

    def distance(t: Tensor, i: Tensor) -> Tensor:
        return t - i if signed else (t - i).abs()

    a, b, t, i, sequence = train
    fitted = [fit(a, b, t[:, k], i[:, k], sequence, rank) for k in range(t.shape[1])]
    origin = distance(t, i).mean(0)
    a, b, t, i, sequence = test
    error = torch.stack([predict(a, b) for predict in fitted], dim=1) - distance(t, i)
    sums = token_sums(distance(t, i) - origin, error, sequence, len(reader.split.test))
    return Probed(sums[:, None], torch.full((t.shape[1],), math.nan, dtype=torch.float64))


def principal_components(x: Float64[Tensor, "row feature"], rank: int, size: float = 0.0) -> tuple[Tensor, Tensor]:
    """The mean, and the map to the leading principal components at unit variance; directions of no variance are
    left out, beside the greatest variance or the mean square of what x are the differences of, ``size``."""
    mean = x.mean(0)
    values, vectors = eigen((x - mean).T @ (x - mean) / len(x))
    values, vectors = values[-rank:], vectors[:, -rank:]
    there = values > 1e-12 * (values[-1] + mean.square().sum()).clamp(min=size)
    return mean, vectors[:, there] / values[there].sqrt()


def _ridge(x: Tensor, y: Tensor, sequence: Tensor) -> LinearProbe:
    """The linear map, its strengths chosen between sequences."""
    probe = LinearProbe(ALPHAS, standardize=True)
    for fold in range(5):
        part = sequence % 5 == fold
        if part.any():
            probe.update(x[part], y[part], fold)
    return probe


def bilinear(
    a: Float64[Tensor, "pair feature"],
    b: Float64[Tensor, "pair feature"],
    t: Float64[Tensor, "pair"],
    i: Float64[Tensor, "pair"],
    sequence: Int[Tensor, "pair"],
    rank: int,
) -> Predict:
    """A ridge regression of t - i on the products of what is read off both."""
    p = torch.cat((t, i))
    n = int(p.max()) + 1
    names, one_of_each = ("position", "log_position", "inverse_position", "fourier"), torch.arange(n)[None]
    read = target_values(names, one_of_each, torch.tensor([n]), TargetContext().for_length(n))[0, p.long()]
    both = torch.cat((a, b))
    coef = _ridge(both, read, torch.cat((sequence, sequence))).solution.weights
    mean, components = principal_components(both @ coef / read.std(0), rank)
    project = coef / read.std(0) @ components
    shift = mean @ components

    def products(a: Tensor, b: Tensor) -> Tensor:
        one = a.new_ones(len(a), 1)
        a, b = (torch.cat((one, h @ project - shift), dim=1) for h in (a, b))
        return torch.einsum("pi,pj->pij", a, b).flatten(1)

    distance = _ridge(products(a, b), t - i, sequence)
    return lambda a, b: distance.predict(products(a, b))


@gradients()
def structural(
    a: Float64[Tensor, "pair feature"],
    b: Float64[Tensor, "pair feature"],
    t: Float64[Tensor, "pair"],
    i: Float64[Tensor, "pair"],
    sequence: Int[Tensor, "pair"],
    rank: int,
) -> Predict:
    """A by L-BFGS on the mean squared error, in units of the largest distance, from a start that spreads the pairs as
    far as they are on average."""
    difference, distance = a - b, (t - i).abs()
    size = float(torch.cat((a, b)).square().sum(1).mean())
    _, whiten = principal_components(torch.cat((difference, -difference)), difference.shape[1], size)
    x, scale = difference @ whiten, distance.max().clamp(min=1)
    if not x.shape[1]:  # nothing differs
        return lambda a, b: a.new_zeros(len(a))
    y = distance / scale
    start = torch.randn(x.shape[1], rank, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    start *= (y.mean() / (x @ start).square().sum(1).mean()).sqrt()
    A = start.requires_grad_()
    optimizer = torch.optim.LBFGS([A], max_iter=200, history_size=20, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = ((x @ A).square().sum(1) - y).square().mean()
        value.backward()
        return value

    optimizer.step(loss)
    to_distance = (whiten @ A.detach()) * scale.sqrt()
    return lambda a, b: ((a - b) @ to_distance).square().sum(1)


#: Probes of the distance between two positions, by name: whether the distance is signed, and the fit.
PAIR_PROBES: dict[str, PairProbe] = {
    "bilinear": (True, bilinear),
    "structural": (False, structural),
}
