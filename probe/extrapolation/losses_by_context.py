"""Perplexity by the length of the context, and by the position in it."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float64, Int
from torch import Tensor, nn

from probe.config import check_size
from probe.errors import ProbeError
from probe.extrapolation.fitting import device_of, logits_of, vocabulary_of
from probe.limits import current
from probe.losses import token_losses
from probe.models.mode import evaluating
from probe.progress import OnProgress, Steps, untold
from probe.sequences import Sequences, TokenIds, token_ids
from probe.statistics import N_BOOTSTRAP, Bootstrap
from probe.training.data import at_once


def perplexity(
    model: nn.Module,
    texts: TokenIds,
    contexts: Sequence[int],
    *,
    prefix: Sequence[int] = (),
    stride: int | None = None,
    score_from: int = 0,
    n_bootstrap: int = N_BOOTSTRAP,
    confidence: float = 0.95,
    seed: int = 0,
    on_progress: OnProgress = untold,
) -> pd.DataFrame:
    """exp of the mean loss of the same tokens, each given the tokens before it that fit into a context.

    A window of ``context`` tokens (``prefix`` and the text's) moves over each text by ``stride``; of the first all
    tokens count, of the others those that no window before held, so each but the first window's is given at least
    context - stride tokens. A window's first token has none before it, unless there is a ``prefix``, and does not
    count: with windows that do not overlap (``stride`` all of a window) that is one token for each window. Where a text
    fits into one window this is its perplexity in one forward pass. Memory is that of one window.

    Args:
        model: any that maps ids "batch pos" to logits, ours, a bridge or Hugging Face's.
        contexts: tokens in a window.
        prefix: ids in front of every window (``<bos>``), as the model was trained with.
        stride: tokens from one window to the next, at most what a window holds of the text; half of that where None.
        score_from: only tokens from this index of a text on count. The longest context less the prefix, say, gives
            every context the same tokens and each of them a full context.
        on_progress: called with how many contexts are done, and how many there are.

    Returns:
        Columns context, metric ("perplexity"; "loss" in nats, and "bits", a token), value, low, high (bootstrap
        intervals over texts), n (distinct texts) and tokens (of each text, that count).

    Raises:
        ProbeError: for a context that has no room after the prefix, or texts with no token to score.
    """
    losses = context_losses(
        model, texts, contexts, prefix=prefix, stride=stride, score_from=score_from, on_progress=on_progress
    )
    return perplexity_rows(losses, n_bootstrap=n_bootstrap, confidence=confidence, seed=seed)


@dataclass(frozen=True)
class ContextLosses:
    """The mean loss of each text's scored tokens, in nats, by context."""

    by_context: dict[int, Float64[Tensor, "text"]]  #: nats a token of each text, by the context
    tokens: dict[int, int]  #: how many tokens of each text are scored, by the context


def context_losses(
    model: nn.Module,
    texts: TokenIds,
    contexts: Sequence[int],
    *,
    prefix: Sequence[int] = (),
    stride: int | None = None,
    score_from: int = 0,
    on_progress: OnProgress = untold,
) -> ContextLosses:
    """What ``perplexity`` is made of, text by text: of each distinct text."""
    texts = _distinct_texts(texts)
    first = max(score_from, 0 if len(prefix) else 1)  # nothing predicts the first token of all
    if first >= texts.shape[1]:
        raise ProbeError(f"texts must have more than {first} tokens, got {texts.shape[1]}")
    found, counted, steps = {}, {}, Steps(len(contexts), on_progress)
    for context in contexts:
        check_size("contexts", context, least=len(prefix) + 2)
        losses = sliding_losses(model, texts, context, prefix=prefix, stride=stride, score_from=first)[:, first:]
        predicted = losses[:, ~losses[0].isnan()]  # the same tokens of every text
        if not predicted.shape[1]:
            raise ProbeError(f"texts must have a token to score from index {first} on that has one before it, got none")
        found[context], counted[context] = predicted.mean(1), predicted.shape[1]
        steps.step()
    return ContextLosses(found, counted)


def perplexity_rows(
    losses: ContextLosses,
    baseline: ContextLosses | None = None,
    *,
    n_bootstrap: int = N_BOOTSTRAP,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """The rows of ``perplexity``; with another model's losses on the same texts as ``baseline`` also "loss_change", by
    how many nats a token these are more than its, paired by text."""
    rows = []
    for context, by_text in losses.by_context.items():
        bootstrap = Bootstrap.draw(len(by_text), n_bootstrap, confidence, seed)
        loss = bootstrap.value_and_draws @ by_text
        metrics = {"perplexity": loss.exp(), "loss": loss, "bits": loss / math.log(2)}
        if baseline is not None:
            metrics["loss_change"] = bootstrap.value_and_draws @ (by_text - baseline.by_context[context])
        for metric, draws in metrics.items():
            low, high = bootstrap.interval(draws[1:])
            n, tokens = len(by_text), losses.tokens[context]
            rows.append((context, metric, float(draws[0]), float(low), float(high), n, tokens))
    return pd.DataFrame(rows, columns=["context", "metric", "value", "low", "high", "n", "tokens"])


def sliding_losses(
    model: nn.Module,
    texts: Int[Tensor, "text token"],
    context: int,
    *,
    prefix: Sequence[int] = (),
    stride: int | None = None,
    score_from: int = 0,
) -> Float64[Tensor, "text token"]:
    """The loss of every token as ``perplexity`` counts it, in nats; NaN where a token is not predicted."""
    room = context - len(prefix)
    stride = max(1, room // 2) if stride is None else stride
    check_size("stride", stride)
    if stride > room:
        raise ProbeError(f"stride must be at most {room}, what a window holds of a text, got {stride}")
    device, d_vocab = device_of(model), vocabulary_of(model)
    found = torch.full(texts.shape, torch.nan, dtype=torch.float64)
    front = torch.tensor(prefix, dtype=texts.dtype).expand(len(texts), -1)
    with torch.no_grad(), evaluating(model):
        n = at_once(max(1, current().window_tokens // context), context, d_vocab)
        for start, end, new in _windows(texts.shape[1], room, stride):
            if end <= score_from:
                continue
            windows = torch.cat((front, texts[:, start:end]), dim=1)
            losses = torch.cat([token_losses(logits_of(model, w.to(device)), w).cpu() for w in windows.split(n)])
            # losses[:, j] is that of windows[:, j + 1]: nothing predicts the first token of a window
            new = max(new, start + 1) if not len(prefix) else new
            found[:, new:end] = losses[:, new - start + len(prefix) - 1 :]
    return found


def _windows(n: int, room: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Start and end of each window, and where in the text begins what no window before held."""
    seen, end = 0, min(room, n)
    while seen < n:
        yield max(0, end - room), end, seen
        seen, end = end, min(end + stride, n)


def loss_by_position(
    model: nn.Module,
    texts: TokenIds,
    *,
    prefix: Sequence[int] = (),
    n_bins: int = 64,
    n_bootstrap: int = N_BOOTSTRAP,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """The loss of a token by its position in one window that holds the whole text, where a model's length ends.

    Returns:
        Columns position (0-based, the mean of a bin of neighbours), metric "loss" (nats a token), value, low, high
        (bootstrap intervals over texts), n (distinct texts) and tokens (in the bin).

    Raises:
        ProbeError: for texts of fewer than two tokens.
    """
    texts = _distinct_texts(texts)
    check_size("n_bins", n_bins)
    if texts.shape[1] < 2:
        raise ProbeError(f"texts must have at least 2 tokens, got {texts.shape[1]}")
    context = texts.shape[1] + len(prefix)
    losses = sliding_losses(model, texts, context, prefix=prefix)
    position = torch.arange(len(prefix), context)
    if not len(prefix):
        losses, position = losses[:, 1:], position[1:]
    bootstrap = Bootstrap.draw(len(texts), n_bootstrap, confidence, seed)
    rows = []
    for part, at in zip(losses.tensor_split(n_bins, dim=1), position.tensor_split(n_bins), strict=True):
        if len(at):
            draws = bootstrap.value_and_draws @ part.mean(1)
            low, high = bootstrap.interval(draws[1:])
            rows.append(
                (float(at.double().mean()), "loss", float(draws[0]), float(low), float(high), len(texts), len(at))
            )
    return pd.DataFrame(rows, columns=["position", "metric", "value", "low", "high", "n", "tokens"])


def _distinct_texts(texts: TokenIds) -> Int[Tensor, "text token"]:
    return Sequences.of(token_ids(texts, "texts"), what="texts").distinct().tokens
