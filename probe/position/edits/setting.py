"""What all causal experiments share: a model, sequences to fit on and sequences to measure, and runs under edits.

Position 0 is left out everywhere: nothing is fitted to it, and no edit moves it. Its token (``<bos>``, often) tells its
position already, and its state may be many times as large as all others, so that it would decide what is fitted.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor, nn

from probe.errors import ProbeError
from probe.losses import likeliest, sequence_losses
from probe.models.anatomy import n_layers_of
from probe.position.edits.subspaces import Subspace
from probe.sequences import Integers, TokenIds, first_of_each, marked, valid_rows
from probe.sequences import Sequences as TokenSequences
from probe.statistics import Bootstrap, p_value
from probe.tracing import PATTERN, block_site, expand_sites, logits_with_edits, trace

MOST_BY_CHANCE = 0.05 + 1e-12  # the largest p of what is no chance; 1 of 20, as 19 controls give it, is within it

Edit = Callable[[Tensor], Tensor]
# Something about a layer's pattern, a number a sequence: (layer, pattern, lengths) -> numbers.
OfPattern = Callable[
    [int, Float[Tensor, "sequence head query key"], Int[Tensor, "sequence"]], Float64[Tensor, "sequence"]
]


def keys_of(rows: pd.DataFrame, *beside: str) -> list[str]:
    """The columns that tell calls apart, in rows from which a verdict follows: all that hold something but ``beside``
    and those of a number."""
    left_out = ("control", "metric", *beside, "value", "low", "high", "n", "p")
    return [c for c in rows.columns if c not in left_out and rows[c].notna().any()]


class Setting:
    """A model and its distinct sequences, of which the first half is fitted on and the other measured."""

    def __init__(
        self,
        model: nn.Module,
        tokens: TokenIds,
        lengths: Integers | None,
        scored: Bool[Tensor, "sequence pos"] | None,
        n_bootstrap: int,
        confidence: float,
        seed: int,
    ):
        sequences = TokenSequences.of(tokens, lengths)
        scored = marked("scored", scored, sequences.tokens)
        kept = first_of_each(sequences.tokens, sequences.lengths, scored)
        n, T = len(kept), sequences.tokens.shape[1]
        if n < 4:
            raise ProbeError(f"at least 4 distinct sequences are needed, 2 to fit and 2 to measure, got {n}")
        self.model, self.tokens, self.lengths = model, sequences.tokens[kept], sequences.lengths[kept]
        #: the tokens that are fitted to and edited: all but the first
        self.rows = valid_rows(self.lengths, T) & (torch.arange(T) > 0)
        self.scored = self.rows & scored[kept]
        self.half = n // 2
        if self.rows[: self.half].sum(1).max() < 2:
            longest = int(self.lengths[: self.half].max())
            raise ProbeError(
                f"sequences must have at least 3 tokens, since position 0 is left out, got at most {longest}"
            )
        if not self.scored[self.half :].any():
            raise ProbeError("at least one token of the second half of the sequences must be scored, got none")
        self.bootstrap = Bootstrap.draw(n - self.half, n_bootstrap, confidence, seed)
        self.weights = self.bootstrap.value_and_draws
        self.generator = torch.Generator().manual_seed(seed)

    @property
    def n_layers(self) -> int:
        return n_layers_of(self.model)

    def hidden(self, site: str, held_out: bool = False) -> "States":
        """Hidden states of the first half, or of the second."""
        half = slice(self.half, None) if held_out else slice(0, self.half)
        tokens, rows = self.tokens[half], self.rows[half]
        values = trace(self.model, tokens, [site]).hidden(site)
        sequence, position = rows.nonzero(as_tuple=True)
        return States(values[rows], position, tokens[rows], sequence)

    def run(self, edits: Mapping[str, Edit], of_pattern: OfPattern | None = None) -> "Outcome":
        """What the model makes of the second half under these edits, and ``of_pattern`` of its patterns."""
        measured: dict[int, Tensor] = {}
        lengths = self.lengths[self.half :]

        def measure(layer: int, of_pattern: OfPattern) -> Edit:
            def edit(pattern: Tensor) -> Tensor:
                measured[layer] = of_pattern(layer, pattern.detach().cpu(), lengths)
                return pattern

            return edit

        watched: dict[str, Edit] = {}
        if of_pattern is not None:
            watched = {block_site(layer, PATTERN): measure(layer, of_pattern) for layer in range(self.n_layers)}
        tokens, scored = self.tokens[self.half :], self.scored[self.half :]
        logits = logits_with_edits(self.model, tokens, {**watched, **edits})
        loss, scored = sequence_losses(logits, tokens, scored), scored[:, 1:]
        right = (likeliest(logits[:, :-1]) == tokens[:, 1:]) | ~scored
        return Outcome(loss, (right & scored).sum(-1).double(), right.all(-1).double(), measured)

    def measured(self, stack: Float64[Tensor, "draw"]) -> dict[str, float]:
        low, high = self.bootstrap.interval(stack[1:])
        return {"value": float(stack[0]), "low": float(low), "high": float(high), "n": len(self.weights[0])}

    def compared(
        self, changes: Mapping[str, Sequence["Change"]], subspaces: Mapping[str, Sequence[Subspace]]
    ) -> dict[str, list[dict[str, Any]]]:
        """The rows of the changes under each control that there is, without its keys; with p where the subspaces of the
        control "random" have the rank of those of "none"."""
        random = {str(change.keys): change.costs for change in changes["random"]}
        comparable = {s.rank for of in subspaces.values() for s in of} == {subspaces["none"][0].rank}
        rows: dict[str, list[dict[str, Any]]] = {}
        for control, of_control in changes.items():
            for change in of_control:
                row: dict[str, Any] = change.keys | self.measured(change.stack(self.weights))
                if control == "none" and comparable and random:
                    row["p"] = p_value(change.costs[0], random[str(change.keys)])
                rows.setdefault(control, []).append(row)
        return rows


@dataclass(frozen=True)
class States:
    """Hidden states, one row per token after the first of each sequence."""

    x: Float[Tensor, "row feature"]
    positions: Int[Tensor, "row"]
    tokens: Int[Tensor, "row"]
    sequence: Int[Tensor, "row"]


def after_first(edit: Edit) -> Edit:
    """The edit of all positions but the first."""

    def edited(x: Tensor) -> Tensor:
        return torch.cat((x[:, :1], edit(x[:, 1:])), dim=1)

    return edited


def one_site(site: str, setting: Setting) -> str:
    sites = expand_sites([site], setting.model)
    if len(sites) > 1:
        raise ProbeError(f"one site is wanted, with its layer: {sites[0]!r}, …, got {site!r}")
    return sites[0]


@dataclass(frozen=True)
class Change:
    """The change of one metric in each outcome and sequence, and in what they are counted: tokens, or sequences."""

    keys: dict[str, Any]
    sign: int  #: 1 where a rise is a cost, -1 where a fall is
    by_sequence: Float64[Tensor, "outcome sequence"]
    counted: Float64[Tensor, "sequence"]

    def stack(self, weights: Float64[Tensor, "draw sequence"]) -> Float64[Tensor, "draw"]:
        """The mean over outcomes, in every draw of the sequences."""
        return (weights @ self.by_sequence.mean(0)) / (weights @ self.counted).clamp(min=1e-300)

    @property
    def costs(self) -> list[float]:
        """What each outcome costs."""
        return (self.sign * self.by_sequence.sum(1) / self.counted.sum()).tolist()


@dataclass(frozen=True)
class Outcome:
    """Per sequence: the summed loss (nats), right tokens, whether all scored tokens are right; and, by layer, what was
    asked of its patterns."""

    loss: Float64[Tensor, "sequence"]
    right: Float64[Tensor, "sequence"]
    exact: Float64[Tensor, "sequence"]
    of_patterns: Mapping[int, Float64[Tensor, "sequence"]]


def first_layer_behind(site: str) -> int:
    """The first layer whose attention reads what stands at a site."""
    if not site.startswith("blocks."):
        return 0
    layer = int(site.split(".")[1])
    return layer if site.endswith("hook_resid_pre") else layer + 1
