"""Whether the seam says of a transformers model what the model does: logits, patterns, z, and that edits go through."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from probe.errors import ProbeError
from probe.models.layers import Hooks
from probe.models.mode import evaluating
from probe.models.open.seam import EXPLICIT, FUSED, FUSED_BY_MASKS, Pass, watched
from probe.models.open.transformers_model import Errors, TransformersModel
from probe.models.protocol import Hook
from probe.models.trial import agree, relative_error, tolerance

_SCORES, _PATTERN, _Z, _OUT = _SITES = ("attn.hook_attn_scores", "attn.hook_pattern", "attn.hook_z", "hook_attn_out")

# Where transformers notes that it has put hooks of its own on a model.
_FLAG = "_output_capturing_hooks_installed"


@torch.no_grad()
def check_transformers(model: TransformersModel, whose: str) -> Errors:
    """Hold a model's seam against transformers' own eager attention, before anyone measures anything on it.

    No layer attends to later tokens. The logits of eager attention, of the model's own and of both of the seam's are
    the same. So are the patterns that transformers gives out, for every layer that has one. Scores that are edited
    give the same logits as the pattern that they make, and nothing but z reaches what attention puts out.

    Args:
        model: the model under the seam.
        whose: what errors call it.

    Returns:
        How far logits and patterns are from those of eager attention.

    Raises:
        ProbeError: for the first of these that does not hold, with its error.
    """
    tokens = model.tokens()
    with evaluating(model.inner):
        with watched(model.inner, Pass(Hooks({})), "eager"), _without_its_hooks(model.inner):
            eager = model.inner(input_ids=tokens, use_cache=False, output_attentions=True)
        # Many classes take the eager softmax in float32 whatever their dtype, so float64 is compared as float32.
        theirs = eager.logits.float() if eager.logits.dtype == torch.float64 else eager.logits
        own = model.inner(input_ids=tokens, use_cache=False).logits
        agree(own, theirs, f"{whose}: the logits of transformers' fused and eager attention")
        plain = _run(model, tokens)
        _check_causal(plain, whose)
        agree(plain.logits, theirs, f"{whose}: the logits through the attention seam and transformers'")
        fused = model.passed(tokens, Pass(Hooks({})), FUSED)
        if relative_error(fused, theirs) > max(tolerance(fused), tolerance(theirs)):
            model.fused = FUSED_BY_MASKS
            fused = model.passed(tokens, Pass(Hooks({})), model.fused)
        agree(fused, theirs, f"{whose}: the logits of the seam's fused attention and transformers'")
        patterns = _check_patterns(model, plain, getattr(eager, "attentions", None) or (), whose)
        _check_edits(model, tokens, plain, whose)
    return Errors(relative_error(plain.logits, theirs), max(patterns, default=0.0), len(patterns))


@contextlib.contextmanager
def _without_its_hooks(model: nn.Module) -> Iterator[None]:
    """Take off the hooks with which transformers gives out patterns, once it has: no model with them can be saved."""
    modules = [*model.modules()]
    hooks = [set(module._forward_hooks) for module in modules]
    flagged = [module for module in modules if getattr(module, _FLAG, False)]
    try:
        yield
    finally:
        for module, before in zip(modules, hooks, strict=True):
            for key in set(module._forward_hooks) - before:
                del module._forward_hooks[key]
            if getattr(module, _FLAG, False) and not any(module is other for other in flagged):
                delattr(module, _FLAG)


@dataclass(frozen=True)
class _Seen:
    """The logits of a run and, by site and layer, the values that it kept."""

    logits: Tensor
    values: dict[str, dict[int, Tensor]]


def _run(
    model: TransformersModel, tokens: Tensor, edited: str = "", by_layer: Mapping[int, Tensor] | None = None
) -> _Seen:
    """A run that keeps the values at the sites of attention, those at one of them replaced in the layers given."""
    values: dict[str, dict[int, Tensor]] = {site: {} for site in _SITES}

    def hook(site: str, layer: int) -> Hook:
        new = None if site != edited or by_layer is None else by_layer.get(layer)

        def seen(value: Tensor) -> Tensor | None:
            values[site][layer] = value
            return None if new is None else new.to(value)

        return seen

    attending = [i for i, layer in enumerate(model.anatomy.layers) if layer.attends]
    hooks = {f"blocks.{i}.{site}": hook(site, i) for i in attending for site in _SITES}
    return _Seen(model.passed(tokens, Pass(Hooks(hooks)), EXPLICIT), values)


def _check_causal(plain: _Seen, whose: str) -> None:
    for i, pattern in plain.values[_PATTERN].items():
        if bool(pattern.triu(1).any()):
            raise ProbeError(f"{whose}: a causal language model is needed, but layer {i} attends to later tokens")


def _check_patterns(model: TransformersModel, plain: _Seen, theirs: Sequence[Tensor | None], whose: str) -> list[float]:
    """The error of every pattern that transformers gives out."""
    layers = model.anatomy.layers
    given = [pattern for pattern in theirs if pattern is not None]
    attending = [i for i, layer in enumerate(layers) if layer.attends]
    if len(given) == len(layers):
        pairs = [(i, given[i]) for i in attending]
    elif len(given) == len(attending):
        pairs = list(zip(attending, given, strict=True))
    else:
        pairs = []  # a class that gives out others than it has; the logits and edits are what is left to hold it to
    errors = []
    for i, wanted in pairs:
        wanted = wanted.float() if wanted.dtype == torch.float64 else wanted  # as the logits
        got = plain.values[_PATTERN][i]
        if layers[i].sink:  # some classes give out the pattern before the sink has taken its share
            got, wanted = (x / x.sum(-1, keepdim=True) for x in (got, wanted[..., : got.shape[-1]]))
        agree(got, wanted, f"{whose}: layer {i}'s pattern through the seam and transformers'")
        errors.append(relative_error(got, wanted))
    return errors


def _check_edits(model: TransformersModel, tokens: Tensor, plain: _Seen, whose: str) -> None:
    scores = plain.values[_SCORES]
    equal = {i: torch.zeros_like(s).masked_fill(s == -torch.inf, -torch.inf) for i, s in scores.items()}
    by_scores = _run(model, tokens, _SCORES, equal)
    patterns = by_scores.values[_PATTERN]
    for i, pattern in patterns.items():
        if not model.anatomy.layers[i].sink:
            uniform = (equal[i] == 0).float()
            agree(pattern, uniform / uniform.sum(-1, keepdim=True), f"{whose}: layer {i}'s pattern of equal scores")
    by_pattern = _run(model, tokens, _PATTERN, patterns)
    agree(by_scores.logits, by_pattern.logits, f"{whose}: logits with edited scores and with an edited pattern")
    z = {i: x for i, x in plain.values[_Z].items() if f"blocks.{i}.{_Z}" in model.anatomy.sites}
    without = _run(model, tokens, _Z, {i: torch.zeros_like(x) for i, x in z.items()}).values[_OUT]
    for i in z:
        left, out = (without[i] - without[i][:1, :1]).abs().max(), plain.values[_OUT][i]
        if left > tolerance(out) * out.abs().max():
            raise ProbeError(f"{whose}: what attention puts out in layer {i} must come from z alone, and does not")
