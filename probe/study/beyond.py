"""Beyond the trained length: what temperatures, and the extensions of rotary positions, make of a model of text."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from probe.attention import stream
from probe.config import check_size
from probe.errors import ProbeError, unknown_name
from probe.extrapolation import (
    ContextLosses,
    FittedScale,
    ScaleTraining,
    best_scale,
    can_scale,
    context_losses,
    fit_log_law,
    loss_by_position,
    passkey,
    perplexity_rows,
    scale_against,
    scaled,
    search_scale,
    sweep_scale,
    train_scale,
)
from probe.measure.data import Texts
from probe.models.anatomy import n_heads_of, n_layers_of
from probe.models.decoder import Decoder
from probe.models.variants import variant
from probe.progress import OnProgress, Steps, untold
from probe.training import EncodedExamples, TrainingConfig, train

STRETCHES = ("linear", "ntk", "yarn")  # of rotary positions
UNIFORM = tuple(round(1 + i / 20, 2) for i in range(21))  # 1 … 2
DROPPED = ("rotary", "alibi")  # encodings that are dropped, too
DROPPED_SHARE = 10  # and then trained on for one step in so many of those that the model was trained


@dataclass(frozen=True)
class Beyond(Texts):
    """Texts beyond the trained length, and how the scales of attention are fitted there."""

    n_fitted: int = 24  #: texts on which a uniform scale is chosen
    fits: tuple[str, ...] = ("head",)  #: of ``FITS``
    scale: ScaleTraining = field(default_factory=ScaleTraining)  #: how the scales of heads are trained

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.fits:
            if name not in FITS:
                raise unknown_name("way to fit the scales of heads", name, FITS)
        check_size("n_fitted", self.n_fitted)


class Variant(NamedTuple):
    """A model made to go further: how, and to how many times the trained length (NaN: to no length in particular)."""

    name: str
    extension: float
    model: nn.Module


FitScale = Callable[[nn.Module, EncodedExamples, ScaleTraining, float], FittedScale]
Kept = Callable[[str, Callable[[], pd.DataFrame]], pd.DataFrame]  # the rows of a stage: measured once


def beyond_stages(
    decoder: nn.Module,
    beyond: Beyond,
    kept: Kept,
    drop: Callable[[], Decoder] | None = None,
    *,
    on_progress: OnProgress = untold,
) -> dict[str, Callable[[], pd.DataFrame]]:
    """The stages of one model, in the order in which they need each other.

    Every model whose queries can be scaled gets a uniform scale. Rotary positions of ours are stretched besides; all
    others get a scale for every head, too. ``drop``, if there is one, gives the model with its encoding dropped. Each
    is measured by perplexity and passkeys. ``on_progress`` is told how far the longest of them is, the fit of scales.
    """
    beyond = beyond.within(decoder)
    if not beyond.extensions:
        return {}
    stretched = isinstance(decoder, Decoder) and decoder.config.encoding == "rotary"

    def fit() -> pd.DataFrame:
        steps = Steps(1 + (not stretched) + (drop is not None), on_progress)
        parts = [uniform := fit_uniform(decoder, beyond, on_progress=steps.within)]
        steps.step()
        if not stretched:
            parts.append(fit_heads(decoder, beyond, uniform, on_progress=steps.within))
            steps.step()
        if drop is not None:
            parts.append(fit_uniform(drop(), beyond, "dropped_uniform", on_progress=steps.within))
        return pd.concat(parts, ignore_index=True)

    def scales(of_dropped: bool = False) -> pd.DataFrame:
        rows = kept("head_scale", fit)
        return rows[(rows["variant"] == "dropped_uniform") == of_dropped]

    def variants() -> Iterator[Variant]:
        yield Variant("none", math.nan, decoder)
        if not can_scale(decoder):
            return
        yield from with_scales(decoder, scales())
        if isinstance(decoder, Decoder):
            yield from stretches(decoder, beyond) if stretched else by_position(decoder, beyond, scales())
        if drop is not None:
            yield Variant("dropped", math.nan, drop())
            yield from with_scales(drop(), scales(of_dropped=True))

    def of_all(measure: Callable[[nn.Module], pd.DataFrame], least: float = 0) -> pd.DataFrame:
        """Of every variant but those made for a shorter extension than ``least``."""
        chosen = (v for v in variants() if not v.extension < least)
        parts = [measure(v.model).assign(variant=v.name, extension=v.extension) for v in chosen]
        return pd.concat(parts, ignore_index=True)

    plain = functools.cache(lambda: losses_of(decoder, beyond))

    def compared(model: nn.Module) -> pd.DataFrame:
        if model is decoder:
            return perplexity_rows(plain(), seed=beyond.seed)
        return perplexity_rows(losses_of(model, beyond), plain(), seed=beyond.seed)

    stages = {
        "perplexity": lambda: of_all(compared),
        "loss_by_position": lambda: of_all(lambda model: positions_of(model, beyond)),
        "passkey": lambda: of_all(lambda model: passkeys_of(model, beyond)),
    }
    if not can_scale(decoder):
        return stages
    stages = {"head_scale": fit} | stages | {"scale_law": lambda: scale_laws(kept("head_scale", fit))}
    if not stretched and _streams(decoder):
        rise = functools.partial(entropy_rise, decoder, beyond)
        longest = max(beyond.extensions)
        stages["scaled_entropy"] = lambda: of_all(functools.partial(entropy_of, beyond=beyond), least=longest)
        stages["entropy_rise"] = rise
        if n_layers_of(decoder) * n_heads_of(decoder) > 2:
            stages["scale_entropy"] = lambda: scale_entropy(scales(), kept("entropy_rise", rise), beyond.seed)
    return stages


def fit_uniform(
    decoder: nn.Module, beyond: Beyond, name: str = "uniform", *, on_progress: OnProgress = untold
) -> pd.DataFrame:
    """The best uniform λ on validation texts, of every extended length. Columns variant, extension, layer, head, metric
    "scale", value."""
    shape, parts = (n_layers_of(decoder), n_heads_of(decoder)), []
    steps = Steps(len(beyond.extensions), on_progress)
    for extension in beyond.extensions:
        texts = beyond.texts("validation", extension * beyond.task.train_length, beyond.n_fitted)
        best = best_scale(sweep_scale(decoder, texts, UNIFORM, n_bootstrap=1))
        parts.append(scale_rows(torch.full(shape, best), name, extension))
        steps.step()
    return pd.concat(parts, ignore_index=True)


def fit_heads(
    decoder: nn.Module, beyond: Beyond, uniform: pd.DataFrame, *, on_progress: OnProgress = untold
) -> pd.DataFrame:
    """The λ of every head for every extended length, on training texts, from the best uniform one on: trained, and by
    ``beyond.fits`` also trained without the paper's limit or initial value, or searched. Columns as ``fit_uniform``."""
    parts, steps = [], Steps(len(beyond.extensions) * len(beyond.fits), on_progress)
    for extension in beyond.extensions:
        best = float(uniform[uniform["extension"] == extension]["value"].iloc[0])
        data = beyond.texts("train", extension * beyond.task.train_length, beyond.scale.steps * beyond.scale.batch_size)
        for name in beyond.fits:
            parts.append(scale_rows(FITS[name](decoder, data, beyond.scale, best).scale, name, extension))
            steps.step()
    return pd.concat(parts, ignore_index=True)


