"""Position moved and exchanged: does what the model does move with it?

As in ``probe.position.causal``, everything is fitted on the first half of the sequences and measured on the other half,
beside random directions of the same length, or random subspaces of the same rank, that are orthogonal to position's.
Position 0 is neither fitted to nor edited.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import pandas as pd
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor, nn

from probe.config import check_size
from probe.errors import ProbeError
from probe.position.edits import Change, Edit, Outcome, Setting, first_layer_behind, one_site
from probe.position.erasure import Subspace, Whitening, concept, concept_subspace, control_subspaces
from probe.sequences import Integers, TokenIds
from probe.statistics import N_BOOTSTRAP, p_value
from probe.tracing import RESID_POST, SCORES, block_site, hide_keys, logits_with_edits


def position_direction(
    states: Float[Tensor, "row feature"], positions: Int[Tensor, "row"]
) -> tuple[Float64[Tensor, "feature"], Subspace]:
    """By how much hidden states have to be moved for one token further, and the rank-1 subspace that it spans.

    Along the covariance of states and position, the direction in which positions lie (Haufe et al. 2014), as far as
    moves the reading of the least squares probe by 1.
    """
    reading, along = Whitening.of(states).reading(states, positions)
    return along / (reading @ along), concept_subspace(states, positions[:, None].double())


def steer_position(
    model: nn.Module,
    tokens: TokenIds,
    site: str,
    shifts: Sequence[float] = (-4, -3, -2, -1, 0),
    *,
    query: int | None = None,
    n_random: int = 19,
    n_bootstrap: int = N_BOOTSTRAP,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Move one token's hidden state along the position direction by k tokens; does its attention move by k?

    Only the query's row is moved. In every head of the layers behind the site the mean attended position Σ_i α_i i of
    that row is taken for each shift, over the keys before it (its own key is moved with it), and its slope over the
    shifts by least squares: 1 where attention follows the position that is read there, 0 where it does not, or where
    the head is of a kind that a shift does not move (-m(t + k - i) is -m(t - i) to softmax).

    Args:
        tokens: sequences of one length.
        site: hidden states that attention reads, such as "blocks.1.hook_resid_pre".
        shifts: in tokens, at least two; backward ones by default, for what lies ahead cannot be attended.
        query: the row that is moved, at least 1, by default the middle one.
        n_random: how many random directions are tried for comparison, of the same Mahalanobis length and orthogonal to
            position's in whitened states. Their rows (control "random") are means over them.

    Returns:
        Columns site, layer, head, query, control ("none", "random"), metric ("attention_moved", tokens per token;
        "attended" with its shift, tokens), shift, value, low, high, n, p. p is that of "attention_moved", for the
        hypothesis that position's is a direction like any other: (1 + the number of random directions along which
        attention moves as far, either way) / (1 + n_random).
    """
    check_size("n_random", n_random)
    setting = Setting(model, tokens, None, None, n_bootstrap, confidence, seed)
    if len(set(shifts)) < 2:
        raise ProbeError(f"at least two different shifts are wanted, got {list(shifts)}")
    T = setting.tokens.shape[1]
    query = T // 2 if query is None else query
    if not 1 <= query < T:
        raise ProbeError(f"query must be a row 1…{T - 1}, got {query}")
    site = one_site(site, setting)
    layers = range(first_layer_behind(site), setting.n_layers)
    if not layers:
        raise ProbeError(f"no attention reads {site!r}: there is nothing to steer")
    fitted_on = setting.hidden(site)
    states, positions = fitted_on.x, fitted_on.positions
    step, subspace = position_direction(states, positions)
    controls = {"none": [step], "random": _like(step, subspace, states, n_random, setting.generator)}
    k = torch.tensor(shifts, dtype=torch.float64)
    k = k - k.mean()
    # "step shift sequence layer head", and its slope over the shifts
    attended = {
        control: torch.stack([_attended(setting, site, query, s, shifts, layers) for s in steps])
        for control, steps in controls.items()
        if len(steps)
    }
    slopes = {c: torch.einsum("k,rksld->rsld", k, each) / k.square().sum() for c, each in attended.items()}
    rows = []
    for control, of in attended.items():
        for i, layer in enumerate(layers):
            for head in range(of.shape[-1]):
                keys = {"site": site, "layer": layer, "head": head, "query": query, "control": control}
                moved = setting.measured(setting.weights @ slopes[control][:, :, i, head].mean(0))
                if control == "none" and "random" in slopes:
                    others = slopes["random"][:, :, i, head].mean(1).abs().tolist()
                    moved["p"] = p_value(abs(moved["value"]), others)
                rows.append(keys | {"metric": "attention_moved"} | moved)
                for j, shift in enumerate(shifts):
                    at = setting.measured(setting.weights @ of[:, j, :, i, head].mean(0))
                    rows.append(keys | {"metric": "attended", "shift": shift} | at)
    columns = ["site", "layer", "head", "query", "control", "metric", "shift", "value", "low", "high", "n", "p"]
    return pd.DataFrame(rows).reindex(columns=columns)


