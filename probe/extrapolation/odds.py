"""Whether a factor in the rows of W_Q multiplies the log-odds of keys: found by trying, not by a model's name."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from probe.errors import ProbeError
from probe.models.mode import evaluating
from probe.models.open.ways import as_model
from probe.models.scaled import restore_rows, scale_rows
from probe.models.trial import random_tokens, tolerance
from probe.tracing import SCORES, trace

# The factor that is tried makes log-odds of about so many nats, where a soft cap or a clip shows, and a pattern in
# float32 is still above 0; it is at least 2, and at most the last.
NATS, LEAST, MOST = 40.0, 2.0, 2.0**12

# An attention module, as it is called, and its W_Q.
Attention = tuple[nn.Module, nn.Linear]


@torch.no_grad()
def check_odds_scale(model: nn.Module, attentions: Sequence[Attention]) -> None:
    """Refuse a model in which twice the queries are not twice the scores, beside what does not depend on queries. One
    whose weights are on the device "meta" passes: there is nothing to try.

    Scores are seen with W_Q times 0, f / 2 and f, on random tokens, while every attention module hands on what it does
    without a factor, so that all layers are seen at once. Scores with f, less those with 0, must be twice those with
    f / 2, up to what is the same for all keys of a query. Queries that are 0 pass.

    Raises:
        ProbeError: for such a model, naming the layer, or one whose scores or patterns cannot be seen.
    """
    if attentions[0][1].weight.is_meta:
        return
    with evaluating(model):
        view = as_model(model)
        tokens = random_tokens(view.anatomy.d_vocab, view.anatomy.n_ctx, view.device)
        outputs: dict[nn.Module, Any] = {}

        def with_factor(factor: float | None) -> list[Tensor]:
            with _tried(attentions, outputs, factor):
                return _scores(model, tokens)

        plain = with_factor(None)
        if len(plain) != len(attentions):
            raise ProbeError(f"a scale needs a q_proj in each of {len(plain)} layers, got {len(attentions)} of them")
        at_0 = with_factor(0.0)
        size = max(float(_difference(one, zero)[0].abs().max()) for one, zero in zip(plain, at_0, strict=True))
        factor = min(max(NATS / max(size, 1e-30), LEAST), MOST)
        at_half, at_whole = with_factor(factor / 2), with_factor(factor)
    for layer, (zero, half, whole) in enumerate(zip(at_0, at_half, at_whole, strict=True)):
        half, _ = _difference(half, zero)
        whole, rounding = _difference(whole, zero)
        if (whole - 2 * half).abs().max() > rounding:
            ratio = float((whole * half).sum() / (half * half).sum())
            raise ProbeError(
                f"a factor of 2 in the rows of W_Q must multiply the log-odds of layer {layer}'s keys by 2, got "
                f"{ratio:.3f}: the model normalises, clips or caps behind W_Q, or its positions depend on queries"
            )


def _difference(scores: Tensor, zero: Tensor) -> tuple[Tensor, float]:
    """Scores less those of queries of 0, less the mean over the keys of a query; and how much of it may be rounding."""
    seen = (scores > torch.finfo(scores.dtype).min / 2) & (zero > torch.finfo(zero.dtype).min / 2)
    n = seen.sum(-1, keepdim=True).clamp(min=1)

    def centred(x: Tensor) -> Tensor:
        x = x.double().where(seen, 0.0)
        return (x - x.sum(-1, keepdim=True) / n).where(seen, 0.0)

    return centred(scores) - centred(zero), tolerance(scores) * float(centred(scores).abs().max())


def _scores(model: nn.Module, tokens: Int[Tensor, "batch pos"]) -> list[Float[Tensor, "batch head query key"]]:
    """The scores of each layer that has attention; -inf where a key is hidden."""
    found = trace(model, tokens, [SCORES])
    return [found.scores(layer) for layer in found.layers_at(SCORES)]


@contextmanager
def _tried(attentions: Sequence[Attention], outputs: dict[nn.Module, Any], factor: float | None) -> Iterator[None]:
    """W_Q times a factor, and every attention module hands on what it put out before; without a factor that is kept.
    Other threads that run the model meanwhile see none of it."""
    here = threading.get_ident()

    def hand_on(module: nn.Module, _: Any, out: Any) -> Any:
        if threading.get_ident() != here:
            return None
        return outputs.setdefault(module, out)

    def rows_times(rows: Tensor) -> Tensor:
        return rows.new_full((len(rows),), factor if factor is not None and threading.get_ident() == here else 1.0)

    maps = [projection for _, projection in attentions]
    scale_rows(dict.fromkeys(maps, rows_times))
    handles = [attention.register_forward_hook(hand_on) for attention, _ in attentions]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        restore_rows(maps, keep=False)
