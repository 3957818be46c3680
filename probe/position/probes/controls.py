"""What a probe finds in a model beside what it finds where there is nothing, or nothing learned, to be found."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float64
from torch import Tensor, nn

from probe.errors import ProbeError, unknown_name
from probe.models.anatomy import d_model_of, layer_encodings
from probe.models.twins import untrained_twin
from probe.position.probes.reading import RANDOM, RandomProjection, Reader
from probe.position.probes.scores import BOUNDS, Draws, Metric
from probe.position.probes.splits import Split
from probe.progress import OnProgress, Steps, untold
from probe.tracing import EMBED

#: What stands beside every probe, by name, and in words.
CONTROLS: dict[str, str] = {
    "untrained": "the same site of the same architecture with fresh weights",
    "embedding": "the token embedding alone, which knows which token it is but not where",
    "shuffled": "the same hidden states, the targets of each sequence dealt out anew among its tokens",
    RANDOM: "a fixed Gaussian projection of the one-hot token to d_model dimensions: an embedding nobody trained",
}

COLUMNS = [
    *("site", "layer_encoding", "target", "probe", "control", "split", "scope", "position", "position_end", "metric"),
    *("value", "low", "high", "interval", "n", "n_models", "n_train", "n_test", "alpha"),
]


@dataclass(frozen=True)
class Probed:
    """What is left of one site of one model."""

    sums: Float64[Tensor, "sequence bin target sum"]
    alphas: Float64[Tensor, "target"]


# Fits and scores the probes of a source at some sites; asked for it, for every target dealt out anew, too, after the
# others.
Fit = Callable[[nn.Module | RandomProjection, Sequence[str], bool], dict[str, Probed]]


def beside_controls(
    fit: Fit,
    models: Sequence[nn.Module],
    sites: Sequence[str],
    controls: Sequence[str],
    *,
    untrained: nn.Module | Sequence[nn.Module] | None,
    seed: int,
    reader: Reader,
    draws: Draws,
    metrics: Mapping[str, Metric],
    on_progress: OnProgress = untold,
) -> pd.DataFrame:
    """Rows of the models and of each control at every site; a model is read once for itself and the controls that are
    made of what it computes. "selectivity" is the first of the metrics, the model's less the control's; layer_encoding
    is the position encoding that the site's layer sees, missing outside layers.

    Raises:
        ProbeError: for an unknown control, or a bridge of which no untrained one can be drawn, without ``untrained``.
    """
    for control in controls:
        if control not in CONTROLS:
            raise unknown_name("control", control, CONTROLS)
    fresh = _untrained(models, untrained, seed) if "untrained" in controls else []
    seen = [*sites, EMBED] if "embedding" in controls else list(sites)
    sizes = [d_model_of(model) for model in models] if RANDOM in controls else []
    steps = Steps(len(models) + len(fresh) + len(sizes), on_progress)

    def fitted(source: nn.Module | RandomProjection, at: Sequence[str], shuffled: bool = False) -> dict[str, Probed]:
        found = fit(source, at, shuffled)
        steps.step()
        return found

    own = [fitted(model, seen, "shuffled" in controls) for model in models]
    of_fresh = [fitted(model, sites) for model in fresh]
    of_tokens = [fitted(RandomProjection(d_model, seed + m), [RANDOM]) for m, d_model in enumerate(sizes)]
    parts = []
    for site in own[0]:
        if site != EMBED or EMBED in sites:
            found = {
                "none": _together(own, site),
                "untrained": _together(of_fresh, site),
                "embedding": _together(own, EMBED),
                "shuffled": _together(own, site, shuffled=True),
                RANDOM: _together(of_tokens, RANDOM),
            }
            beside: dict[str, Found] = {}
            for control in ("none", *controls):
                each = found[control]
                assert each is not None  # what is asked for was fitted
                beside[control] = each
            parts.append(_rows(beside, reader, draws, metrics).assign(site=site))
    rows, split = pd.concat(parts, ignore_index=True), reader.split
    encodings = layer_encodings(models[0])
    rows["layer_encoding"] = [
        encodings[int(site.split(".")[1])] if site.startswith("blocks.") else pd.NA for site in rows["site"]
    ]
    return rows.assign(split=split.name, n_train=len(split.train), n_test=len(split.test))


Found = tuple[Float64[Tensor, "model sequence bin target sum"], Float64[Tensor, "model target"]]


def _together(probed: Sequence[dict[str, Probed]], site: str, shuffled: bool = False) -> Found | None:
    """The sums and strengths of all models at a site; those of the shuffled targets are the second half."""
    if not probed or site not in probed[0]:
        return None
    sums, alphas = torch.stack([p[site].sums for p in probed]), torch.stack([p[site].alphas for p in probed])
    if shuffled:
        return sums[..., sums.shape[3] // 2 :, :], alphas[:, alphas.shape[1] // 2 :]
    return sums, alphas


def _scopes(split: Split) -> list[tuple[str, slice]]:
    """What of the bins a score is of."""
    n_bins, fitted = len(split.edges) - 1, split.fitted_length
    if fitted is None:
        return [("all", slice(0, n_bins))]
    border = split.edges.index(fitted)
    bins = [("bin", slice(b, b + 1)) for b in range(n_bins)]
    return [("all", slice(0, n_bins)), ("fitted", slice(0, border)), ("beyond", slice(border, n_bins)), *bins]


def _rows(found: Mapping[str, Found], reader: Reader, draws: Draws, metrics: Mapping[str, Metric]) -> pd.DataFrame:
    names, edges = reader.names, reader.split.edges
    first = next(iter(metrics))
    rows = []
    for scope, bins in _scopes(reader.split):
        place = {"scope": scope, "position": edges[bins.start], "position_end": edges[bins.stop]}
        of_model = None
        for control, (sums, alphas) in found.items():
            scored = sums[:, :, bins, : len(names)].sum(2)
            scores = {metric: draws.score(scored, function) for metric, function in metrics.items()}
            if of_model is None:
                of_model = scores[first]
            else:
                scores["selectivity"] = of_model - scores[first]
            n = scored[0, :, :, 0].sum(0).int().tolist()
            same = (alphas == alphas[0]).all(0)
            for metric, drawn in scores.items():
                columns = zip(names, draws.of_models(drawn), n, alphas[0].tolist(), same.tolist(), strict=False)
                for target, interval, n_tokens, alpha, one in columns:
                    if not math.isnan(interval.value):
                        found_at = interval.within(*BOUNDS.get(metric, (-math.inf, math.inf)))
                        key = {"target": target, "control": control, "metric": metric, **place}
                        number = {"value": found_at.value, "low": found_at.low, "high": found_at.high, "n": n_tokens}
                        kind = {"interval": found_at.kind, "n_models": drawn.shape[1]}
                        rows.append(key | number | kind | {"alpha": alpha if one else math.nan})
    return pd.DataFrame(rows)


def _untrained(
    models: Sequence[nn.Module], given: nn.Module | Sequence[nn.Module] | None, seed: int
) -> list[nn.Module]:
    if given is None:
        return [untrained_twin(model, seed) for model in models]
    fresh = [given] if isinstance(given, nn.Module) else list(given)
    if len(fresh) != len(models):
        raise ProbeError(f"untrained must hold one model for each of {len(models)}, got {len(fresh)}")
    return fresh
