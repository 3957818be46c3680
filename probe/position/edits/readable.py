"""What states tell of position beyond their own token, and how well it can be read there.

Some tokens are likelier at some places than at others, so that a state tells a place by its token. What is fitted and
edited is therefore, by default, the difference between a state and what its token has in it.
"""

import torch
from jaxtyping import Float, Float64, Shaped
from torch import Tensor

from probe.position.edits.comparison import Comparison
from probe.position.edits.subspaces import Subspace, TokenMeans
from probe.position.probes.moments import precision, unscale
from probe.position.probes.ridge import ALPHAS, LinearProbe
from probe.position.probes.scores import r2, token_sums
from probe.position.setting import States

READABLE = 0.3  # R² from which on position can be read


def token_means(states: States, beyond_tokens: bool) -> TokenMeans:
    """The mean state of each token, or, without ``beyond_tokens``, the mean of all states for every token."""
    return TokenMeans.of(states.x, states.tokens) if beyond_tokens else TokenMeans.alike(states.x)


def token_parts(states: States, beyond_tokens: bool, x: Float[Tensor, "row feature"] | None = None) -> TokenMeans:
    """What each token adds to the states, or to ``x``, beside what each position adds; or, without ``beyond_tokens``,
    the mean of all rows for every token.

    Who takes a part out and puts another one in needs this: a plain mean of a token's few rows also holds where they
    happen to stand, so that a position would be put into states that is off by some tokens.
    """
    x = states.x if x is None else x
    return TokenMeans.beside_positions(x, states.tokens, states.positions) if beyond_tokens else TokenMeans.alike(x)


def apart_from(means: TokenMeans, states: States) -> Float64[Tensor, "row feature"]:
    """States less their tokens' means; exactly 0 in a feature where what is left is rounding."""
    apart = states.x.double() - means(states.tokens)
    size = states.x.double().square().mean(0).sqrt()
    return torch.where(apart.std(0, correction=0) > precision(states.x.dtype) * size, apart, 0.0)


def least_squares(states: Float[Tensor, "row feature"], positions: Shaped[Tensor, "row"]) -> LinearProbe:
    """The least squares reading of the position: what an edit must move by as much as it says."""
    return LinearProbe((0.0,), standardize=True).fit(states, positions)


def readable(
    comparison: Comparison, states: States, apart: Float64[Tensor, "row feature"], erased: Subspace | None = None
) -> Float64[Tensor, "draw"]:
    """The R² with which position is read in states of the second half, in every draw of its sequences: ridge probes of
    one half of them, scored on the other.

    With ``erased``, a subspace is taken out before. Features are as large as they were before: what rounding leaves of
    one that was erased is not blown up.
    """
    x = (apart if erased is None else erased.erased(apart)) * unscale(apart)
    y, sequence = states.positions.double(), states.sequence
    decoded = torch.zeros_like(y)
    for fold in range(2):
        own = sequence % 2 == fold
        several = len(sequence[~own].unique()) > 1  # else its tokens are the folds that choose the strength
        probe = LinearProbe(ALPHAS, folds=2).fit(x[~own], y[~own], sequence[~own] if several else None)
        decoded[own] = probe.predict(x[own])
    sums = token_sums(y[:, None], (decoded - y)[:, None], sequence, len(comparison.weights[0]))[:, 0]
    return r2(comparison.weights @ sums)
