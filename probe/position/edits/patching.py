"""Position exchanged between sequences: does what the model does change with whose position a token has?

As in ``probe.position.edits.erasing``, everything is fitted on the first half of the sequences and measured on the
other half, beside random subspaces of the same rank that are orthogonal to position's. Position 0 is neither fitted to
nor edited.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import pandas as pd
import torch
from jaxtyping import Bool, Float64
from torch import Tensor, nn

from probe.config import check_size
from probe.errors import ProbeError
from probe.position.edits.comparison import Change, Comparison, Outcome, first_layer_behind, keys_of, one_site
from probe.position.edits.readable import READABLE, apart_from, least_squares, readable, token_parts
from probe.position.edits.subspaces import Subspace, with_controls
from probe.position.setting import Edit, Edits
from probe.sequences import Integers, TokenIds
from probe.statistics import N_BOOTSTRAP
from probe.tracing import RESID_POST, block_site


def patch_position(
    model: nn.Module,
    tokens: TokenIds,
    site: str,
    shifts: Sequence[int] = (0, 1, 2, 4),
    *,
    lengths: Integers | None = None,
    scored: Bool[Tensor, "sequence pos"] | None = None,
    concept_name: str = "classes",
    beyond_tokens: bool = True,
    n_random: int = 19,
    n_bootstrap: int = N_BOOTSTRAP,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Give every token the position part of another sequence's token, so many places further on.

    At the site the part of row t in the subspace of position is replaced by that of row t + shift of the next sequence
    (where it has that row; other rows stay). With shift 0 nothing about position changes, and what the loss does then
    is the price of the exchange. All rows move together, so that what depends on differences of positions alone changes
    only at the ends of a sequence.

    Metrics: "loss" and "token_accuracy", changes as in ``erase_position``, over the scored tokens of all rows. For each
    shift above 0, the exchange is also made without the shift in the very same rows: "loss_of_exchange" is the change
    of the loss then, and "loss_beyond_exchange" the loss with the shift less that without, paired by sequence: what a
    wrong position costs more than a stranger's right one. "decoded_shift", by layer behind the site: by how many tokens
    the position that a least squares probe reads at its resid_post moves in the patched rows, the shift where later
    layers take it over. "probe_r2_before": the R² with which a ridge probe reads position at the site.
    ``patched_position_used`` says what follows.

    Args:
        shifts: how many places further on, 0…T - 2, for position 0 is never patched; each counts once.
        concept_name: a name in ``erasure.CONCEPTS``: "position" exchanges what tells it linearly as a number (rank 1),
            "classes" all that tells positions apart linearly (rank up to T - 2).
        beyond_tokens: fit the subspace to states less what each token adds to them beside what each position adds
            (least squares), and exchange only that part of this difference, so that what a token's own identity tells
            of its place stays; by default yes. Where such states do not vary, nothing is exchanged.
        n_random: how many random subspaces are exchanged for comparison, each of the same rank (or of all dimensions
            that are left, where these are fewer) and orthogonal in whitened states to all that tells positions apart;
            for "position" to that of its first four powers. Their rows (control "random") are means over them.

    Returns:
        Columns site, concept, rank, control ("none", "random"), shift, metric, layer, value, low, high, n, p. p is that
        of the hypothesis that position is a subspace like any other: (1 + the number of random subspaces whose exchange
        costs as much, or moves the reading as far) / (1 + n_random); missing where they have fewer dimensions.

    Raises:
        ProbeError: for fewer than 4 distinct sequences, no scored token, several sites, a shift outside 0…T - 2, hidden
            states that are not finite, or an unknown name.
    """
    check_size("n_random", n_random)
    comparison = Comparison(model, tokens, lengths, scored, n_bootstrap, confidence, seed)
    site = one_site(site, model)
    shifts = list(dict.fromkeys(shifts))
    for shift in shifts:
        if not 0 <= shift < comparison.fitted.tokens.shape[1] - 1:
            raise ProbeError(f"shifts must be 0…{comparison.fitted.tokens.shape[1] - 2} tokens, got {shift}")
    fitted_on, held_out = comparison.states(site)
    means = token_parts(fitted_on, beyond_tokens)
    states, of_tokens = apart_from(means, fitted_on), means(comparison.held_out.tokens)

    def less(z: Tensor) -> Tensor:
        return z - token_parts(fitted_on, beyond_tokens, z)(fitted_on.tokens)

    subspaces = with_controls(concept_name, states, fitted_on.positions, less, n_random, comparison.generator)
    (found,) = subspaces["none"]
    setting = comparison.setting
    layers = range(first_layer_behind(site), setting.n_layers)
    behind = {layer: setting.states(setting.fitted, block_site(layer, RESID_POST)) for layer in layers}
    probes = {layer: _probe(each.x, each.positions) for layer, each in behind.items()}
    plain, read = _run_and_read(comparison, {}, probes)
    keys = {"site": site, "concept": concept_name, "rank": found.rank, "control": "none"}
    before = comparison.measured(readable(comparison, held_out, apart_from(means, held_out)))
    rows = [keys | {"metric": "probe_r2_before"} | before]
    scored_tokens = comparison.held_out.scored.sum(-1).double()
    for shift in shifts:
        patched = torch.zeros_like(comparison.held_out.rows)
        own, other = comparison.held_out.rows, comparison.held_out.rows.roll(-1, 0)
        patched[:, : patched.shape[1] - shift] = own[:, : patched.shape[1] - shift] & other[:, shift:]
        changes = {}
        for control, of in subspaces.items():
            exchanges = [_exchange(s, of_tokens, shift, patched) for s in of]
            outcomes = [_run_and_read(comparison, {site: exchange}, probes) for exchange in exchanges]
            changes[control] = [*_patched(plain, read, outcomes, patched, scored_tokens)] if of else []
            if shift > 0 and of:
                alike = [comparison.run({site: _exchange(s, of_tokens, 0, patched)}) for s in of]
                price = torch.stack([e.loss - plain.loss for e in alike])
                beyond = torch.stack([o.loss - e.loss for (o, _), e in zip(outcomes, alike, strict=True)])
                changes[control].append(Change({"metric": "loss_of_exchange"}, 1, price, scored_tokens))
                changes[control].append(Change({"metric": "loss_beyond_exchange"}, 1, beyond, scored_tokens))
        for control, of_control in comparison.compared(changes, subspaces).items():
            keys = {"site": site, "concept": concept_name, "rank": subspaces[control][0].rank, "control": control}
            rows += [keys | {"shift": shift} | row for row in of_control]
    columns = [*("site", "concept", "rank", "control", "shift", "metric", "layer"), "value", "low", "high", "n", "p"]
    return pd.DataFrame(rows).reindex(columns=columns)


