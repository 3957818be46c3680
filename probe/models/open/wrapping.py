"""``probe.wrap``: a model that a researcher has in memory, under the names that every model here has."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from probe.errors import ProbeError
from probe.models.open.checked import check_transformers
from probe.models.open.quiet import quiet_transformers
from probe.models.open.transformers_model import TransformersModel
from probe.models.open.ways import as_model, is_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def wrap(model: nn.Module) -> nn.Module:
    """A model that every measurement takes, made of one that you have in memory.

    Args:
        model: a causal language model of transformers. Its weights are shared and it stays as it is. A model that
            measurements take already (a ``Decoder``, a ``ClockworkRNN``, a TransformerBridge) is returned unchanged.

    Raises:
        ProbeError: for a model whose attention can't be seen, and for one that computes something else when it is
            looked at, with the first thing that differs.

    Example:
        >>> gpt = transformers.AutoModelForCausalLM.from_pretrained("a-folder")
        >>> model = probe.wrap(gpt)
        >>> probe.trace(model, tokens).pattern(0)
    """
    if is_transformers(model):
        return wrap_transformers(model)
    as_model(model)
    return model


def wrap_transformers(model: Any, whose: str | None = None) -> TransformersModel:
    """A model of transformers under the attention seam, checked.

    Args:
        model: a ``PreTrainedModel``.
        whose: what errors call it; by default its class.

    Raises:
        ProbeError: see ``wrap``.
    """
    whose = whose or f"a {type(model).__name__}"
    _check_kind(model, whose)
    try:
        with quiet_transformers(), one_line(f"{whose}: transformers cannot run it"):
            wrapped = TransformersModel(model)
            wrapped.errors = check_transformers(wrapped, whose)
    except ProbeError as error:
        raise error if str(error).startswith(whose) else ProbeError(f"{whose}: {error}") from None
    return wrapped


def _check_kind(model: "PreTrainedModel", whose: str) -> None:
    if getattr(model.config, "is_encoder_decoder", False) or model.get_output_embeddings() is None:
        raise ProbeError(f"{whose}: a causal language model is needed, a decoder with a head over its vocabulary")
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not bool(parameter.isfinite().all()):
            raise ProbeError(f"{whose}: weights must be finite, got NaN or infinity in {name!r}")


@contextlib.contextmanager
def one_line(what: str, place: Path | None = None, folder: Path | None = None) -> Iterator[None]:
    """Whatever transformers or TransformerLens makes of a model, as one line of ours."""
    try:
        yield
    except ProbeError:
        raise
    except Exception as error:  # of many kinds; what the checkpoint makes of them is the user's to mend
        line = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ProbeError(f"{what}: {line if place is None else line.replace(str(place), str(folder))}") from None
