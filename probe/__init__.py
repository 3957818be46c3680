"""Mechanistic interpretability of position: tokens → model → trace → measurement → rows → figure.

The names below are what a notebook uses. Each of them, and each module of this package (``probe.position``, say), is
imported when it is first asked for, so ``import probe`` is cheap.
"""

import functools
import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names, for whoever reads types and runs nothing
    from probe import attention as attention
    from probe import benchmark as benchmark
    from probe import cli as cli
    from probe import extrapolation as extrapolation
    from probe import measure as measure
    from probe import models as models
    from probe import position as position
    from probe import report as report
    from probe import runs as runs
    from probe import study as study
    from probe import sweep as sweep
    from probe import tasks as tasks
    from probe import training as training
    from probe.attention import DISTANCES as DISTANCES
    from probe.attention import TEMPLATES as TEMPLATES
    from probe.attention import census as census
    from probe.attention import compare_models as compare_models
    from probe.attention import compare_templates as compare_templates
    from probe.attention import split_scores as split_scores
    from probe.attention import stream as stream
    from probe.errors import ProbeError as ProbeError
    from probe.extrapolation import HeadScale as HeadScale
    from probe.extrapolation import UniformScale as UniformScale
    from probe.extrapolation import passkey as passkey
    from probe.extrapolation import perplexity as perplexity
    from probe.models.checkpoint import load as load
    from probe.models.checkpoint import save as save
    from probe.models.clockwork import ClockworkConfig as ClockworkConfig
    from probe.models.clockwork import ClockworkRNN as ClockworkRNN
    from probe.models.decoder import Decoder as Decoder
    from probe.models.decoder import DecoderConfig as DecoderConfig
    from probe.models.encodings import ENCODINGS as ENCODINGS
    from probe.models.encodings import alibi_slopes as alibi_slopes
    from probe.models.encodings import t5_bucket as t5_bucket
    from probe.models.lens import to_bridge as to_bridge
    from probe.models.open.wrapping import wrap as wrap
    from probe.models.pretrained import load_pretrained as load_pretrained
    from probe.models.variants import variant as variant
    from probe.position import fit_position_probe as fit_position_probe
    from probe.study import StudyConfig as StudyConfig
    from probe.study import run_study as run_study
    from probe.tasks import TASKS as TASKS
    from probe.tasks import make_task as make_task
    from probe.tracing import Trace as Trace
    from probe.tracing import trace as trace
    from probe.training import TrainingConfig as TrainingConfig
    from probe.training import encode as encode
    from probe.training import exact_match as exact_match
    from probe.training import predict as predict
    from probe.training import train as train

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
    "wrap": "probe.models.open.wrapping",
    "variant": "probe.models.variants",
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


@functools.cache
def _modules() -> frozenset[str]:
    """The names of the modules and packages of this package."""
    return frozenset(found.name for found in pkgutil.iter_modules(__path__) if not found.name.startswith("_"))


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _modules():
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_modules()})
