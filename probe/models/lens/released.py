"""Models of transformers under a ``TransformerBridge``, for those who ask for one: checked before it is handed out."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from probe.errors import ProbeError
from probe.models.lens.check import Witness, check_bridge
from probe.models.open.loading import load_transformers
from probe.models.open.transformers_model import drawn_like
from probe.models.open.wrapping import one_line

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel


def load_bridge(folder: Path, device: torch.device, dtype: torch.dtype | None = None) -> "TransformerBridge":
    """The model in a folder of Hugging Face's format, as Hugging Face's class for it under a ``TransformerBridge``.

    Nothing is believed of it: ``check_bridge`` compares it with the class itself before it is handed out. There is no
    tokenizer; tokens are ids.

    Args:
        folder: with ``config.json`` and safetensors.
        device: where the weights go.
        dtype: that of the weights; None: as they are stored.

    Raises:
        ProbeError: as ``load_transformers``; for a model that TransformerLens does not know, or a bridge that is not
            exact.
    """
    return bridge_of(load_transformers(folder, device, dtype), str(folder))


def untrained_bridge(bridge: "TransformerBridge", seed: int) -> "TransformerBridge":
    """The same architecture with fresh weights, as Hugging Face draws them: the control of what training did."""
    import transformers

    old: Any = bridge.original_model
    if not isinstance(getattr(old, "config", None), transformers.PreTrainedConfig):
        raise ProbeError(
            f"a model of Hugging Face's was wanted, to draw another like it, got {type(old).__name__}: "
            "hand one over as untrained="
        )
    return _wrap(drawn_like(old, seed), old.config)


def bridge_of(model: "PreTrainedModel", whose: str) -> "TransformerBridge":
    """The bridge of a model, checked.

    Args:
        model: a model of transformers with eager attention; TransformerLens puts its own modules into it.
        whose: what errors call it.

    Raises:
        ProbeError: for a model that TransformerLens does not know, or a bridge that is not exact.
    """
    # What the class itself does is seen before TransformerLens puts its own modules into it.
    model.set_attn_implementation("eager")
    with one_line(f"{whose}: transformers cannot run it"):
        witness = Witness.of(model, whose)
    bridge = _wrap(model, model.config, whose)
    with one_line(f"{whose}: the bridge cannot be checked"):
        check_bridge(bridge, witness, whose)
    return bridge


def _wrap(model: "PreTrainedModel", config: Any, whose: str = "") -> "TransformerBridge":
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    with one_line(f"{whose}: TransformerLens cannot bridge a {type(model).__name__}"):
        return build_bridge_from_module(model, type(model).__name__, hf_config=config)
