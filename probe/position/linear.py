"""Linear probes for position: what a linear map can read off the hidden states, beside what it reads off controls."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from scipy.stats import rankdata
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from probe.config import check_number, check_size
from probe.errors import ProbeError, unknown_name
from probe.models.decoder import Decoder
from probe.tracing import EMBED, RESID_POST, Trace, expand_sites, trace

CONTROLS = ("untrained", "embedding", "shuffled")


@dataclass(frozen=True)
class Tokens:
    """Hidden states token by token, with the position (0-based) and the sequence of each."""

    hidden: Float[ndarray, "token d_model"]
    position: Int[ndarray, "token"]
    sequence: Int[ndarray, "token"]

    @classmethod
    def of(cls, traced: Trace, site: str) -> "Tokens":
        """The tokens of a trace at one site, padding left out."""
        hidden = traced.hidden(site)
        batch, length, _ = hidden.shape
        position = torch.arange(length).expand(batch, -1)
        counts = position < traced.lengths[:, None]
        sequence = torch.arange(batch)[:, None].expand(-1, length)
        return cls(hidden[counts].float().numpy(), position[counts].numpy(), sequence[counts].numpy())

    def of_sequences(self, sequences: Int[ndarray, "kept"]) -> "Tokens":
        rows = np.isin(self.sequence, sequences)
        return Tokens(self.hidden[rows], self.position[rows], self.sequence[rows])

    def shuffled(self, rng: np.random.Generator) -> "Tokens":
        """The same tokens with the positions of each sequence dealt out anew."""
        by_chance = rng.permutation(len(self.position))
        dealt = by_chance[np.argsort(self.sequence[by_chance], kind="stable")]
        return Tokens(self.hidden, self.position[dealt], self.sequence)


def r2(true: ndarray, predicted: ndarray) -> float:
    """1 - Σ (p - p̂)² / Σ (p - mean)², at most 1; 0 is what the mean position reaches, below 0 is worse."""
    return float(1 - ((true - predicted) ** 2).sum() / ((true - true.mean()) ** 2).sum())


def mean_absolute_error(true: ndarray, predicted: ndarray) -> float:
    """Mean |p - p̂| in tokens."""
    return float(np.abs(true - predicted).mean())


def accuracy(true: ndarray, predicted: ndarray) -> float:
    """The share of tokens whose position is predicted exactly, in [0, 1]."""
    return float((true == predicted).mean())


def spearman(true: ndarray, predicted: ndarray) -> float:
    """Rank correlation of position and prediction, in [-1, 1]; 0 for a constant prediction."""
    a, b = rankdata(true), rankdata(predicted)
    a, b = a - a.mean(), b - b.mean()
    norm = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm > 0 else 0.0


Metric = Callable[[ndarray, ndarray], float]
METRICS: dict[str, dict[str, Metric]] = {
    "ridge": {"r2": r2, "mean_absolute_error": mean_absolute_error, "spearman": spearman},
    "logistic": {"accuracy": accuracy, "mean_absolute_error": mean_absolute_error},
}


def make_probe(kind: str, alpha: float = 1.0):
    """A scikit-learn estimator on standardised features: ``ridge`` regresses the position (penalty alpha ‖w‖²),
    ``logistic`` classifies it (penalty ‖w‖² / 2C, C = 1/alpha), one class for each position."""
    if kind == "ridge":
        return make_pipeline(StandardScaler(), Ridge(alpha=alpha))
    if kind == "logistic":
        return make_pipeline(StandardScaler(), LogisticRegression(C=1 / alpha, tol=1e-3, max_iter=2000))
    raise unknown_name("probe", kind, METRICS)


def fit_position_probe(
    model: nn.Module,
    tokens: Int[Tensor, "batch pos"],
    sites: Sequence[str] = (EMBED, RESID_POST),
    *,
    lengths: Int[Tensor, "batch"] | None = None,
    probes: Sequence[str] = ("ridge", "logistic"),
    controls: Sequence[str] = CONTROLS,
    untrained: nn.Module | None = None,
    alpha: float = 1.0,
    test_share: float = 0.3,
    n_bootstrap: int = 200,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Fit linear probes for the position of each token and score them on other sequences.

    Whole sequences, not tokens, are split into train and test, and a sequence that occurs twice counts once: nothing
    of a test sequence is seen in training. (Sequences that share a prefix do share hidden states there.)

    The same probe is fitted to three controls: ``untrained``, the same architecture with fresh weights; ``embedding``,
    the token embedding alone, which knows which token it is but not where; ``shuffled``, the model's own hidden states
    with the positions of every sequence dealt out anew.

    Args:
        model: a ``Decoder`` or a ``TransformerBridge``.
        tokens: ids, right-padded where ``lengths`` say so.
        sites: where to look; a name without its layer means every layer.
        untrained: the model of the untrained control; a ``Decoder`` makes its own.
        alpha: the ridge penalty (on standardised features).
        n_bootstrap: resamples of the test sequences for the percentile intervals.

    Returns:
        One row a number: site, probe, control ("none" is the model itself), metric, value, low, high, n_train, n_test
        (sequences). Metrics of ``ridge``: r2, mean_absolute_error (tokens), spearman; of ``logistic``: accuracy,
        mean_absolute_error.

    Raises:
        ProbeError: for fewer than four distinct sequences, sequences of one token, hidden states that are not finite,
            an unknown site, probe or control, or a bridge without ``untrained``.
    """
    check_number("alpha", alpha)
    check_number("test_share", test_share, 0, 1)
    check_number("confidence", confidence, 0, 1)
    check_size("n_bootstrap", n_bootstrap)
    for control in controls:
        if control not in CONTROLS:
            raise unknown_name("control", control, CONTROLS)
    for kind in probes:
        make_probe(kind)
    tokens, lengths = _distinct(tokens, lengths)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(tokens))
    n_test = max(1, round(test_share * len(tokens)))
    test, train = order[:n_test], order[n_test:]
    traced = trace(model, tokens, (EMBED, *sites), lengths=lengths)
    names = expand_sites(sites, traced.n_layers)
    cases = _cases(model, traced, tokens, lengths, names, controls, untrained, rng, seed)
    rows = []
    for at, control, data in cases:
        fitted_on, scored_on = data.of_sequences(train), data.of_sequences(test)
        resamples = _resamples(scored_on, n_bootstrap, np.random.default_rng(seed))
        for kind in probes:
            estimator = make_probe(kind, alpha).fit(fitted_on.hidden, fitted_on.position)
            predicted = estimator.predict(scored_on.hidden)
            for metric, score in METRICS[kind].items():
                value = score(scored_on.position, predicted)
                spread = [score(scored_on.position[i], predicted[i]) for i in resamples]
                low, high = np.quantile(spread, [(1 - confidence) / 2, (1 + confidence) / 2])
                rows += [(site, kind, control, metric, value, low, high, len(train), len(test)) for site in at]
    columns = ["site", "probe", "control", "metric", "value", "low", "high", "n_train", "n_test"]
    return pd.DataFrame(rows, columns=columns)


