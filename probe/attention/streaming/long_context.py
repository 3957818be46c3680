"""Templates fitted and maps drawn at lengths at which no query × key matrix fits into memory.

A fit of templates by distance reads nothing of the patterns but the attention paid at each distance
(``distance_family.DistanceMass``), which streaming collects in one pass; a second pass measures how far the patterns of
other sequences are from the fitted templates. So a context of 32,768 tokens is treated as one of 32 is.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float64
from torch import Tensor, nn

from probe.attention.distance_family import DistanceMass, fit
from probe.attention.pooling import BINS, bin_starts, pooled_pattern
from probe.attention.streaming.models import attention_inputs
from probe.attention.streaming.statistics import stream_attention
from probe.attention.streaming.template import StreamTemplate
from probe.attention.templates import ALIBI, POWER_LAW, T5, Kernel
from probe.deprecation import old_field
from probe.errors import ProbeError
from probe.models.protocol import AttentionInputs
from probe.sequences import Sequences, TokenIds
from probe.shown import Shown
from probe.statistics import N_BOOTSTRAP, Bootstrap

KERNELS: dict[str, Kernel] = {"alibi_fitted": ALIBI, "power_law": POWER_LAW, "t5_fitted": T5}
UNIFORM = "uniform"


@dataclass(frozen=True)
class LongContext(Shown):
    """``rows``: columns layer, head, template, metric ("jensen_shannon", nats), value, low, high, n,
    n_parameters, explained, as ``compare_templates`` has them. ``maps``: one row a cell of a pooled map of each head
    beside its nearest template, columns as ``attention_maps`` has them; query and key are the first of their bins."""

    rows: pd.DataFrame
    maps: pd.DataFrame
    templates = old_field("templates", "rows")


def compare_long_context(
    model: nn.Module,
    tokens: TokenIds,
    *,
    layers: Sequence[int] | None = None,
    bins: int = BINS,
    n_bootstrap: int = N_BOOTSTRAP,
    confidence: float = 0.95,
    seed: int = 0,
) -> LongContext:
    """The distance of every head from fitted ALiBi, power-law and T5 biases and from uniform attention, in memory that
    grows with the length and not with its square.

    As in ``compare_templates``, templates are fitted on the first half of the sequences and measured on the other; with
    few sequences the intervals over them are wide, and with one to measure on they are that one value.

    Args:
        model: a ``Decoder``, at any length; a ``TransformerBridge`` as far as it can run.
        tokens: at least 2 distinct sequences of one length, without padding.
        layers: by default all.
        bins: cells of a map on each side.

    Raises:
        ProbeError: for fewer than 2 distinct sequences, sequences of one token, or what ``attention_inputs`` refuses.
    """
    ids = Sequences.of(tokens).distinct().tokens
    n, length = ids.shape
    if n < 2 or length < 2:
        raise ProbeError(
            f"at least 2 distinct sequences of 2 tokens are needed, to fit on and to measure, got {n} of {length}"
        )
    if bins < 1:
        raise ProbeError(f"bins must be at least 1, got {bins}")
    mass: dict[int, Float64[Tensor, "head distance"]] = {}
    windows: dict[int, int | None] = {}

    def collect(layer: int, inputs: AttentionInputs) -> None:
        for q, k in zip(inputs.q, inputs.k, strict=True):
            windows[layer] = inputs.window
            streamed = stream_attention(
                q, k, scale=inputs.scale, bias=inputs.bias, window=inputs.window, histogram=True
            )
            assert streamed.histogram is not None  # it was asked for
            of_sequence = streamed.histogram.double().cpu()
            mass[layer] = mass[layer] + of_sequence if layer in mass else of_sequence

    for sequence in ids[: n // 2].split(1):
        attention_inputs(model, sequence, collect, layers)
    found = {layer: _Fitted.to(of / of.sum(-1, keepdim=True), windows[layer]) for layer, of in mass.items()}

    def measure(layer: int, inputs: AttentionInputs) -> None:
        for q, k in zip(inputs.q, inputs.k, strict=True):
            found[layer].measure(q, k, inputs, bins)

    for sequence in ids[n // 2 :].split(1):
        attention_inputs(model, sequence, measure, layers)
    bootstrap = Bootstrap.draw(n - n // 2, n_bootstrap, confidence, seed)
    rows = [frame for layer, fitted in found.items() for frame in fitted.rows(layer, bootstrap)]
    templates = pd.concat(rows).sort_values(["layer", "head"], kind="stable", ignore_index=True)
    maps = pd.concat([fitted.maps(layer, length, bins) for layer, fitted in found.items()], ignore_index=True)
    return LongContext(templates, maps)


class _Fitted:
    """The templates of one layer, and what is measured with them."""

    def __init__(
        self, biases: dict[str, Float64[Tensor, "head distance"]], n_parameters: dict[str, int], window: int | None
    ):
        self.biases, self.n_parameters, self.window = biases, n_parameters, window
        self.streams = {name: StreamTemplate.by_distance(bias) for name, bias in biases.items()}
        self.distances: list[dict[str, Float64[Tensor, "head"]]] = []
        self.pattern: Tensor = torch.zeros(())
        self.nothing = 0.0  # nats: divergences below it are what rounding makes of equal rows

    @classmethod
    def to(cls, mass: Float64[Tensor, "head distance"], window: int | None) -> "_Fitted":
        n = mass.shape[-1]
        # Every sequence has every row; what lies on key 0 is for sinks, which no kernel of these reads.
        rows, n_visible = torch.full((n,), 1 / n, dtype=torch.float64), torch.arange(1, n + 1).clamp(max=window or n)
        observed = DistanceMass.by_row(mass, rows, torch.zeros_like(mass), n_visible)
        biases, n_parameters = {UNIFORM: torch.zeros_like(mass)}, {UNIFORM: 0}
        for name, kernel in KERNELS.items():
            phi, n_parameters[name] = kernel.features_of(observed.mass.shape[-1])
            bias = fit(observed, phi) @ phi.T
            biases[name] = torch.nn.functional.pad(bias, (0, n - bias.shape[-1]))  # no query sees the distances behind
        return cls(biases, n_parameters, window)

    def measure(self, q: Tensor, k: Tensor, inputs: AttentionInputs, bins: int) -> None:
        streamed = stream_attention(
            q,
            k,
            scale=inputs.scale,
            bias=inputs.bias,
            window=inputs.window,
            templates=self.streams,
            jensen_shannon=True,
        )
        self.nothing = 16 * torch.finfo(streamed.entropy.dtype).eps
        apart = {name: d.jensen_shannon for name, d in streamed.divergence.items()}
        self.distances.append({name: d.double().mean(-1).cpu() for name, d in apart.items() if d is not None})
        self.pattern = self.pattern + pooled_pattern(q, k, inputs.scale, inputs.bias, bins, inputs.window)

    def rows(self, layer: int, bootstrap: Bootstrap) -> list[pd.DataFrame]:
        each = {name: torch.stack([d[name] for d in self.distances]) for name in self.biases}
        from_uniform = each[UNIFORM].mean(0)
        found = []
        for name, values in each.items():
            low, high = bootstrap.interval(bootstrap.means(values))
            columns = {
                "layer": layer,
                "head": range(values.shape[1]),
                "template": name,
                "metric": "jensen_shannon",
                "value": values.mean(0),
                "low": low,
                "high": high,
                "n": len(values),
                "n_parameters": self.n_parameters[name],
                "explained": torch.where(from_uniform > self.nothing, 1 - values.mean(0) / from_uniform, torch.nan),
            }
            found.append(pd.DataFrame(columns))
        return found

    def maps(self, layer: int, length: int, bins: int) -> pd.DataFrame:
        values = torch.stack([sum((d[name] for d in self.distances), torch.zeros(())) for name in self.biases]) / len(
            self.distances
        )
        pattern = self.pattern / len(self.distances)
        starts, parts = bin_starts(length, bins), []
        query, key = torch.tril_indices(len(starts), len(starts))
        for head, best in enumerate(values.argmin(0).tolist()):
            name = list(self.biases)[best]
            bias = self.biases[name][head : head + 1]
            nothing = torch.zeros(1, length, 1, dtype=torch.float64)
            template = pooled_pattern(nothing, nothing, 1.0, bias, bins, self.window)[0]
            columns = {
                "layer": layer,
                "head": head,
                "template": name,
                "template_distance": values[best, head].item(),
                "query": starts[query],
                "key": starts[key],
                "pattern": pattern[head, query, key],
                "template_pattern": template[query, key],
            }
            parts.append(pd.DataFrame(columns))
        return pd.concat(parts)
