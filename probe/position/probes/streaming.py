"""Linear probes of every site, target and strength from one pass over the data; hidden states are never stored.

Each sequence goes through the model once. Those of the training side leave their moments, fold by fold; the probes are
solved; then those of the test side are predicted as they stream by, and leave a few sums for each sequence.
"""

import functools
import itertools
from collections.abc import Sequence

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor, nn

from probe.config import check_size
from probe.errors import ProbeError, unknown_name
from probe.models.anatomy import sites_of
from probe.position.probes.controls import COLUMNS, CONTROLS, Probed, beside_controls
from probe.position.probes.moments import Moments
from probe.position.probes.reading import HEAD, FoldMoments, RandomProjection, Reader, Rows
from probe.position.probes.ridge import ALPHAS, LinearProbe, check_alphas
from probe.position.probes.scores import METRICS, Draws, token_sums
from probe.position.probes.splits import Split
from probe.position.probes.targets import TARGETS, TargetContext
from probe.progress import OnProgress, untold
from probe.sequences import Integers, TokenIds
from probe.statistics import N_BOOTSTRAP
from probe.tracing import EMBED, block_site

#: Wherever hidden states are: the embedding, what enters and leaves each part of a block, and each head's own output.
ALL_SITES = (
    EMBED,
    "hook_resid_pre",
    "attn.hook_z",
    "hook_attn_out",
    "hook_resid_mid",
    "hook_mlp_out",
    "hook_resid_post",
)

# Tokens a feature below which products are float64: they are quick then, and float32's rounding, beside the weakest
# strengths, shows in directions that the tokens fitted to hardly have.
FEW = 32


def probe_positions(
    model: nn.Module | Sequence[nn.Module],
    tokens: TokenIds,
    sites: Sequence[str] | None = None,
    *,
    lengths: Integers | None = None,
    targets: Sequence[str] = ("position",),
    context: TargetContext | None = None,
    controls: Sequence[str] = tuple(CONTROLS),
    untrained: nn.Module | Sequence[nn.Module] | None = None,
    test: float | Int[Tensor, "test"] = 0.3,
    test_tokens: TokenIds | None = None,
    test_lengths: Integers | None = None,
    fitted_length: int | None = None,
    alphas: Sequence[float] = ALPHAS,
    folds: int = 5,
    n_bootstrap: int = N_BOOTSTRAP,
    confidence: float = 0.95,
    seed: int = 0,
    batch_size: int = 64,
    on_progress: OnProgress = untold,
) -> pd.DataFrame:
    """Fit ridge regressions for what is asked of each token, and score them on other sequences, beside controls.

    The strength of each probe is chosen by cross-validation between the training sequences, whole ones, and is on
    features of unit variance. Fewer tokens than dimensions are allowed: a strength is always above 0.

    Args:
        model: a ``Decoder``, a ``ClockworkRNN``, a ``TransformerBridge``, or several of one shape: models of other
            seeds. Values are then means over them, and intervals are over sequences and models.
        tokens: ids, right-padded where ``lengths`` say so.
        sites: where to look, by default at all of ``ALL_SITES`` that the model has; a name without its layer means
            every layer. ``attn.hook_z`` is looked at head by head, as "blocks.0.attn.hook_z.3", and such a name stands
            for one head.
        targets: names in ``TARGETS``; ``context`` says what some of them need to know.
        controls: names in ``CONTROLS``.
        untrained: the models of the untrained control, one for each; by default as
            ``probe.models.untrained_twin`` makes them.
        test: the share of sequences to score on, or which ones they are.
        test_tokens: score on these sequences instead, and fit to all of ``tokens``: another distribution.
        fitted_length: fit to the first so many tokens of each sequence, and score by position on four times as many:
            the extrapolation curve.
        alphas: strengths to choose from, above 0.
        n_bootstrap: draws of the test sequences for the intervals.
        on_progress: called with how many models and controls are read, and how many there are.

    Returns:
        One row a number: site, layer_encoding (what the site's layer sees), target, probe ("ridge"), control ("none" is
        the model itself), split ("sequence", "length", "distribution"), scope, position and position_end (the positions
        p with position <= p < position_end that are scored), metric, value, low, high, interval, n (tokens scored),
        n_models, n_train, n_test (sequences) and alpha (missing where models differ in it). ``interval`` is "sequences"
        for one model; for several it is "both": other test sequences and other trainings. Metrics: r2,
        mean_absolute_error, mean_squared_error, and for a control "selectivity": the r2 of the model less that of the
        control, the interval over paired draws. The scope is "all"; for the split by length "fitted" (positions below
        ``fitted_length``), "beyond", and each "bin", whose r2 is about the bin's own mean.

    Raises:
        ProbeError: for fewer than four distinct sequences, a split that leaks, a target that is constant or defined on
            fewer than two tokens, hidden states that are not finite, an unknown site, target or control, or a bridge
            of which no untrained one can be drawn.
    """
    check_alphas(alphas)
    check_size("folds", folds, least=2)
    for name in targets:
        if name not in TARGETS:
            raise unknown_name("target", name, TARGETS)
    if test_tokens is not None:
        split = Split.by_distribution(tokens, lengths, test_tokens, test_lengths)
    else:
        split = Split.by_sequence(tokens, lengths, test, seed)
    if fitted_length is not None:
        split = split.by_length(fitted_length)
    models = [model] if isinstance(model, nn.Module) or not isinstance(model, Sequence) else list(model)
    if sites is None:
        there = sites_of(models[0])
        sites = [site for site in ALL_SITES if site in there or block_site(0, site) in there]
    longest = max(split.train.tokens.shape[1], split.test.tokens.shape[1])
    reader = Reader(split, tuple(targets), (context or TargetContext()).for_length(longest), seed, batch_size)
    return beside_controls(
        functools.partial(probe_source, reader=reader, alphas=alphas, folds=folds),
        models,
        sites,
        controls,
        untrained=untrained,
        seed=seed,
        reader=reader,
        draws=Draws.of(len(split.test), n_bootstrap, confidence, seed),
        metrics=METRICS,
        on_progress=on_progress,
    ).assign(probe="ridge")[COLUMNS]


