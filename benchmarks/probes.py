"""Probes of position against scikit-learn's, and what they cost beside the forward pass that feeds them.

    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python -m benchmarks.probes

One thread. Ridge: 200,000 tokens × 256 float32 dimensions × 9 sites, five strengths, four targets (position, its
logarithm, its inverse, a sine). Ours reads the tokens batch by batch as a model would hand them on, keeps no batch, and
solves all; theirs is handed one matrix of all tokens and all four targets at once. The peers' cost is the same at every
site: they are timed on one and multiplied by nine. ``RidgeCV`` is taken with its default (leave one out) and with five
folds; ours chooses between five folds of sequences, for each target.

The forward pass: a decoder of 8 layers, d_model 256, 8 heads, 64 sequences of 128 tokens at a time, read at 9 sites
(the embedding and what leaves each layer) for four targets, against the same pass, logits and all, with hooks that do
nothing.

Classification: hidden states of that size of an untrained decoder, as they are, 64 positions as classes; scikit-learn's
``LogisticRegression`` with its defaults but 1,000 steps, so that it ends by its own criterion.
"""

import math
import time
import warnings

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression, Ridge, RidgeCV

from benchmarks.timing import seconds
from probe.models.decoder import Decoder, DecoderConfig
from probe.position import Moments, SoftmaxProbe, fit_folds, ridge_path
from probe.tracing import trace, visit

N_TOKENS, D_MODEL, N_SITES, LENGTH, BATCH = 200_000, 256, 9, 128, 64
ALPHAS = (1e-2, 1.0, 1e2, 1e3, 1e4)
EMBED_AND_LAYERS = ("hook_embed", "hook_resid_post")


