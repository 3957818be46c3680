"""How near a decoder is to the construction of absolute position: its first layer's heads, what its stream holds, how
well it says where it is, and how far its weights are from those written by hand.

Positions are the paper's: t = 1 at the first token, which is ``<bos>`` where there is one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from constructions.layout import Layout
from probe.errors import ProbeError
from probe.models.decoder import Decoder, Hook
from probe.position import LinearProbe
from probe.tracing import EMBED, PATTERN, RESID_POST, SCORES, block_site, expand_sites, trace

RESID_MID = "hook_resid_mid"

Logits = Float[Tensor, "batch pos d_vocab"]


class Measured(NamedTuple):
    """One number, and where in the decoder it was measured; what does not apply is None."""

    site: str | None
    layer: int | None
    head: int | None
    metric: str
    value: float


@dataclass(frozen=True)
class Target:
    """How logits are read as a position: the loss they are trained by, and t̂."""

    loss: Callable[[Logits], Float[Tensor, ""]]
    position: Callable[[Logits], Float[Tensor, "batch pos"]]


def _positions(logits: Tensor) -> Int[Tensor, "pos"]:
    return torch.arange(1, logits.shape[1] + 1)


def _squared_error(logits: Logits) -> Float[Tensor, ""]:
    """Mean (y - t/T)², y the first unit of the head and T the length; T² times this is in positions squared."""
    return (logits[..., 0] - _positions(logits) / logits.shape[1]).square().mean()


def _cross_entropy(logits: Logits) -> Float[Tensor, ""]:
    """Mean -ln of the probability of class t, in nats; classes 1…T are the first T units of the head."""
    batch, length, _ = logits.shape
    return F.cross_entropy(logits[..., :length].flatten(0, 1), (_positions(logits) - 1).repeat(batch))


TARGETS: dict[str, Target] = {
    "regression": Target(_squared_error, lambda logits: logits[..., 0] * logits.shape[1]),
    "classification": Target(_cross_entropy, lambda logits: logits[..., : logits.shape[1]].argmax(-1).float() + 1),
}


@torch.no_grad()
def error_measures(decoder: Decoder, tokens: Int[Tensor, "batch pos"], target: str) -> list[Measured]:
    """How well the decoder says where it is, and the same with the first token hidden from all others.

    Metrics: ``loss`` (see TARGETS); ``mean_absolute_error``, |t̂ - t| in positions (always saying T/2 gives T/4);
    ``accuracy``, the share of tokens for which t̂, rounded, is t. The last two come again as ``…_masked``, at the
    scores that were edited: key 1 set to -inf for the queries 2…T, in layer 0 alone and (site without its layer) in
    every layer.
    """
    reading = TARGETS[target]
    logits = decoder(tokens)
    found = [Measured(None, None, None, "loss", reading.loss(logits).item())]
    edits = {(None, None, ""): [], (SCORES, 0, "_masked"): [block_site(0, SCORES)]}
    edits[(SCORES, None, "_masked")] = expand_sites([SCORES], decoder)
    for (site, layer, suffix), sites in edits.items():
        hooks: dict[str, Hook] = {each: _hide_first_key for each in sites}
        position = reading.position(decoder(tokens, hooks=hooks))
        t = _positions(position)
        error, right = (position - t).abs().mean(), (position.round() == t).float().mean()
        found.append(Measured(site, layer, None, f"mean_absolute_error{suffix}", error.item()))
        found.append(Measured(site, layer, None, f"accuracy{suffix}", right.item()))
    return found


def _hide_first_key(scores: Float[Tensor, "batch head query key"]) -> Float[Tensor, "batch head query key"]:
    scores = scores.clone()
    scores[..., 1:, 0] = -torch.inf
    return scores


def head_measures(decoder: Decoder, tokens: Int[Tensor, "batch pos"]) -> list[Measured]:
    """How each head of layer 0 divides its attention between the first token and the rest.

    A head for which the score of ``<bos>`` exceeds that of all other keys by a constant c puts the mass
    p = e^c / (e^c + t - 1) on it, so that ln(p / (1 - p)) = c - ln(t - 1); the construction has c = 0, p = 1/t. Over
    t = 2…T, the log-odds taken from the scores:

    - ``slope`` of the log-odds against ln(t - 1), least squares over all tokens; -1 for such a head.
    - ``c``, the mean of log-odds + ln(t - 1), in nats: the fitted scale.
    - ``spread``, the standard deviation of the log-odds over sequences at one t (root mean square over t), in nats:
      what the content does; 0 for such a head.
    - ``evenness``, the entropy of the pattern on the other keys, renormalised, over its largest value ln(t - 1); mean
      over t >= 3, in [0, 1]; 1 where they are attended evenly.
    - ``correlation`` of p with 1/t over all tokens. It says little: it is near 1 for any flat pattern.

    Raises:
        ProbeError: for fewer than two sequences or three positions.
    """
    if len(tokens) < 2 or tokens.shape[1] < 3:
        raise ProbeError(f"head measures want at least 2 sequences of 3 tokens, got shape {tuple(tokens.shape)}")
    scores = trace(decoder, tokens, [block_site(0, SCORES)]).scores(0).double()[:, :, 1:]
    others = torch.arange(1, tokens.shape[1], dtype=torch.float64)  # t - 1 at t = 2…T
    log_odds = scores[..., 0] - scores[..., 1:].logsumexp(-1)
    x = (others.log() - others.log().mean()).expand(len(tokens), -1)
    entropy = torch.special.entr(scores[..., 1:].softmax(-1)).sum(-1)
    found = []
    for head in range(scores.shape[1]):
        y = log_odds[:, head]
        p = y.sigmoid()
        pairs = torch.stack((p.flatten(), (1 / (others + 1)).expand_as(p).flatten()))
        values = {
            "slope": (x * y).sum() / x.square().sum(),
            "c": (y + others.log()).mean(),
            "spread": y.var(0).mean().sqrt(),
            "evenness": (entropy[:, head, 1:] / others.log()[1:]).mean(),
            "correlation": torch.corrcoef(pairs)[0, 1],
        }
        found += [Measured(PATTERN, 0, head, metric, value.item()) for metric, value in values.items()]
    return found


# A coordinate that varies by less than this share of the stream's root mean square is taken to be constant: what it
# carries is float32's rounding (1e-7), which a probe on standardised coordinates would otherwise read.
ROUNDING = 1e-5


def site_measures(decoder: Decoder, tokens: Int[Tensor, "batch pos"], alpha: float = 1.0) -> list[Measured]:
    """R² of ridge regressions of 1/t, ln t and t on the stream: at the embedding, after each attention, after each MLP.

    Coordinates are standardised and the penalty is ``alpha`` ‖w‖²; fitted on the first half of the sequences, scored on
    the others. 1 - Σ (y - ŷ)² / Σ (y - mean)², at most 1; below 0 is worse than the mean. The first position is left
    out: ``<bos>`` is known by its embedding, and 1/t varies there more than everywhere else.

    Raises:
        ProbeError: for fewer than two sequences or three positions.
    """
    if len(tokens) < 2 or tokens.shape[1] < 3:
        raise ProbeError(f"site measures want at least 2 sequences of 3 tokens, got shape {tuple(tokens.shape)}")
    sites: list[tuple[str, int | None]] = [(EMBED, None)]
    sites += [(site, layer) for layer in range(decoder.config.n_layers) for site in (RESID_MID, RESID_POST)]
    traced = trace(decoder, tokens, (EMBED, RESID_MID, RESID_POST))
    half = len(tokens) // 2
    t = torch.arange(2, tokens.shape[1] + 1, dtype=torch.float64)
    wanted = torch.stack((1 / t, t.log(), t), dim=-1)
    fitted_on, scored_on = wanted.repeat(half, 1), wanted.repeat(len(tokens) - half, 1)
    found = []
    for site, layer in sites:
        hidden = traced.hidden(site if layer is None else block_site(layer, site)).double()[:, 1:]
        fit, test = hidden[:half].flatten(0, 1), hidden[half:].flatten(0, 1)
        varies = fit.std(0, correction=0) > ROUNDING * fit.square().mean().sqrt()
        probe = LinearProbe((alpha,), standardize=True).fit(fit * varies, fitted_on)
        values = probe.r2(test * varies, scored_on)
        metrics = ("r2_reciprocal", "r2_log", "r2_position")
        found += [Measured(site, layer, None, *pair) for pair in zip(metrics, values.tolist(), strict=True)]
    return found


def weight_measures(decoder: Decoder, start: Decoder, construction: Decoder, layout: Layout) -> list[Measured]:
    """How far the weights are from where they started and from the construction.

    The essential weights are those that the construction sets to something else than 0, its arbitrary content aside.
    Metrics, by parameter (the site) and, without a site, over all of them:

    - ``change_from_start`` and ``change_from_construction``: the root mean square of w / w₀ - 1 over the essential
      weights; .05 for weights multiplied by 1 + 5 % noise.
    - ``weight_elsewhere``: the root mean square of all other weights (0 in the construction), content aside.
    """
    here, before, by_hand = (dict(each.named_parameters()) for each in (decoder, start, construction))
    changes: dict[str, dict[str | None, Tensor]] = {"change_from_start": {}, "change_from_construction": {}}
    elsewhere: dict[str | None, Tensor] = {}
    for name, exact in by_hand.items():
        counts = torch.ones_like(exact, dtype=torch.bool)
        if name == "token_embedding.weight":
            counts[:, layout.content] = False
        essential = (exact != 0) & counts
        w = here[name].detach().double()
        if essential.any():
            for metric, reference in zip(changes, (before[name], exact), strict=True):
                changes[metric][name] = w[essential] / reference.detach().double()[essential] - 1
        elsewhere[name] = w[counts & ~essential]
    found = []
    for metric, parts in {**changes, "weight_elsewhere": elsewhere}.items():
        by_site: Mapping[str | None, Tensor] = {None: torch.cat(list(parts.values())), **parts}
        for site, part in by_site.items():
            if len(part) and (site is None or metric == "change_from_construction"):
                found.append(Measured(site, None, None, metric, part.square().mean().sqrt().item()))
    return found