def _cases(
    model, traced, tokens, lengths, names, controls, untrained, rng, seed
) -> Iterator[tuple[list[str], str, Tokens]]:
    """(sites, control, tokens) of every probe to be fitted; one fit may stand beside several sites."""
    own = {site: Tokens.of(traced, site) for site in names}
    yield from (([site], "none", data) for site, data in own.items())
    if "untrained" in controls:
        if untrained is None:
            if not isinstance(model, Decoder):
                raise ProbeError(
                    "the untrained control of a model that is no Decoder wants untrained=<the same "
                    "architecture with fresh weights>, or controls without 'untrained'"
                )
            untrained = Decoder(model.config, seed=seed + 1).to(model.device, model.dtype)
        fresh = trace(untrained, tokens, names, lengths=lengths)
        yield from (([site], "untrained", Tokens.of(fresh, site)) for site in names)
    if "embedding" in controls:
        yield names, "embedding", Tokens.of(traced, EMBED)
    if "shuffled" in controls:
        yield from (([site], "shuffled", data.shuffled(rng)) for site, data in own.items())


def _distinct(tokens: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """Each sequence once, padding aside."""
    if tokens.ndim != 2 or tokens.shape[1] < 2:
        raise ProbeError(f"a position probe wants sequences of at least 2 tokens, got shape {tuple(tokens.shape)}")
    if lengths is None:
        lengths = torch.full((len(tokens),), tokens.shape[1])
    seen: dict[tuple[int, ...], int] = {}
    for i, (sequence, length) in enumerate(zip(tokens.tolist(), lengths.tolist(), strict=True)):
        seen.setdefault(tuple(sequence[:length]), i)
    if len(seen) < 4:
        raise ProbeError(f"a position probe wants at least 4 distinct sequences, got {len(seen)}")
    kept = torch.tensor(list(seen.values()))
    return tokens[kept], lengths[kept]


def _resamples(data: Tokens, n: int, rng: np.random.Generator) -> list[Int[ndarray, "token"]]:
    """Row indices of bootstrap samples, drawn by sequence."""
    members = [np.flatnonzero(data.sequence == s) for s in np.unique(data.sequence)]
    return [np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))]) for _ in range(n)]