def hidden_states() -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated features with a mean, and four targets that they partly tell."""
    g = torch.Generator().manual_seed(0)
    p = torch.arange(N_TOKENS, dtype=torch.float64) % LENGTH
    x = torch.randn(N_TOKENS, D_MODEL, generator=g) @ torch.randn(D_MODEL, D_MODEL, generator=g) / 16
    x += torch.randn(D_MODEL, generator=g) + (p[:, None] / LENGTH).float() * torch.randn(D_MODEL, generator=g)
    return x, targets(p)


def targets(p: torch.Tensor) -> torch.Tensor:
    return torch.stack((p, p.log1p(), 1 / (p + 1), (2 * math.pi * p / 32).sin()), dim=1)


def folds_of(x: torch.Tensor, y: torch.Tensor, n_folds: int) -> list[Moments]:
    """Moments of the folds, batch by batch, each batch a batch of whole sequences."""
    rows = BATCH * LENGTH
    empty = Moments.about(x[:rows], y[:rows])
    folds = [empty] * n_folds
    for i, start in enumerate(range(0, len(x), rows)):
        folds[i % n_folds] = folds[i % n_folds].and_rows(x[start : start + rows], y[start : start + rows])
    return folds


def ours(x, y):
    return [ridge_path(folds_of(x, y, 1)[0], ALPHAS) for _ in range(N_SITES)]


def ours_chosen(x, y):
    return [fit_folds(folds_of(x, y, 5), ALPHAS) for _ in range(N_SITES)]


def row(name: str, target: str, measured: str) -> None:
    print(f"| {name} | {target} | {measured} |", flush=True)


def ridge() -> None:
    x, y = hidden_states()
    X, Y = x.numpy(), y.numpy()
    taken = seconds(
        {
            "ours": lambda: ours(x, y),
            "chosen": lambda: ours_chosen(x, y),
            "Ridge": lambda: [Ridge(alpha).fit(X, Y) for alpha in ALPHAS],
        },
        repeats=3,
    )
    once = seconds({"folds": lambda: RidgeCV(ALPHAS, cv=5).fit(X, Y), "loo": lambda: RidgeCV(ALPHAS).fit(X, Y)}, 1, 0)
    sites = N_SITES
    row("all ridge solutions, s", "", f"{taken['ours']:.2f}, with the choice of strength {taken['chosen']:.2f}")
    row("than `Ridge`, times faster", "6", f"{sites * taken['Ridge'] / taken['ours']:.1f}")
    row("than `RidgeCV` (leave one out)", "20", f"{sites * once['loo'] / taken['chosen']:.1f}")
    row("than `RidgeCV(cv=5)`", "20", f"{sites * once['folds'] / taken['chosen']:.1f}")

    exact = np.stack([Ridge(alpha, solver="svd").fit(X.astype(np.float64), Y).coef_ for alpha in ALPHAS])
    found = ours(x, y)[0][0].mT.numpy()
    theirs = np.stack([Ridge(alpha).fit(X, Y.astype(np.float32)).coef_ for alpha in ALPHAS])
    away = [np.linalg.norm(coef - exact) / np.linalg.norm(exact) for coef in (found, theirs)]
    row("from the float64 solution, relative", "nearer", f"{away[0]:.1e}, `Ridge` in float32 {away[1]:.1e}")


def forward(d_vocab: int) -> None:
    config = DecoderConfig(d_vocab=d_vocab, n_ctx=LENGTH, n_layers=8, d_model=D_MODEL, n_heads=8)
    decoder = Decoder(config)
    tokens = torch.randint(d_vocab, (4 * BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    y = targets(torch.arange(LENGTH, dtype=torch.float64).repeat(BATCH))

    def read() -> None:
        moments: dict[str, Moments] = {}

        def learn(site: str, value: torch.Tensor, rows: slice) -> None:
            x = value.flatten(0, 1)
            if site not in moments:
                moments[site] = Moments.about(x, y)
            moments[site] = moments[site].and_rows(x, y)

        visit(decoder, tokens, EMBED_AND_LAYERS, learn, batch_size=BATCH)

    def look() -> None:
        visit(decoder, tokens, EMBED_AND_LAYERS, lambda *_: None, batch_size=BATCH)

    taken = seconds({"read": read, "look": look}, repeats=7)
    row(
        f"accumulating over the forward pass, vocabulary {d_vocab:,}",
        "≤ 10 %",
        f"{100 * (taken['read'] / taken['look'] - 1):.1f} %",
    )


def objective(probe, X: np.ndarray, label: np.ndarray) -> float:
    """What both minimise (C = 1), in nats per row, in float64."""
    z = X.astype(np.float64) @ probe.coef_.T.astype(np.float64) + probe.intercept_
    loss = torch.nn.functional.cross_entropy(torch.from_numpy(z), torch.from_numpy(label))
    return float(loss) + np.square(probe.coef_.astype(np.float64)).sum() / (2 * len(label))


def classification() -> None:
    length, config = 64, {"d_vocab": 64, "n_ctx": 64, "n_layers": 3, "d_model": D_MODEL, "n_heads": 8}
    tokens = torch.randint(1, 64, (800, length), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = 0
    site = "blocks.2.hook_resid_post"
    X = trace(Decoder(DecoderConfig(**config)), tokens, [site])[site].flatten(0, 1).numpy()
    label = np.tile(np.arange(length), len(tokens))
    standardised = (X - X.mean(0)) / X.std(0)
    for name, features in (("hidden states as they are", X), ("standardised", standardised)):
        probes = {}

        def fit(kind: str, make, features=features, probes=probes):
            probes[kind] = make().fit(features, label)

        taken = {"ours": [], "theirs": []}
        for _ in range(2):
            for kind, make in (("ours", SoftmaxProbe), ("theirs", lambda: LogisticRegression(max_iter=1000))):
                started = time.perf_counter()
                fit(kind, make)
                taken[kind].append(time.perf_counter() - started)
        loss = {kind: objective(probe, features, label) for kind, probe in probes.items()}
        row(
            f"classification of {len(label):,} {name}, times faster",
            "6, loss no higher",
            f"{min(taken['theirs']) / min(taken['ours']):.1f} ({min(taken['ours']):.2f} s, {probes['ours'].n_iter_} "
            f"steps, loss {loss['ours']:.5f}; {min(taken['theirs']):.2f} s, {probes['theirs'].n_iter_[0]} "
            f"steps, loss {loss['theirs']:.5f})",
        )


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print("| | target | measured |\n|---|---|---|")
    for d_vocab in (1_000, 16_000):
        forward(d_vocab)
    ridge()
    classification()


if __name__ == "__main__":
    main()
