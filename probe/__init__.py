"""Mechanistic interpretability of position: tokens → model → trace → measurement → rows → figure.

The names below are what a notebook uses; each is imported when it is first asked for, so ``import probe`` is cheap.
"""

import importlib

_HOMES = {
    "ProbeError": "probe.errors",
    "ENCODINGS": "probe.models.encodings",
    "alibi_slopes": "probe.models.encodings",
    "t5_bucket": "probe.models.encodings",
    "Decoder": "probe.models.decoder",
    "DecoderConfig": "probe.models.decoder",
    "ClockworkConfig": "probe.models.clockwork",
    "ClockworkRNN": "probe.models.clockwork",
    "load": "probe.models.checkpoint",
    "save": "probe.models.checkpoint",
    "load_pretrained": "probe.models.pretrained",
    "variant": "probe.models.variant",
    "to_bridge": "probe.models.lens",
    "TASKS": "probe.tasks",
    "make_task": "probe.tasks",
    "encode": "probe.training",
    "train": "probe.training",
    "TrainingConfig": "probe.training",
    "predict": "probe.training",
    "exact_match": "probe.training",
    "Trace": "probe.tracing",
    "trace": "probe.tracing",
    "fit_position_probe": "probe.position",
    "TEMPLATES": "probe.attention",
    "DISTANCES": "probe.attention",
    "compare_templates": "probe.attention",
    "compare_models": "probe.attention",
    "split_scores": "probe.attention",
    "census": "probe.attention",
    "stream": "probe.attention",
    "HeadScale": "probe.extrapolation",
    "UniformScale": "probe.extrapolation",
    "perplexity": "probe.extrapolation",
    "passkey": "probe.extrapolation",
    "StudyConfig": "probe.study",
    "run_study": "probe.study",
}

__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'probe' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