def scale_rows(scale: Float[Tensor, "layer head"], name: str, extension: float) -> pd.DataFrame:
    """λ of every head as rows."""
    n_layers, n_heads = scale.shape
    frame = {
        "variant": name,
        "extension": float(extension),
        "layer": torch.arange(n_layers).repeat_interleave(n_heads),
        "head": torch.arange(n_heads).repeat(n_layers),
        "metric": "scale",
        "value": scale.flatten().double(),
    }
    return pd.DataFrame(frame)


def scale_of(rows: pd.DataFrame) -> Float[Tensor, "layer head"]:
    """Rows of one variant and extension as scales again."""
    table = rows.pivot(index="layer", columns="head", values="value")
    return torch.tensor(table.to_numpy(), dtype=torch.float32)


def by_position(decoder: Decoder, beyond: Beyond, scales: pd.DataFrame) -> Iterator[Variant]:
    """A model with the law of its uniform scales, by the position of each query."""
    slope = float(scale_laws(scales).query("variant == 'uniform' and metric == 'slope'")["value"].iloc[0])
    options = {"a": max(0.0, slope), "trained_length": beyond.task.train_length}
    yield Variant("log_length", math.nan, variant(decoder, attention_function="log_length", attention_options=options))


def with_scales(decoder: nn.Module, scales: pd.DataFrame) -> Iterator[Variant]:
    """A model with each of the scales of these rows."""
    for (name, extension), rows in scales.groupby(["variant", "extension"], sort=False):
        yield Variant(name, extension, scaled(decoder, scale_of(rows)))


def stretches(decoder: Decoder, beyond: Beyond) -> Iterator[Variant]:
    """A rotary model by position interpolation, NTK-aware interpolation and YaRN."""
    for name in STRETCHES:
        for extension in beyond.extensions:
            options = {
                **decoder.config.encoding_options,
                "scaling": name,
                "factor": float(extension),
                "trained_length": beyond.task.train_length,
            }
            yield Variant(name, float(extension), variant(decoder, encoding_options=options))


def drops(decoder: nn.Module) -> bool:
    """Whether a model has an encoding that is worth dropping."""
    return isinstance(decoder, Decoder) and decoder.config.encoding in DROPPED


def drop_encoding(
    decoder: nn.Module,
    data: EncodedExamples,
    training: TrainingConfig,
    folder: Path | None = None,
    *,
    device: str | None = None,
    on_log: Callable[[dict[str, Any]], None] | None = None,
) -> Decoder:
    """A model without its position encoding, trained on for ``training.steps``. DroPE, Gelberg et al. 2025."""
    bare = variant(decoder, encoding="none", position_layers=None)
    return train(bare.config, data, training, folder, device=device, initial=bare, on_log=on_log)


