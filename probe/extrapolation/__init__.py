"""Beyond the trained length: attention temperatures, perplexity by length, passkey retrieval."""

from probe.extrapolation.fitting import (
    FittedScale,
    ScaleTraining,
    best_scale,
    search_scale,
    sweep_scale,
    train_scale,
)
from probe.extrapolation.laws import LogLaw, fit_log_law, scale_against
from probe.extrapolation.losses_by_context import (
    ContextLosses,
    context_losses,
    loss_by_position,
    perplexity,
    perplexity_rows,
)
from probe.extrapolation.retrieval import passkey
from probe.extrapolation.temperature import HeadScale, UniformScale, can_scale, check_can_scale, scaled

__all__ = [
    "ContextLosses",
    "FittedScale",
    "HeadScale",
    "LogLaw",
    "ScaleTraining",
    "UniformScale",
    "best_scale",
    "can_scale",
    "check_can_scale",
    "context_losses",
    "fit_log_law",
    "loss_by_position",
    "passkey",
    "perplexity",
    "perplexity_rows",
    "scale_against",
    "scaled",
    "search_scale",
    "sweep_scale",
    "train_scale",
]
