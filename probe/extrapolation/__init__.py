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
from probe.extrapolation.passkey import passkey
from probe.extrapolation.perplexity import loss_by_position, perplexity
from probe.extrapolation.temperature import HeadScale, UniformScale, scaled

__all__ = [
    "FittedScale",
    "HeadScale",
    "LogLaw",
    "ScaleTraining",
    "UniformScale",
    "best_scale",
    "fit_log_law",
    "loss_by_position",
    "passkey",
    "perplexity",
    "scale_against",
    "scaled",
    "search_scale",
    "sweep_scale",
    "train_scale",
]