def losses_of(model: nn.Module, beyond: Beyond) -> ContextLosses:
    """Losses by context, of the second half of held-out texts as long as the longest."""
    half = beyond.held_out.shape[1] // 2
    return context_losses(model, beyond.held_out, beyond.contexts, prefix=beyond.task.plain_prefix, score_from=half)


def positions_of(model: nn.Module, beyond: Beyond) -> pd.DataFrame:
    return loss_by_position(model, beyond.held_out, prefix=beyond.task.plain_prefix, seed=beyond.seed)


def passkeys_of(model: nn.Module, beyond: Beyond) -> pd.DataFrame:
    return passkey(model, beyond.task, beyond.contexts, n=beyond.n_prompts, seed=beyond.seed)


def scale_laws(scales: pd.DataFrame) -> pd.DataFrame:
    """``fit_log_law`` of the uniform scales, and of the means over heads: columns variant, metric (slope, r2), value,
    low, high, n (lengths)."""
    rows = []
    for name, part in scales.groupby("variant", sort=False):
        mean = part.groupby("extension")["value"].mean()
        law = fit_log_law(mean.index.tolist(), mean.tolist())
        rows.append((name, "slope", law.slope, law.low, law.high, law.n))
        rows.append((name, "r2", law.r2, math.nan, math.nan, law.n))
    return pd.DataFrame(rows, columns=["variant", "metric", "value", "low", "high", "n"])


def entropy_of(model: nn.Module, beyond: Beyond, n: int = 8, n_bins: int = 64) -> pd.DataFrame:
    """Mean entropy of every head's attention by query position, in nats."""
    rows = stream(model, beyond.texts("test", beyond.contexts[-1], n).tokens).rows(n_bins)
    return rows[rows["metric"] == "entropy"].drop(columns="template").reset_index(drop=True)


def entropy_rise(decoder: nn.Module, beyond: Beyond) -> pd.DataFrame:
    """How much more entropy a head's attention has at an extended length than at the trained one, and how much it has.

    Means over the queries in the second half of each length. Columns layer, head, extension, metric ("entropy",
    "entropy_rise"), value, both in nats.
    """
    length = beyond.task.train_length
    by_query = entropy_of(decoder, beyond, n_bins=beyond.contexts[-1])

    def mean(extension: int) -> pd.Series:
        seen = by_query[by_query["query"].between(extension * length // 2, extension * length - 1)]
        return seen.groupby(["layer", "head"])["value"].mean()

    at_trained, parts = mean(1), []
    for extension in beyond.extensions:
        entropy = mean(extension)
        for metric, values in (("entropy", entropy), ("entropy_rise", entropy - at_trained)):
            parts.append(values.reset_index().assign(metric=metric, extension=float(extension)))
    return pd.concat(parts, ignore_index=True)


def scale_entropy(scales: pd.DataFrame, rises: pd.DataFrame, seed: int) -> pd.DataFrame:
    """``scale_against`` of the λ of heads and the rise of their entropy ("pearson", "spearman"), and their entropy
    itself ("pearson_entropy", "spearman_entropy")."""
    parts = []
    for extension, of_heads in scales[scales["variant"] == "head"].groupby("extension", sort=False):
        scale = of_heads.sort_values(["layer", "head"])["value"].to_numpy()
        if np.ptp(scale) == 0:
            continue
        for metric, ending in (("entropy_rise", ""), ("entropy", "_entropy")):
            of = rises[(rises["extension"] == extension) & (rises["metric"] == metric)]
            found = scale_against(scale, of.sort_values(["layer", "head"])["value"].to_numpy(), seed=seed)
            found["metric"] += ending
            parts.append(found.assign(variant="head", extension=extension))
    columns = ["metric", "value", "low", "high", "p", "n", "variant", "extension"]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)


def _streams(decoder: nn.Module) -> bool:
    """Whether a model's attention can be streamed."""
    try:
        stream(decoder, torch.zeros(1, 2, dtype=torch.long))
    except ProbeError:
        return False
    return True


BEYOND_STAGES: Sequence[str] = (
    *("head_scale", "perplexity", "loss_by_position", "passkey"),
    *("scale_law", "scaled_entropy", "entropy_rise", "scale_entropy"),
)


def _trained(**changes: Any) -> FitScale:
    def fit(decoder: nn.Module, data: EncodedExamples, config: ScaleTraining, initial: float) -> FittedScale:
        return train_scale(decoder, data, replace(config, **{"initial": initial, **changes}))

    return fit


def _searched(decoder: nn.Module, data: EncodedExamples, config: ScaleTraining, initial: float) -> FittedScale:
    some = EncodedExamples(data.tokens[:24], data.prompt_lengths[:24], data.lengths[:24])
    return search_scale(decoder, some, initial=initial, batch_size=config.batch_size)


# How the scales of heads are found. The ablation of Wang et al. 2024: without the limit λ >= 1, without the best
# uniform scale as initial value, and without both.
FITS: dict[str, FitScale] = {
    "head": _trained(),
    "head_free": _trained(least=None),
    "head_from_one": _trained(initial=1.0),
    "head_free_from_one": _trained(initial=1.0, least=None),
    "search": _searched,
}
ABLATION = ("head", "head_free", "head_from_one", "head_free_from_one")
