"""Position moved in one token: does attention move with it?

As in ``probe.position.edits.erasing``, everything is fitted on the first half of the sequences and measured on the
other half, beside random directions of the same length that are orthogonal to position's. Position 0 is neither fitted
to nor edited. ``probe.position.edits.patching`` exchanges position between sequences.
"""

from collections.abc import Callable, Sequence

import pandas as pd
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor, nn

from probe.config import check_size
from probe.errors import ProbeError
from probe.models.hidden_keys import hide_keys
from probe.position.edits.comparison import MOST_BY_CHANCE, Comparison, first_layer_behind, keys_of, one_site
from probe.position.edits.readable import READABLE, apart_from, least_squares, readable, token_parts
from probe.position.edits.subspaces import Subspace, Whitening, concept_subspace
from probe.sequences import TokenIds
from probe.statistics import N_BOOTSTRAP, p_value
from probe.tracing import SCORES, block_site

STILL = 1e-4  # tokens per token: less is what rounding makes of attention that stands still, and is no more than any
FOLLOWS = 0.5  # tokens per token: a slope above it is nearer to 1, attention that follows, than to 0, one that does not


def position_direction(
    states: Float[Tensor, "row feature"], positions: Int[Tensor, "row"]
) -> tuple[Float64[Tensor, "feature"], Subspace]:
    """By how much hidden states have to be moved for one token further, and the rank-1 subspace that it spans.

    Along the covariance of states and position, the direction in which positions lie (Haufe et al. 2014), as far as
    moves the reading of the least squares probe by 1.
    """
    along = Whitening.of(states).covariance(states, positions)
    reading = least_squares(states, positions).solution.weights[:, 0]
    return along / (reading @ along), concept_subspace(states, positions[:, None].double())


