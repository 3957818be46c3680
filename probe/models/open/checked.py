"""Whether the seam says of a transformers model what the model does: logits, patterns, z, and that edits go through."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from probe.errors import ProbeError
from probe.models.layers import Hooks
from probe.models.lens.check import agree, relative_error, tolerance
from probe.models.mode import evaluating
from probe.models.open.blocks import trial_tokens
from probe.models.open.seam import EXPLICIT, FUSED, FUSED_BY_MASKS, Pass, watched
from probe.models.open.transformers_model import Errors, TransformersModel
from probe.models.protocol import Hook

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
    n_vocab, n_ctx = model.anatomy.d_vocab, model.anatomy.n_ctx
    tokens = trial_tokens(n_vocab, n_ctx, model.device)
    with evaluating(model.inner):
        with watched(model.inner, Pass(Hooks({})), "eager"), _without_its_hooks(model.inner):
            eager = model.inner(input_ids=tokens, use_cache=False, output_attentions=True)
        own = model.inner(input_ids=tokens, use_cache=False).logits
        agree(own, eager.logits, f"{whose}: the logits of transformers' fused and eager attention")
        plain = _run(model, tokens, "hook_pattern")
        _check_causal(plain, whose)
        agree(plain.logits, eager.logits, f"{whose}: the logits through the attention seam and transformers'")
        if relative_error(model.passed(tokens, Pass(Hooks({})), FUSED), eager.logits) > tolerance(own):
            model.fused = FUSED_BY_MASKS
        fused = model.passed(tokens, Pass(Hooks({})), model.fused)
        agree(fused, eager.logits, f"{whose}: the logits of the seam's fused attention and transformers'")
        patterns = _check_patterns(model, plain, getattr(eager, "attentions", None) or (), whose)
        _check_edits(model, tokens, whose)
    return Errors(relative_error(plain.logits, eager.logits), max(patterns, default=0.0), len(patterns))


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


class _Seen:
    """The logits of a run and, by layer, the values at one site."""

    def __init__(self, logits: Tensor, values: dict[int, Tensor]) -> None:
        self.logits, self.values = logits, values


def _run(
    model: TransformersModel, tokens: Tensor, site: str, edited: str = "", by_layer: Mapping[int, Tensor] | None = None
) -> _Seen:
    """A run that keeps the values at a site of attention, those at another site replaced in the layers given."""
    values: dict[int, Tensor] = {}

    def keep(layer: int) -> Hook:
        return lambda value: values.__setitem__(layer, value)

    def replace(layer: int, new: Tensor) -> Hook:
        return lambda value: new.to(value)

    where = site if site == "hook_attn_out" else f"attn.{site}"
    attending = [i for i, layer in enumerate(model.anatomy.layers) if layer.attends]
    hooks = {f"blocks.{i}.{where}": keep(i) for i in attending}
    hooks |= {f"blocks.{i}.attn.{edited}": replace(i, new) for i, new in (by_layer or {}).items()}
    return _Seen(model.passed(tokens, Pass(Hooks(hooks)), EXPLICIT), values)


def _check_causal(plain: _Seen, whose: str) -> None:
    for i, pattern in plain.values.items():
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
        got = plain.values[i]
        if layers[i].sink:  # some classes give out the pattern before the sink has taken its share
            got, wanted = (x / x.sum(-1, keepdim=True) for x in (got, wanted[..., : got.shape[-1]]))
        agree(got, wanted, f"{whose}: layer {i}'s pattern through the seam and transformers'")
        errors.append(relative_error(got, wanted))
    return errors


def _check_edits(model: TransformersModel, tokens: Tensor, whose: str) -> None:
    scores = _run(model, tokens, "hook_attn_scores").values
    equal = {i: torch.zeros_like(s).masked_fill(s == -torch.inf, -torch.inf) for i, s in scores.items()}
    by_scores = _run(model, tokens, "hook_pattern", "hook_attn_scores", equal)
    for i, pattern in by_scores.values.items():
        if not model.anatomy.layers[i].sink:
            uniform = (equal[i] == 0).float()
            agree(pattern, uniform / uniform.sum(-1, keepdim=True), f"{whose}: layer {i}'s pattern of equal scores")
    by_pattern = _run(model, tokens, "hook_attn_scores", "hook_pattern", by_scores.values)
    agree(by_scores.logits, by_pattern.logits, f"{whose}: logits with edited scores and with an edited pattern")
    z = _run(model, tokens, "hook_z").values
    nothing = {i: torch.zeros_like(x) for i, x in z.items() if f"blocks.{i}.attn.hook_z" in model.anatomy.sites}
    plain = _run(model, tokens, "hook_attn_out").values
    without = _run(model, tokens, "hook_attn_out", "hook_z", nothing).values
    for i in nothing:
        left, size = (without[i] - without[i][:1, :1]).abs().max(), plain[i].abs().max()
        if left > tolerance(plain[i]) * size:
            raise ProbeError(f"{whose}: what attention puts out in layer {i} must come from z alone, and does not")