def _attended(setting: Setting, site: str, query: int, step: Tensor, shifts: Sequence[float], layers: range) -> Tensor:
    """The mean attended position of the moved row among the keys before it, "shift sequence layer head"."""
    found = []
    for shift in shifts:
        attended: dict[int, Tensor] = {}

        def moved(x: Tensor, shift: float = shift) -> Tensor:
            x = x.clone()
            x[:, query] += (shift * step).to(x)
            return x

        def watch(layer: int, attended: dict[int, Tensor] = attended) -> Edit:
            def edit(scores: Tensor) -> Tensor:
                pattern = hide_keys(scores.detach())[:, :, query, :query].double().cpu().softmax(-1)
                if not pattern.isfinite().all():
                    raise ProbeError(
                        f"the attention of layer {layer} to the keys before row {query} must be finite, got NaN: its "
                        "scores are not finite, or a window hides all of these keys"
                    )
                attended[layer] = pattern @ torch.arange(query, dtype=torch.float64)
                return scores

            return edit

        logits_with_edits(
            setting.model,
            setting.tokens[setting.half :],
            {site: moved} | {block_site(layer, SCORES): watch(layer) for layer in layers},
        )
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


def patch_position(
    model: nn.Module,
    tokens: TokenIds,
    site: str,
    shifts: Sequence[int] = (0, 1, 2, 4),
    *,
    lengths: Integers | None = None,
    scored: Bool[Tensor, "sequence pos"] | None = None,
    concept_name: str = "classes",
    n_random: int = 19,
    n_bootstrap: int = N_BOOTSTRAP,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Give every token the position part of another sequence's token, so many places further on.

    At the site the part of row t in the subspace of position is replaced by that of row t + shift of the next sequence
    (where it has that row; other rows stay). With shift 0 nothing about position changes, and what the loss does then
    is the price of the exchange. Metrics: "loss" and "token_accuracy", changes as in ``erase_position``, over the
    scored tokens of all rows; "decoded_shift", by layer behind the site, by how many tokens the position that a least
    squares probe reads at its resid_post moves in the patched rows: the shift where later layers take it over.

    Args:
        shifts: how many places further on, 0…T - 1.
        n_random: how many random subspaces are exchanged for comparison, each of the same rank (or of all dimensions
            that are left, where these are fewer) and orthogonal to position's in whitened states. Their rows (control
            "random") are means over them.

    Returns:
        Columns site, concept, rank, control ("none", "random"), shift, metric, layer, value, low, high, n, p. p is that
        of the hypothesis that position is a subspace like any other: (1 + the number of random subspaces whose exchange
        costs as much, or moves the reading as far) / (1 + n_random); missing where they have fewer dimensions.
    """
    check_size("n_random", n_random)
    setting = Setting(model, tokens, lengths, scored, n_bootstrap, confidence, seed)
    site = one_site(site, setting)
    for shift in shifts:
        if not 0 <= shift < setting.tokens.shape[1]:
            raise ProbeError(f"shifts must be 0…{setting.tokens.shape[1] - 1} tokens, got {shift}")
    fitted_on = setting.hidden(site)
    states, positions = fitted_on.x, fitted_on.positions
    found = concept_subspace(states, concept(concept_name, positions))
    subspaces = {"none": [found], "random": control_subspaces(states, found, n_random, setting.generator)}
    layers = range(first_layer_behind(site), setting.n_layers)
    behind = {layer: setting.hidden(block_site(layer, RESID_POST)) for layer in layers}
    probes = {layer: _probe(each.x, each.positions) for layer, each in behind.items()}
    plain, read = _run_and_read(setting, {}, probes)
    rows, scored_tokens = [], setting.scored[setting.half :].sum(-1).double()
    for shift in shifts:
        patched = torch.zeros_like(setting.rows[setting.half :])
        own, other = setting.rows[setting.half :], setting.rows[setting.half :].roll(-1, 0)
        patched[:, : patched.shape[1] - shift] = own[:, : patched.shape[1] - shift] & other[:, shift:]
        changes = {}
        for control, of in subspaces.items():
            outcomes = [_run_and_read(setting, {site: _exchange(s, shift, patched)}, probes) for s in of]
            changes[control] = [*_patched(plain, read, outcomes, patched, scored_tokens)] if of else []
        for control, of_control in setting.compared(changes, subspaces).items():
            keys = {"site": site, "concept": concept_name, "rank": subspaces[control][0].rank, "control": control}
            rows += [keys | {"shift": shift} | row for row in of_control]
    columns = [*("site", "concept", "rank", "control", "shift", "metric", "layer"), "value", "low", "high", "n", "p"]
    return pd.DataFrame(rows).reindex(columns=columns)


def _patched(
    plain: Outcome,
    read: Mapping[int, Tensor],
    outcomes: Sequence[tuple[Outcome, Mapping[int, Tensor]]],
    patched: Bool[Tensor, "sequence pos"],
    scored_tokens: Float64[Tensor, "sequence"],
) -> Iterator[Change]:
    yield Change({"metric": "loss"}, 1, torch.stack([o.loss - plain.loss for o, _ in outcomes]), scored_tokens)
    right = torch.stack([o.right - plain.right for o, _ in outcomes])
    yield Change({"metric": "token_accuracy"}, -1, right, scored_tokens)
    for layer, before in read.items():
        moved = torch.stack([(after[layer] - before).where(patched, 0.0).sum(-1) for _, after in outcomes])
        yield Change({"metric": "decoded_shift", "layer": layer}, 1, moved, patched.sum(-1).double())


def _exchange(subspace: Subspace, shift: int, patched: Bool[Tensor, "sequence pos"]) -> Edit:
    def edit(x: Tensor) -> Tensor:
        part = subspace.part(x)
        given = part.roll(-1, 0).roll(-shift, 1)
        return torch.where(patched.to(x.device)[..., None], (x - part + given).to(x), x)

    return edit


def _probe(states: Tensor, positions: Tensor) -> Callable[[Tensor], Tensor]:
    """The least squares reading of the position."""
    whitening, offset = Whitening.of(states), positions.double().mean()
    weight, _ = whitening.reading(states, positions)
    return lambda value: (value.double().cpu() - whitening.mean) @ weight + offset


def _run_and_read(
    setting: Setting, edits: Mapping[str, Edit], probes: Mapping[int, Edit]
) -> tuple[Outcome, dict[int, Tensor]]:
    read: dict[int, Tensor] = {}

    def reading(layer: int) -> Edit:
        def edit(value: Tensor) -> Tensor:
            edited = edits.get(block_site(layer, RESID_POST))
            value = value if edited is None else edited(value)
            read[layer] = probes[layer](value)
            return value

        return edit

    watched = {block_site(layer, RESID_POST): reading(layer) for layer in probes}
    return setting.run({**edits, **watched}), read
