"""Whether a bridge says of a model what the model does: logits, patterns, scores, and that edits go through."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from probe.errors import ProbeError
from probe.models.decoder import Decoder
from probe.models.mode import evaluating
from probe.models.trial import agree, random_tokens, tolerance

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What of each layer is looked at.
SITES = {
    "scores": "attn.hook_attn_scores",
    "pattern": "attn.hook_pattern",
    "v": "attn.hook_v",
    "z": "attn.hook_z",
    "out": "hook_attn_out",
}


@dataclass(frozen=True)
class Witness:
    """What a model of Hugging Face's computes by itself, on tokens drawn at random."""

    tokens: Int[Tensor, "batch pos"]
    logits: Float[Tensor, "batch pos d_vocab"]
    patterns: tuple[Float[Tensor, "batch head query key"], ...]  # of each layer

    @classmethod
    @torch.no_grad()
    def of(cls, model: "PreTrainedModel", whose: str) -> "Witness":
        """Of a model with eager attention, which must agree with the fused one that Hugging Face takes by default.

        Where a class has but one of them this says nothing.

        Raises:
            ProbeError: where a model gives no patterns, or the two attentions do not agree.
        """
        vocabulary = model.config.get_text_config().vocab_size
        longest = getattr(model.config, "max_position_embeddings", None)
        tokens = random_tokens(vocabulary, longest, model.device)
        eager = model(tokens, output_attentions=True, use_cache=False)
        patterns = getattr(eager, "attentions", None)
        if not patterns or any(pattern is None for pattern in patterns):
            raise ProbeError(f"{whose}: a {type(model).__name__} gives no attention patterns")
        try:
            model.set_attn_implementation("sdpa")
        except (ValueError, ImportError):  # it has eager attention alone
            pass
        else:
            fused = model(tokens, use_cache=False).logits
            agree(fused, eager.logits, f"{whose}: the logits of transformers' fused and eager attention")
            model.set_attn_implementation("eager")
        return cls(tokens, eager.logits, patterns)


# Bridges that were checked: each once, however often it is measured.
_checked: WeakSet[nn.Module] = WeakSet()


def check_bridge(bridge: Any, witness: Witness, whose: str) -> None:
    """Hold a bridge against the model that it wraps, before anyone measures anything on it.

    Logits and every layer's pattern are the model's, and what ``check_itself`` asks of a bridge holds.

    Raises:
        ProbeError: for the first of these that does not hold, with its error.
    """
    run = _Runs(bridge, witness.tokens, whose)
    with torch.no_grad():
        plain = run()
        agree(plain.logits, witness.logits, f"{whose}: the bridge's logits and transformers'")
        if len(plain.pattern) != len(witness.patterns):
            raise ProbeError(f"{whose}: there must be {len(witness.patterns)} patterns, got {len(plain.pattern)}")
        for layer, (pattern, theirs) in enumerate(zip(plain.pattern, witness.patterns, strict=True)):
            agree(pattern, theirs, f"{whose}: layer {layer}'s pattern in the bridge and in transformers")
        _check_edits(run, plain)
    _checked.add(bridge)


def check_once(bridge: Any) -> None:
    """Check a bridge that a user made, when it is measured for the first time; one of a decoder of ours is known.

    What there was before TransformerLens put its modules into the model is not known any more, so that the bridge is
    held against itself alone.

    Raises:
        ProbeError: as ``check_bridge``, where the bridge contradicts itself.
    """
    if bridge in _checked or isinstance(getattr(bridge, "original_model", None), Decoder):
        return
    config = bridge.cfg
    tokens = random_tokens(config.d_vocab, config.n_ctx, next(bridge.parameters()).device)
    run = _Runs(bridge, tokens, f"a bridge of {type(getattr(bridge, 'original_model', bridge)).__name__}")
    with torch.no_grad(), evaluating(bridge):
        _check_edits(run, run())
    _checked.add(bridge)


