"""Linear probes for position: what a linear map can read off the hidden states, beside what it reads off controls."""

import functools
from collections.abc import Callable, Sequence

import pandas as pd
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor, nn

from probe.config import check_number
from probe.errors import ProbeError, unknown_name
from probe.position.probes.classification import SoftmaxProbe
from probe.position.probes.controls import Probed, beside_controls
from probe.position.probes.moments import unscale
from probe.position.probes.reading import RandomProjection, Reader, Rows
from probe.position.probes.ridge import ALPHAS
from probe.position.probes.scores import METRICS, Draws, Metric, accuracy, mean_absolute_error, token_sums
from probe.position.probes.splits import Split
from probe.position.probes.streaming import probe_source
from probe.position.probes.targets import TargetContext
from probe.sequences import Integers, Sequences, TokenIds
from probe.statistics import N_BOOTSTRAP
from probe.tracing import EMBED, RESID_POST

COLUMNS = ["site", "layer_encoding", "probe", "control", "metric", "value", "low", "high", "n_train", "n_test"]


def fit_position_probe(
    model: nn.Module,
    tokens: TokenIds,
    sites: Sequence[str] = (EMBED, RESID_POST),
    *,
    lengths: Integers | None = None,
    probes: Sequence[str] = ("ridge", "logistic"),
    controls: Sequence[str] = ("untrained", "embedding", "shuffled"),
    untrained: nn.Module | None = None,
    alpha: float | None = None,
    test_share: float = 0.3,
    n_bootstrap: int = N_BOOTSTRAP,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Fit linear probes for the position of each token and score them on other sequences.

    Whole sequences, not tokens, are split into train and test, and a sequence that occurs twice counts once: nothing
    of a test sequence is seen in training. (Sequences that share a prefix do share hidden states there.) Each probe is
    fitted to controls, too: see ``CONTROLS``. ``probe_positions`` asks more, and of more.

    Args:
        model: a ``Decoder``, a ``ClockworkRNN`` or a ``TransformerBridge``.
        tokens: ids, right-padded where ``lengths`` say so.
        sites: where to look; a name without its layer means every layer.
        probes: names in ``PROBES``: ``ridge`` regresses the position, from one pass in which no hidden state is kept;
            ``logistic`` classifies it, one class for each position, and holds those of one site at a time.
        untrained: the model of the untrained control; as ``probe.models.untrained_twin`` makes it by default.
        alpha: the penalty on standardised features (alpha ‖w‖² and ‖w‖² / 2C, C = 1/alpha); by default that of
            ``ridge`` is chosen between the training sequences and that of ``logistic`` is 1.
        n_bootstrap: resamples of the test sequences for the bootstrap intervals.

    Returns:
        One row a number: site, layer_encoding (what the site's layer sees), probe, control ("none" is the model
        itself), metric, value, low, high, n_train, n_test (sequences). Metrics of ``ridge``: r2, mean_absolute_error
        (tokens), mean_squared_error; of ``logistic``: accuracy, mean_absolute_error; of both, for a control,
        selectivity: what the model has more of the first.

    Raises:
        ProbeError: for fewer than four distinct sequences, sequences of one token, hidden states that are not finite,
            an unknown site, probe or control, or a bridge of which no untrained one can be drawn.
    """
    if alpha is not None:
        check_number("alpha", alpha)
    check_number("test_share", test_share, 0, 1)
    for kind in probes:
        if kind not in PROBES:
            raise unknown_name("probe", kind, PROBES)
    split = Split.by_sequence(tokens, lengths, test_share, seed)
    reader = Reader(split, ("position",), TargetContext(), seed)
    draws = Draws.of(len(split.test), n_bootstrap, confidence, seed)
    parts = []
    for kind in probes:
        fit, metrics = PROBES[kind]
        rows = beside_controls(
            functools.partial(fit, reader=reader, alpha=alpha),
            [model],
            sites,
            controls,
            untrained=untrained,
            seed=seed,
            reader=reader,
            draws=draws,
            metrics=metrics,
        )
        parts.append(rows.assign(probe=kind))
    return pd.concat(parts, ignore_index=True)[COLUMNS]


def regress(
    source: nn.Module | RandomProjection, sites: Sequence[str], shuffled: bool, *, reader: Reader, alpha: float | None
) -> dict[str, Probed]:
    """Ridge regressions of the position, by site."""
    return probe_source(source, sites, shuffled, reader=reader, alphas=ALPHAS if alpha is None else (alpha,), folds=5)


def classify(
    source: nn.Module | RandomProjection, sites: Sequence[str], shuffled: bool, *, reader: Reader, alpha: float | None
) -> dict[str, Probed]:
    """Logistic regressions of the position, by site: one pass over the data for each, whose hidden states are held."""
    found: dict[str, Probed] = {}
    for name in reader.sites(source, sites):
        found |= _classify_site(source, name, shuffled, reader, 1.0 if alpha is None else alpha)
    return found


def _classify_site(
    source: nn.Module | RandomProjection, site: str, shuffled: bool, reader: Reader, alpha: float
) -> dict[str, Probed]:
    x, y, _ = _collect(source, site, shuffled, reader, reader.split.train)
    mean, to_unit = x.double().mean(0), unscale(x)

    def standardised(x: Tensor) -> ndarray:
        return ((x - mean.to(x.dtype)) * to_unit.to(x.dtype)).numpy()

    fitted = [SoftmaxProbe(C=1 / alpha).fit(standardised(x), column.long().numpy()) for column in y.T]
    x, y, group = _collect(source, site, shuffled, reader, reader.split.test)
    predicted = torch.stack([torch.as_tensor(probe.predict(standardised(x))) for probe in fitted], dim=1)
    sums = token_sums(y, predicted - y, group, len(reader.split.test))
    return {site: Probed(sums[:, None], torch.full((y.shape[1],), alpha, dtype=torch.float64))}


def _collect(
    source: nn.Module | RandomProjection, site: str, shuffled: bool, reader: Reader, part: Sequences
) -> tuple[Float[Tensor, "row feature"], Tensor, Tensor]:
    kept: list[tuple[Tensor, Tensor, Tensor]] = []

    def keep(_: str, x: Tensor, rows: Rows) -> None:
        if not x.isfinite().all():
            raise ProbeError(f"hidden states at {site!r} must be finite, got NaN or infinity")
        kept.append((x.cpu().to(torch.promote_types(x.dtype, torch.float32)), rows.y, rows.group))

    reader.read(source, part, [site], shuffled, keep)
    x, y, group = (torch.cat(values) for values in zip(*kept, strict=True))
    return x, y, group


#: Probes of a token's position, by name: how each is fitted, and what is scored of it, what selectivity is of first.
PROBES: dict[str, tuple[Callable[..., dict[str, Probed]], dict[str, Metric]]] = {
    "ridge": (regress, METRICS),
    "logistic": (classify, {"accuracy": accuracy, "mean_absolute_error": mean_absolute_error}),
}