def probe_source(
    source: nn.Module | RandomProjection,
    sites: Sequence[str],
    shuffled: bool,
    *,
    reader: Reader,
    alphas: Sequence[float],
    folds: int,
) -> dict[str, Probed]:
    """Fit to the training side of the reader's split and score on the other, by site. With ``shuffled`` there are twice
    as many targets: each again, dealt out anew."""
    train, test = reader.split.train, reader.split.test
    n_folds = 1 if len(alphas) == 1 else min(folds, len(train))
    n_tokens = int(train.lengths.sum())
    origins: dict[str, Moments] = {}
    moments: dict[str, list[FoldMoments]] = {}

    for f in range(n_folds):

        def learn(site: str, x: Tensor, rows: Rows, f: int = f) -> None:
            if site not in origins:
                products = torch.float64 if n_tokens < FEW * x.shape[1] else None
                origins[site] = Moments.about(x, rows.y.nan_to_num(0.0), products)
                moments[site] = [FoldMoments() for _ in range(n_folds)]
            moments[site][f].add(x, rows, origins[site])

        reader.read(source, train[torch.arange(f, len(train), n_folds)], sites, shuffled, learn)
    for site in sites:
        if HEAD.search(site) and site not in moments:
            raise ProbeError(f"unknown site {site!r}: the layer has no such head")

    names = reader.names * (2 if shuffled else 1)
    solved = {
        site: solve([(fold, origins[site]) for fold in moments.pop(site)], names, alphas, site)
        for site in list(moments)
    }
    n_bins = len(reader.split.edges) - 1
    sums: dict[str, Tensor] = {}

    def score(site: str, x: Tensor, rows: Rows) -> None:
        coef, intercept, mean, _ = solved[site]
        error = x.double() @ coef + intercept - rows.y.to(x.device)
        if not error[~rows.y.isnan().to(x.device)].isfinite().all():
            raise ProbeError(f"hidden states at {site!r} must be finite, got NaN or infinity")
        first = int(rows.group[0]) // n_bins
        n = int(rows.group[-1]) // n_bins + 1 - first
        found = token_sums(rows.y - mean, error.cpu(), rows.group - first * n_bins, n * n_bins)
        if site not in sums:
            sums[site] = found.new_zeros(len(test), n_bins, *found.shape[1:])
        sums[site][first : first + n] += found.unflatten(0, (n, n_bins))

    reader.read(source, test, sites, shuffled, score)
    return {site: Probed(sums[site], solved[site][-1]) for site in sums}


def solve(
    folds: Sequence[tuple[FoldMoments, Moments]], names: Sequence[str], alphas: Sequence[float], site: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Coefficients "feature target", intercepts, training means and strengths of all targets: one decomposition for all
    that are defined on the same tokens."""
    patterns = sorted({pattern for fold, _ in folds for pattern in fold.by_pattern})
    alike: dict[tuple[bool, ...], list[int]] = {}
    for t in range(len(names)):
        alike.setdefault(tuple(pattern[t] for pattern in patterns), []).append(t)
    parts = []
    for group in alike.values():
        of_folds = [m for m in (fold.of(group, origin) for fold, origin in folds) if m.n]
        labels = [names[t] for t in group]
        if not of_folds:
            raise ProbeError(f"a probe of {', '.join(labels)} wants at least 2 tokens where it is defined, got 0")
        total = sum(of_folds[1:], start=of_folds[0]).checked(site, labels)
        weights, offset, alpha = LinearProbe.from_moments(*of_folds, alphas=alphas, standardize=True).solution
        parts.append((weights.T, offset, total.means[1].cpu(), alpha))
    order = torch.tensor(list(itertools.chain(*alike.values()))).argsort()
    coef, intercept, mean, alpha = (torch.cat(part)[order] for part in zip(*parts, strict=True))
    return coef.T, intercept, mean, alpha
