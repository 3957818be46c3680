"""Whether a model uses the position that a probe finds in it: take it out, and see what changes.

Everything is fitted on the first half of the sequences (n // 2) and measured on the other half, beside a control that
has nothing to do with position: random subspaces of the same rank, orthogonal to position's. Position 0 is neither
fitted to nor edited. Edits go through ``probe.tracing``, so that they reach every model that ``trace`` reads.
``probe.position.edits.steering`` moves position, and ``probe.position.edits.patching`` exchanges it.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor, nn

from probe.config import check_size
from probe.position.edits.comparison import (
    MOST_BY_CHANCE,
    Change,
    Comparison,
    OfPattern,
    Outcome,
    after_first,
    first_layer_behind,
    keys_of,
)
from probe.position.edits.readable import READABLE, apart_from, readable, token_means
from probe.position.edits.subspaces import Subspace, TokenMeans, with_controls
from probe.position.setting import Edit
from probe.sequences import Integers, TokenIds
from probe.statistics import N_BOOTSTRAP, ROUNDING
from probe.tracing import RESID_POST, expand_sites

FitDistance = Callable[[nn.Module, Int[Tensor, "sequence pos"], Int[Tensor, "sequence"]], OfPattern]


def erase_position(
    model: nn.Module,
    tokens: TokenIds,
    sites: Sequence[str] = (RESID_POST,),
    *,
    lengths: Integers | None = None,
    scored: Bool[Tensor, "sequence pos"] | None = None,
    concepts: Sequence[str] = ("position", "classes"),
    distance: FitDistance | None = None,
    beyond_tokens: bool = True,
    n_random: int = 19,
    n_bootstrap: int = N_BOOTSTRAP,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """What a model loses when position is taken out of its hidden states at a site, one site at a time.

    Position 0 is neither fitted to nor edited: its token tells its position already. So do other tokens, where some are
    likelier at some places than at others. ``beyond_tokens`` takes out what states tell of position beyond their own
    token: everything is fitted to states less the mean state of their token, and only that difference is edited.

    Metrics, each the change from the unedited model: "loss" (nats a scored token), "token_accuracy", "exact_match" (the
    share of sequences whose scored tokens are all the likeliest, given the right ones before), the last for each length
    too; where a ``distance`` is given, "template_distance", by layer behind the site: that of its patterns from the
    template that was fitted to the unedited model (where it rises, attention was positional through this site).
    "probe_r2" is no change but what is left of position: the R² with which a ridge probe reads it in the edited states
    of the second half, on sequences that neither this probe nor the erasure was fitted to; "probe_r2_before" is that in
    the unedited states. Both are of the states less their tokens' means, with ``beyond_tokens``. ``position_used`` says
    what follows from all of them.

    Args:
        sites: hidden states; without its layer, a site of every layer.
        scored: which tokens' predictions count; by default all but the first.
        concepts: names in ``erasure.CONCEPTS``: "position" erases it from every linear regression (rank 1), "classes"
            from every linear classifier (rank up to T - 2: position 0 is left out).
        distance: fits templates to a model on sequences, ``probe.attention.distance_from_template`` for one.
        beyond_tokens: hold what a token's own identity tells of its place, and erase the rest; by default yes.
        n_random: how many random subspaces are taken out for comparison, each of the same rank (or of all dimensions
            that are left, where these are fewer) and orthogonal in whitened states to all that tells positions apart;
            for "position" to that of its first four powers. Their rows (control "random") are means over them,
            "probe_r2" over the first five; there are none where no direction is left.

    Returns:
        Columns site, concept, rank, control ("none" or "random"), metric, layer (of template_distance), length, value,
        low, high, n, p. Intervals are bootstrap intervals over sequences, paired. p is that of the hypothesis that
        position is a subspace like any other: (1 + the number of random subspaces that cost at least as much) /
        (1 + n_random), so at least 0.05 with 19 of them; missing where random subspaces have fewer dimensions, or where
        there are none.

    Raises:
        ProbeError: for fewer than 4 distinct sequences, no scored token, hidden states that are not finite, an unknown
            name.
    """
    check_size("n_random", n_random)
    comparison = Comparison(model, tokens, lengths, scored, n_bootstrap, confidence, seed)
    of_pattern = None if distance is None else distance(model, comparison.fitted.tokens, comparison.fitted.lengths)
    plain = comparison.run({}, of_pattern)
    rows: list[dict[str, Any]] = []
    for site in expand_sites(sites, model):
        fitted_on, held_out = comparison.states(site)
        means = token_means(fitted_on, beyond_tokens)
        states, apart = apart_from(means, fitted_on), apart_from(means, held_out)
        of_tokens = means(comparison.held_out.tokens[:, 1:])
        before = comparison.measured(readable(comparison, held_out, apart))

        def less(z: Tensor, tokens: Tensor = fitted_on.tokens) -> Tensor:
            return z - TokenMeans.of(z, tokens)(tokens) if beyond_tokens else z

        for name in concepts:
            subspaces = with_controls(name, states, fitted_on.positions, less, n_random, comparison.generator)
            changes = {}
            for control, of in subspaces.items():
                outcomes = [comparison.run({site: _erasing(s, of_tokens)}, of_pattern) for s in of]
                changes[control] = [*_changes(comparison, site, plain, outcomes)] if of else []
            for control, of_control in comparison.compared(changes, subspaces).items():
                keys = {"site": site, "concept": name, "control": control, "rank": subspaces[control][0].rank}
                left = torch.stack([readable(comparison, held_out, apart, s) for s in subspaces[control][:5]]).mean(0)
                rows += [keys | row for row in of_control]
                rows.append(keys | {"metric": "probe_r2"} | comparison.measured(left))
                if control == "none":
                    rows.append(keys | {"metric": "probe_r2_before"} | before)
    return pd.DataFrame(rows).reindex(columns=[*_KEYS, "value", "low", "high", "n", "p"])


_KEYS = ("site", "concept", "rank", "control", "metric", "layer", "length")


def _changes(comparison: Comparison, site: str, plain: Outcome, outcomes: Sequence[Outcome]) -> Iterator[Change]:
    def change(get: Callable[[Outcome], Tensor]) -> Tensor:
        return torch.stack([get(outcome) - get(plain) for outcome in outcomes])

    lengths, tokens = comparison.held_out.lengths, comparison.held_out.scored.sum(-1).double()
    every = torch.ones_like(tokens)
    yield Change({"metric": "loss"}, 1, change(lambda o: o.loss), tokens)
    yield Change({"metric": "token_accuracy"}, -1, change(lambda o: o.right), tokens)
    exact = change(lambda o: o.exact)
    yield Change({"metric": "exact_match"}, -1, exact, every)
    for length in lengths.unique().tolist() if len(lengths.unique()) > 1 else ():
        of = (lengths == length).double()
        yield Change({"metric": "exact_match", "length": length}, -1, exact * of, of)
    for layer in comparison.setting.attending_from(first_layer_behind(site)) if plain.of_patterns else ():

        def of_layer(outcome: Outcome, layer: int = layer) -> Tensor:
            return outcome.of_patterns[layer]

        yield Change({"metric": "template_distance", "layer": layer}, 1, change(of_layer), every)


def position_used(rows: pd.DataFrame) -> pd.DataFrame:
    """What follows from the rows of ``erase_position``, by site and concept: whether the model uses the position that
    can be read there.

    "used": position can be read before (``probe_r2_before`` at least READABLE), and without it the loss is greater (the
    interval lies above ROUNDING) by more than without any of the random subspaces (p at most 0.05). Where states vary
    in so few directions beyond their tokens that position's powers fill them, there is no random subspace for the
    concept "position", and the interval alone decides. "not used": anything else, so that it means *not established
    here*: too few sequences, a position that is read in another way than linearly, or one that is held elsewhere too.

    Args:
        rows: those of ``erase_position``; further columns that name models are kept as keys.

    Returns:
        Columns site, concept, (the keys,) verdict, loss, p, probe_r2_before.
    """
    own = rows[(rows["control"] == "none") & rows["metric"].isin(["loss", "probe_r2_before"])]
    keys = keys_of(own, "rank", "layer", "length")
    random = rows[(rows["control"] == "random") & (rows["metric"] == "loss")]
    controlled = set(random[keys].itertuples(index=False, name=None))
    found = []
    for key, each in own.groupby(keys, sort=False):
        by_metric = each.set_index("metric")
        loss, before = by_metric.loc["loss"], float(by_metric.loc["probe_r2_before", "value"])
        # Classes fill all directions wherever there are as many positions as directions, whatever these hold.
        alone = pd.isna(loss["p"]) and key not in controlled and loss["rank"] == 1
        costs = loss["low"] > ROUNDING and (alone or loss["p"] <= MOST_BY_CHANCE)  # NaN is no p
        verdict = "used" if costs and before >= READABLE else "not used"
        numbers = {"verdict": verdict, "loss": loss["value"], "p": loss["p"], "probe_r2_before": before}
        found.append(dict(zip(keys, key, strict=True)) | numbers)
    return pd.DataFrame(found, columns=[*keys, "verdict", "loss", "p", "probe_r2_before"])


def _erasing(subspace: Subspace, of_tokens: Float64[Tensor, "sequence later_pos feature"]) -> Edit:
    def edit(x: Float[Tensor, "sequence later_pos feature"]) -> Tensor:
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        return (exact - subspace.part(exact - of_tokens.to(exact))).to(x)

    return after_first(edit)
