"""``probe.wrap``: a model that a researcher has in memory, under the names that every model here has."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from probe.errors import ProbeError
from probe.models.open.any_module import CallModule, ModuleModel, check_module
from probe.models.open.checked import check_transformers
from probe.models.open.quiet import quiet_transformers
from probe.models.open.recorded import recorded
from probe.models.open.transformers_model import TransformersModel
from probe.models.open.ways import as_model, is_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def wrap(
    model: Any,
    *,
    blocks: str | None = None,
    embed: str | None = None,
    call: CallModule | None = None,
    n_ctx: int | None = None,
    untrained: Callable[[int], nn.Module] | None = None,
) -> nn.Module:
    """A model that every measurement takes, made of one that you have in memory.

    What it computes is checked first, on random tokens: it is the same whether anybody looks or not, and an edit of
    scores has the same effect as the same edit of the pattern.

    Args:
        model: one of these, which is shared and stays as it is:

            - a causal language model of transformers;
            - any torch module that maps token ids to logits and computes attention by ``scaled_dot_product_attention``
              or by a softmax over scores "batch head query key": a nanoGPT, say. The arguments below are for it;
            - a ``Trace``, which then stands for the model that it was taken of;
            - a model that measurements take already (a ``Decoder``, a ``ClockworkRNN``, a TransformerBridge), which is
              returned unchanged.
        blocks: the names of a module's blocks, as ``named_modules`` has them, with ``*`` for one part:
            "transformer.h.*". By default the list of modules in which attention is computed.
        embed: the name of the embedding of tokens. By default the first ``nn.Embedding``.
        call: how to get logits "batch pos d_vocab" from a module and token ids, where ``module(ids)`` is not enough.
        n_ctx: the longest sequence that a module takes.
        untrained: makes a module of the same kind from a seed, for controls. By default every part of a copy draws its
            weights anew, by its ``reset_parameters``.

    Raises:
        ProbeError: for a model whose attention can't be seen, with what to name, and for one that computes something
            else when it is looked at, with the first thing that differs.

    Example:
        >>> gpt = transformers.AutoModelForCausalLM.from_pretrained("a-folder")
        >>> model = probe.wrap(gpt)
        >>> probe.trace(model, tokens).pattern(0)
    """
    if is_transformers(model):
        return wrap_transformers(model)
    values = getattr(model, "values", None)
    if isinstance(values, Mapping):  # a Trace, which stands above this file
        trace: Any = model
        beside = {"lengths": trace.lengths, "sinks": trace.sinks, "n_layers": trace.n_layers}
        return recorded(trace.tokens, {"values": values}, **beside)
    if not isinstance(model, nn.Module):
        raise ProbeError(f"model must be a torch module or a Trace, got {type(model).__name__}")
    if hasattr(type(model), "attention_inputs") or hasattr(model, "run_with_cache"):
        as_model(model)
        return model
    wrapped = ModuleModel(model, blocks, embed, call, n_ctx, untrained)
    check_module(wrapped)
    return wrapped


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
