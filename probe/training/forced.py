"""What a model makes of completions, given the right tokens before each."""

from collections.abc import Callable, Mapping, Sequence

import pandas as pd
import torch
from jaxtyping import Float64
from torch import Tensor
from torch.nn.functional import cross_entropy

from probe.losses import likeliest
from probe.statistics import Bootstrap
from probe.training.data import EncodedExamples, at_once

Scores = dict[str, Float64[Tensor, "example"]]


@torch.no_grad()
def forced_scores(logits_of: Callable[[Tensor], Tensor], examples: EncodedExamples, *, batch_size: int = 256) -> Scores:
    """By example: "loss", the summed cross entropy of its scored tokens in nats; "token_accuracy", how many of them are
    the likeliest; "exact_match", whether all are, which is what greedy decoding gets right; "scored", how many they
    are. ``logits_of`` takes ids "batch pos"."""
    parts, d_vocab = [], logits_of(examples.tokens[:1, :1]).shape[-1]
    for rows in torch.arange(len(examples)).split(at_once(batch_size, examples.tokens.shape[1], d_vocab)):
        batch = examples.batch(rows)
        logits = logits_of(batch.inputs).float().cpu()
        loss = cross_entropy(logits.transpose(1, 2).double(), batch.targets, reduction="none")
        right = (likeliest(logits) == batch.targets) & batch.scored
        parts.append(
            torch.stack(
                [
                    loss.where(batch.scored, 0.0).sum(1),
                    right.sum(1).double(),
                    (right == batch.scored).all(1).double(),
                    batch.scored.sum(1).double(),
                ]
            )
        )
    return dict(zip(("loss", "token_accuracy", "exact_match", "scored"), torch.cat(parts, dim=1), strict=True))


def beside_baseline(
    column: str,
    found: Mapping[float, Scores],
    wanted: Sequence[float],
    baseline: float,
    *,
    n_bootstrap: int,
    confidence: float,
    seed: int,
) -> pd.DataFrame:
    """``forced_scores`` of the same examples under several settings, as rows.

    Metrics: "loss" (nats a scored token), "token_accuracy", "exact_match" (shares), each in a row more as its change
    from the ``baseline``, "loss_change" and so on, paired.

    Returns:
        Columns ``column`` (the setting), metric, value, low, high, n (examples): bootstrap intervals over examples.
    """
    n = len(found[baseline]["scored"])
    bootstrap = Bootstrap.draw(n, n_bootstrap, confidence, seed)
    weights = bootstrap.value_and_draws
    scored = weights @ found[baseline]["scored"]

    def draws(setting: float, metric: str) -> Tensor:
        of = weights @ found[setting][metric]
        return of if metric == "exact_match" else of / scored

    rows = []
    for setting in wanted:
        for metric in ("loss", "token_accuracy", "exact_match"):
            of = draws(setting, metric)
            for name, each in ((metric, of), (f"{metric}_change", of - draws(baseline, metric))):
                low, high = bootstrap.interval(each[1:])
                rows.append((setting, name, float(each[0]), float(low), float(high), n))
    return pd.DataFrame(rows, columns=[column, "metric", "value", "low", "high", "n"])
