"""Whether a model uses the position that a probe finds in it: take it out, and see what changes.

Everything is fitted on the first half of the sequences (n // 2) and measured on the other half, beside a control that
has nothing to do with position: a random subspace of the same rank. Edits go through ``probe.tracing``, so that they
reach every model that ``trace`` reads. ``probe.position.steering`` moves position, and exchanges it.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from probe.position.edits import OfPattern, Outcome, Setting, first_layer_behind
from probe.position.erasure import concept, concept_subspace, random_subspace
from probe.sequences import Integers, TokenIds
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
    n_random: int = 5,
    n_bootstrap: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Take position out of the hidden states at a site, one site at a time, and look at the model.

    Metrics, each the change from the unedited model: "loss" (nats a scored token), "token_accuracy", "exact_match" (the
    share of sequences whose scored tokens are all the likeliest, given the right ones before), the last for each length
    too; where a ``distance`` is given, "template_distance", by layer behind the site: that of its patterns from the
    template that was fitted to the unedited model (where it rises, attention was positional through this site).
    "probe_r2" is no change but the R² of the position in the edited states, by least squares on them: what is left.

    Args:
        sites: hidden states; without its layer, a site of every layer.
        scored: which tokens' predictions count; by default all but the first.
        concepts: names in ``erasure.CONCEPTS``: "position" erases it from every linear regression (rank 1), "classes"
            from every linear classifier (rank up to T - 1).
        distance: fits templates to a model on sequences, ``probe.attention.distance_from_template`` for one.
        n_random: random subspaces of the same rank; their rows (control "random") are means over them.

    Returns:
        Columns site, concept, rank, control ("none" or "random"), metric, layer (of template_distance), length, value,
        low, high, n: bootstrap intervals over sequences, paired.

    Raises:
        ProbeError: for fewer than 4 distinct sequences, no scored token, hidden states that are not finite, an unknown
            name.
    """
    setting = Setting(model, tokens, lengths, scored, n_bootstrap, confidence, seed)
    first = slice(0, setting.half)
    of_pattern = None if distance is None else distance(model, setting.tokens[first], setting.lengths[first])
    plain = setting.run({}, of_pattern)
    rows = []
    for site in expand_sites(sites, setting.model):
        states, positions = setting.hidden(site)
        for name in concepts:
            found = concept_subspace(states, concept(name, positions))
            rank = min(found.rank, states.shape[1] - 1)
            random = [random_subspace(states, rank, setting.generator) for _ in range(n_random)]
            for control, subspaces in (("none", [found]), ("random", random)):
                keys = {"site": site, "concept": name, "rank": rank, "control": control}
                outcomes = [setting.run({site: subspace.erased}, of_pattern) for subspace in subspaces]
                for more, stack in _changes(setting, site, plain, outcomes):
                    rows.append(keys | more | setting.measured(stack))
                left = sum(_r2(subspace.erased(states.double()), positions) for subspace in subspaces) / max(
                    1, len(subspaces)
                )
                rows.append(keys | {"metric": "probe_r2", "value": left, "n": setting.half})
    return pd.DataFrame(rows).reindex(columns=[*_KEYS, "value", "low", "high", "n"])


_KEYS = ("site", "concept", "rank", "control", "metric", "layer", "length")


def _changes(
    setting: Setting, site: str, plain: Outcome, outcomes: Sequence[Outcome]
) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """The keys and the draws of every change, means over the outcomes."""
    scored = setting.scored[setting.half :].sum(-1).double()
    lengths = setting.lengths[setting.half :]

    def mean(get: Callable[[Outcome], Tensor]) -> Tensor:
        return torch.stack([get(outcome) - get(plain) for outcome in outcomes]).mean(0)

    of_tokens: dict[str, Callable[[Outcome], Tensor]] = {"loss": lambda o: o.loss, "token_accuracy": lambda o: o.right}
    for metric, get in of_tokens.items():
        yield {"metric": metric}, (setting.weights @ mean(get)) / (setting.weights @ scored).clamp(min=1e-300)
    exact = mean(lambda o: o.exact)
    yield {"metric": "exact_match"}, setting.weights @ exact
    for length in lengths.unique().tolist() if len(lengths.unique()) > 1 else ():
        of = (lengths == length).double()
        share = setting.weights @ of
        yield {"metric": "exact_match", "length": length}, (setting.weights @ (exact * of)) / share.clamp(min=1e-300)
    for layer in range(first_layer_behind(site), setting.n_layers) if plain.of_patterns else ():

        def of_layer(outcome: Outcome, layer: int = layer) -> Tensor:
            return outcome.of_patterns[layer]

        distance = mean(of_layer)
        yield {"metric": "template_distance", "layer": layer}, setting.weights @ distance


def _r2(states: Tensor, positions: Tensor) -> float:
    """R² of the least squares regression of the position, along what there is of the states beyond rounding."""
    x, y = states.double() - states.double().mean(0), positions.double() - positions.double().mean()
    fitted = x @ torch.linalg.lstsq(x, y[:, None], rcond=1e-9, driver="gelsd").solution[:, 0]
    return float(1 - (y - fitted).square().sum() / y.square().sum())
