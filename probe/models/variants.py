"""The same weights under a changed config: what a model becomes when its encoding is dropped or stretched."""

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from probe.errors import ProbeError, unknown_name
from probe.models.attention_functions import ATTENTION_FUNCTIONS
from probe.models.config import DecoderConfig
from probe.models.decoder import Decoder
from probe.models.encodings import ENCODINGS
from probe.models.encodings.base import options_of

# What a change may replace: the field that names it, that of its options, and its kinds.
REPLACED: tuple[tuple[str, str, Mapping[str, type[nn.Module]]], ...] = (
    ("encoding", "encoding_options", ENCODINGS),
    ("attention_function", "attention_options", ATTENTION_FUNCTIONS),
)


@torch.no_grad()
def variant(decoder: nn.Module, *, seed: int = 0, **changes: Any) -> Decoder:
    """A copy of a decoder with some fields of its config changed, on the same device, in the same dtype and mode.

    >>> variant(decoder, encoding="none")  # its encoding dropped, as DroPE does (Gelberg et al. 2025)
    >>> variant(decoder, encoding_options={"scaling": "yarn", "factor": 4})

    Weights are copied by name. An encoding's and an attention function's are so only where it stays the same one and
    they keep their shapes; others of theirs are dropped, or drawn from ``seed`` (a learned table for another n_ctx,
    say). Options that are not given stay, unless the encoding or attention function is another: then they are its
    defaults. With another n_ctx, a ``trained_length`` that nobody named stays what it was: the old n_ctx. The fixed
    positions of randomized encodings are drawn for n_ctx, so that they become others.

    Raises:
        ProbeError: for a field that does not exist, a config that cannot be, or a change under which any other weight
            would have another name or shape.
    """
    if not isinstance(decoder, Decoder):
        raise ProbeError(f"a variant wants a Decoder, got {type(decoder).__name__}")
    old = decoder.config
    names = [field.name for field in dataclasses.fields(DecoderConfig)]
    for name in changes:
        if name not in names:
            raise unknown_name("field of a decoder's config", name, names)
    for name, options, kinds in REPLACED:
        kind = changes.get(name, getattr(old, name))
        if kind != getattr(old, name):
            changes.setdefault(options, {})
        given = changes.get(options, getattr(old, options))
        if changes.get("n_ctx", old.n_ctx) != old.n_ctx and _has_trained_length(kinds, kind, given):
            changes[options] = {**given, "trained_length": old.n_ctx}
    new = Decoder(dataclasses.replace(old, **changes), seed=seed).to(decoder.device, decoder.dtype)
    _copy_weights(decoder, new)
    return new.train(decoder.training)


def standing_still(decoder: Decoder, position: int) -> Decoder:
    """The same decoder, all of whose tokens stand at one position: nothing that its encoding does tells them apart.

    It shares the decoder's parameters. The order of tokens is still there for the causal mask.
    """

    def positions(n: int, random: bool = False) -> Tensor:
        return torch.full((n,), position)

    encoding = copy.copy(decoder.encoding)
    encoding.positions = positions  # type: ignore[method-assign]
    still = copy.copy(decoder)
    still._modules = {**decoder._modules, "encoding": encoding}
    return still


def _has_trained_length(kinds: Mapping[str, type[nn.Module]], kind: Any, given: Any) -> bool:
    """Whether such a one has a trained length that is not given. What is wrong is the config's to refuse."""
    known = isinstance(kind, str) and kind in kinds and isinstance(given, dict)
    return known and "trained_length" in options_of(kinds[kind]) and given.get("trained_length") is None


def _copy_weights(old: Decoder, new: Decoder) -> None:
    same = [part for part, *_ in REPLACED if getattr(old.config, part) == getattr(new.config, part)]
    # What a scale makes of its weights is in the state of the old one, and not in its parameters.
    weights, wanted = old.state_dict(), dict(new.named_parameters())
    weights = {name: weights[name] for name, _ in old.named_parameters()}
    for name in {**weights, **wanted}:
        before, after = (tuple(of[name].shape) if name in of else None for of in (weights, wanted))
        part = _part(name)
        if part is None and before != after:
            raise ProbeError(
                f"a variant keeps all weights but those of encoding and attention function: {name} would have shape "
                f"{_said(after)}, got {_said(before)}"
            )
        if before == after and (part is None or part in same):
            wanted[name].copy_(weights[name])


def _part(name: str) -> str | None:
    """The field that a weight follows from, of those in ``REPLACED``."""
    if name.startswith("encoding."):
        return "encoding"
    return "attention_function" if ".attention.function." in name else None


def _said(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else str(shape)