def _check_edits(run: "_Runs", plain: "_Values") -> None:
    """The pattern must be the softmax of what the bridge calls scores; scores that are edited must make the pattern,
    and an edited pattern z and the logits; nothing but z may reach the output of attention.

    TransformerLens 4.3 fails here, without a word of its own, for GPT-J, GPT-Neo, OPT and XGLM: their scores are
    patterns, and edits are dropped.
    """
    whose, hidden = run.whose, []  # hidden: True where a layer hides a key from a query
    for layer, (scores, pattern) in enumerate(zip(plain.scores, plain.pattern, strict=True)):
        agree(scores.float().softmax(-1), pattern, f"{whose}: the softmax of layer {layer}'s scores and its pattern")
        hidden.append(scores <= torch.finfo(scores.dtype).min / 2)

    # Equal scores and a uniform pattern are the same edit, made at two places, of all layers at once.
    uniform = [(~h).float() / (~h).sum(-1, keepdim=True) for h in hidden]
    by_scores = run("scores", [torch.zeros(h.shape).masked_fill(h.cpu(), -torch.inf) for h in hidden])
    by_pattern = run("pattern", uniform)
    for layer, wanted in enumerate(uniform):
        agree(by_scores.pattern[layer], wanted, f"{whose}: layer {layer}'s pattern and that of its edited scores")
        v = by_pattern.v[layer].transpose(1, 2).float()
        z = (wanted @ v.repeat_interleave(wanted.shape[1] // v.shape[1], dim=1)).transpose(1, 2)
        agree(by_pattern.z[layer].reshape(z.shape), z, f"{whose}: layer {layer}'s z and that of its edited pattern")
    agree(by_scores.logits, by_pattern.logits, f"{whose}: logits with edited scores and with an edited pattern")
    for layer, out in enumerate(run("z", [torch.zeros_like(z) for z in plain.z]).out):
        left, size = (out - out[:1, :1]).abs().max(), plain.out[layer].abs().max()
        if left > tolerance(out) * size:
            raise ProbeError(f"{whose}: what attention puts out in layer {layer} must come from z alone, and does not")


@dataclass(frozen=True)
class _Values:
    """What a bridge computes: the logits and, of each layer, what is at each of ``SITES``."""

    logits: Tensor
    scores: list[Tensor]
    pattern: list[Tensor]
    v: list[Tensor]
    z: list[Tensor]
    out: list[Tensor]


@dataclass(frozen=True)
class _Runs:
    """A bridge on some tokens."""

    bridge: Any
    tokens: Tensor
    whose: str

    def __call__(self, edited: str | None = None, by_layer: Sequence[Tensor] = ()) -> _Values:
        """All values, those of one of ``SITES`` replaced layer by layer."""
        seen: dict[tuple[str, int], Tensor] = {}

        def at(name: str, layer: int) -> Callable[..., Tensor | None]:
            def hook(value: Tensor, hook: Any) -> Tensor | None:
                seen[name, layer] = by_layer[layer].to(value) if name == edited else value
                return seen[name, layer] if name == edited else None

            return hook

        layers = range(self.bridge.cfg.n_layers)
        hooks = [(f"blocks.{layer}.{site}", at(name, layer)) for name, site in SITES.items() for layer in layers]
        try:
            logits = self.bridge.run_with_hooks(self.tokens, fwd_hooks=hooks, use_cache=False)
        except Exception as error:  # of any kind: what TransformerLens makes of the model's modules
            said = " ".join(str(error).split())[:200]
            raise ProbeError(f"{self.whose}: the bridge does not run: {type(error).__name__}: {said}") from None
        for name, site in SITES.items():
            for layer in layers:
                if (name, layer) not in seen:
                    raise ProbeError(f"{self.whose}: the bridge never comes to blocks.{layer}.{site}")
        return _Values(logits, **{name: [seen[name, layer] for layer in layers] for name in SITES})