def steer_position(
    model: nn.Module,
    tokens: TokenIds,
    site: str,
    shifts: Sequence[float] = (-4, -3, -2, -1, 0),
    *,
    query: int | None = None,
    beyond_tokens: bool = True,
    n_random: int = 19,
    n_bootstrap: int = N_BOOTSTRAP,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Move one token's hidden state along the position direction by k tokens; does its attention move by k?

    Only the query's row is moved. In every head of the layers behind the site the mean attended position Σ_i α_i i of
    that row is taken for each shift, over the keys before it (its own key is moved with it), and its slope over the
    shifts by least squares: 1 where attention follows the position that is read there, 0 where it does not, or where
    the head is of a kind that a shift does not move (-m(t + k - i) is -m(t - i) to softmax). ``attention_follows`` says
    which heads follow.

    Args:
        tokens: sequences of one length.
        site: hidden states that attention reads, such as "blocks.1.hook_resid_pre".
        shifts: in tokens, at least two; backward ones by default, for what lies ahead cannot be attended.
        query: the row that is moved, at least 1, by default the middle one.
        beyond_tokens: fit the direction to states less what each token adds to them beside what each position adds, as
            ``patch_position`` does, so that it holds nothing of which tokens are likelier at which places; by default
            yes. Where such states do not vary, nothing is moved.
        n_random: how many random directions are tried for comparison, of the same Mahalanobis length and orthogonal to
            position's in whitened states. Their rows (control "random") are means over them.

    Returns:
        Columns site, layer, head, query, control ("none", "random"), metric ("attention_moved", tokens per token;
        "attended" with its shift, tokens; "probe_r2_before", without layer and head: the R² with which a ridge probe
        reads position at the site, of states less their tokens' means with ``beyond_tokens``), shift, value, low, high,
        n, p. p is that of "attention_moved", for the hypothesis that position's is a direction like any other: (1 + the
        number of random directions along which attention moves as far, either way) / (1 + n_random),
        and 1 where it does not move beyond rounding.

    Raises:
        ProbeError: for fewer than 4 distinct sequences, fewer than two different shifts, a query that is no row from 1
            on, a site that is no attention's, or attention to the keys before the query that is not finite.
    """
    check_size("n_random", n_random)
    comparison = Comparison(model, tokens, None, None, n_bootstrap, confidence, seed)
    if len(set(shifts)) < 2:
        raise ProbeError(f"at least two different shifts are wanted, got {list(shifts)}")
    T = comparison.fitted.tokens.shape[1]
    query = T // 2 if query is None else query
    if not 1 <= query < T:
        raise ProbeError(f"query must be a row 1…{T - 1}, got {query}")
    site = one_site(site, model)
    layers = comparison.setting.attending_from(first_layer_behind(site))
    if not layers:
        raise ProbeError(f"no attention reads {site!r}: there is nothing to steer")
    fitted_on, held_out = comparison.states(site)
    means = token_parts(fitted_on, beyond_tokens)
    states, positions = apart_from(means, fitted_on), fitted_on.positions
    if states.any():
        step, subspace = position_direction(states, positions)
    else:
        step, subspace = torch.zeros_like(means.mean), Subspace.nothing(means.mean)
    controls = {"none": [step], "random": _like(step, subspace, states, n_random, comparison.generator)}
    k = torch.tensor(shifts, dtype=torch.float64)
    k = k - k.mean()
    # "step shift sequence layer head", and its slope over the shifts
    attended = {
        control: torch.stack([_attended(comparison, site, query, s, shifts, layers) for s in steps])
        for control, steps in controls.items()
        if len(steps)
    }
    slopes = {c: torch.einsum("k,rksld->rsld", k, each) / k.square().sum() for c, each in attended.items()}
    before = comparison.measured(readable(comparison, held_out, apart_from(means, held_out)))
    rows = [{"site": site, "query": query, "control": "none", "metric": "probe_r2_before"} | before]
    for control, of in attended.items():
        for i, layer in enumerate(layers):
            for head in range(of.shape[-1]):
                keys = {"site": site, "layer": layer, "head": head, "query": query, "control": control}
                moved = comparison.measured(comparison.weights @ slopes[control][:, :, i, head].mean(0))
                if control == "none" and "random" in slopes:
                    others = slopes["random"][:, :, i, head].mean(1).abs().tolist()
                    effect = abs(moved["value"])
                    moved["p"] = p_value(effect if effect > STILL else 0.0, others)
                rows.append(keys | {"metric": "attention_moved"} | moved)
                for j, shift in enumerate(shifts):
                    at = comparison.measured(comparison.weights @ of[:, j, :, i, head].mean(0))
                    rows.append(keys | {"metric": "attended", "shift": shift} | at)
    columns = ["site", "layer", "head", "query", "control", "metric", "shift", "value", "low", "high", "n", "p"]
    return pd.DataFrame(rows).reindex(columns=columns).astype({"layer": "Int64", "head": "Int64"})


def attention_follows(rows: pd.DataFrame) -> pd.DataFrame:
    """What follows from the rows of ``steer_position``, by site and head: whether the head's attention follows the
    position that can be read there.

    "follows": position can be read (``probe_r2_before`` at least READABLE), attention moves with it by at least FOLLOWS
    tokens per token (the slope of one that follows is 1, and of one that does not 0) with an interval above 0, and
    further than along any of the random directions (p at most 0.05). "does not follow": anything else, so that it means
    *not established here*: too few sequences, or a query whose attended place lies ahead of it or before the first
    token. Attention that moves by a part of the position, or backwards, does not follow it.

    Args:
        rows: those of ``steer_position``; further columns that name models are kept as keys.

    Returns:
        Columns site, layer, head, query, (the keys,) verdict, attention_moved, p, probe_r2_before.

    Raises:
        ProbeError: for rows without "probe_r2_before", or several calls whose keys are the same.
    """
    own = rows[rows["control"] == "none"]
    keys = keys_of(own, "shift")
    of_site = [c for c in keys if c not in ("layer", "head")]
    moved = own[own["metric"] == "attention_moved"]
    readings = own[own["metric"] == "probe_r2_before"]
    if readings.duplicated(of_site).any():
        raise ProbeError("rows of several calls must be told apart by a further column, such as model")
    found = moved.merge(readings[[*of_site, "value"]].rename(columns={"value": "probe_r2_before"}), "left", of_site)
    if found["probe_r2_before"].isna().any():
        raise ProbeError("attention_follows needs all rows of steer_position, got none of metric 'probe_r2_before'")
    follows = (
        (found["probe_r2_before"] >= READABLE)
        & (found["value"] >= FOLLOWS)
        & (found["low"] > 0)
        & (found["p"] <= MOST_BY_CHANCE)  # NaN is no p
    )
    found["verdict"] = follows.map({True: "follows", False: "does not follow"})
    found = found.rename(columns={"value": "attention_moved"})
    return found[[*keys, "verdict", "attention_moved", "p", "probe_r2_before"]].reset_index(drop=True)


def _attended(
    comparison: Comparison, site: str, query: int, step: Tensor, shifts: Sequence[float], layers: Sequence[int]
) -> Tensor:
    """The mean attended position of the moved row among the keys before it, "shift sequence layer head"."""
    found = []
    for shift in shifts:
        attended: dict[int, Tensor] = {}

        def moved(x: Tensor, shift: float = shift) -> Tensor:
            x = x.clone()
            x[:, query] += (shift * step).to(x)
            return x

        def watch(layer: int, attended: dict[int, Tensor] = attended) -> Callable[[Tensor], object]:
            def seen(scores: Tensor) -> None:
                pattern = hide_keys(scores.detach())[:, :, query, :query].double().cpu().softmax(-1)
                if not pattern.isfinite().all():
                    raise ProbeError(
                        f"the attention of layer {layer} to the keys before row {query} must be finite, got NaN: its "
                        "scores are not finite, or a window hides all of these keys"
                    )
                attended[layer] = pattern @ torch.arange(query, dtype=torch.float64)

            return seen

        watched = {block_site(layer, SCORES): watch(layer) for layer in layers}
        comparison.setting.run(comparison.held_out.tokens, {site: moved}, watched)
        found.append(torch.stack([attended[layer] for layer in layers], dim=1))
    return torch.stack(found)


def _like(
    step: Tensor, subspace: Subspace, states: Tensor, n: int, generator: torch.Generator
) -> list[Float64[Tensor, "feature"]]:
    """Random directions of the same Mahalanobis length, as far among the hidden states, without anything of a
    subspace; none where states vary in no other direction."""
    whitening = Whitening.of(states)
    if whitening.rank <= subspace.rank:
        return []
    drawn = whitening.random(n, generator, subspace)
    length = (whitening.inverse @ step).norm()
    return [whitening.root @ direction / direction.norm() * length for direction in drawn.T]