def patched_position_used(rows: pd.DataFrame) -> pd.DataFrame:
    """What follows from the rows of ``patch_position``, by site and concept: whether the model uses the position that
    can be read there.

    "used": position can be read (``probe_r2_before`` at least READABLE), and at the greatest shift a wrong position
    costs loss beyond the exchange ("loss_beyond_exchange", its interval above 0) and more than the exchange itself
    ("loss_of_exchange"). Position is the same in every sequence, so that to exchange it costs nothing; where the
    exchange costs as much as the wrong place, the part holds content, and content that goes with the place is not told
    from position. "not used": anything else, so that it means *not established here*: too few sequences, a position
    that is read in another way than linearly, or a part that holds content besides.

    Random subspaces do not count here: the exchange without the shift is the control, in the same subspace.

    Args:
        rows: those of ``patch_position`` with a shift above 0; further columns that name models are kept as keys.

    Returns:
        Columns site, concept, (the keys,) verdict, shift, loss_beyond_exchange, loss_of_exchange, probe_r2_before.

    Raises:
        ProbeError: for no shift above 0, or rows of several calls whose keys are the same.
    """
    own = rows[rows["control"] == "none"]
    keys = keys_of(own, "rank", "shift", "layer")
    found = []
    for key, each in own.groupby(keys, sort=False):
        before = each.loc[each["metric"] == "probe_r2_before", "value"]
        if len(before) != 1:
            raise ProbeError("rows of several calls must be told apart by a further column, such as model")
        shift = each.loc[each["metric"] == "loss_beyond_exchange", "shift"].max()
        if not shift > 0:
            raise ProbeError("patched_position_used needs patches with a shift above 0, got none")
        at = each[each["shift"] == shift].set_index("metric")
        beyond, price = at.loc["loss_beyond_exchange"], float(at.loc["loss_of_exchange", "value"])
        used = before.item() >= READABLE and beyond["low"] > 0 and beyond["value"] > price
        numbers = {
            "verdict": "used" if used else "not used",
            "shift": int(shift),
            "loss_beyond_exchange": beyond["value"],
            "loss_of_exchange": price,
            "probe_r2_before": before.item(),
        }
        found.append(dict(zip(keys, key, strict=True)) | numbers)
    columns = ["verdict", "shift", "loss_beyond_exchange", "loss_of_exchange", "probe_r2_before"]
    return pd.DataFrame(found, columns=[*keys, *columns])


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


def _exchange(
    subspace: Subspace,
    of_tokens: Float64[Tensor, "sequence pos feature"],
    shift: int,
    patched: Bool[Tensor, "sequence pos"],
) -> Edit:
    """Put the part of row t + shift of the next sequence in the place of row t's, in the rows that are ``patched``."""

    def edit(x: Tensor) -> Tensor:
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        part = subspace.part(exact - of_tokens.to(exact))
        given = part.roll(-1, 0).roll(-shift, 1)
        return torch.where(patched.to(x.device)[..., None], (exact - part + given).to(x), x)

    return edit


def _probe(states: Tensor, positions: Tensor) -> Callable[[Tensor], Tensor]:
    """The least squares reading of the position."""
    probe = least_squares(states, positions)
    return lambda value: probe.predict(value.cpu())


def _run_and_read(
    comparison: Comparison, edits: Edits, probes: Mapping[int, Edit]
) -> tuple[Outcome, dict[int, Tensor]]:
    read: dict[int, Tensor] = {}

    def reading(layer: int) -> Callable[[Tensor], object]:
        def seen(value: Tensor) -> None:
            read[layer] = probes[layer](value)

        return seen

    watch = {block_site(layer, RESID_POST): reading(layer) for layer in probes}
    return comparison.run(edits, watch=watch), read
