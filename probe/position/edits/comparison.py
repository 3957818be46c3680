"""What edits cost: the second half of some distinct sequences under edits, beside the same half without them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor, nn

from probe.errors import ProbeError
from probe.losses import likeliest, sequence_losses
from probe.position.edits.subspaces import Subspace
from probe.position.setting import Edit, Edits, Part, Setting, States
from probe.sequences import Integers, TokenIds
from probe.statistics import Bootstrap, p_value
from probe.tracing import PATTERN, block_site, expand_sites

MOST_BY_CHANCE = 0.05 + 1e-12  # the largest p of what is no chance; 1 of 20, as 19 controls give it, is within it

# Something about a layer's pattern, a number a sequence: (layer, pattern, lengths) -> numbers.
OfPattern = Callable[
    [int, Float[Tensor, "sequence head query key"], Int[Tensor, "sequence"]], Float64[Tensor, "sequence"]
]


def keys_of(rows: pd.DataFrame, *beside: str) -> list[str]:
    """The columns that tell calls apart, in rows from which a verdict follows: all that hold something but ``beside``
    and those of a number."""
    left_out = ("control", "metric", *beside, "value", "low", "high", "n", "p")
    return [c for c in rows.columns if c not in left_out and rows[c].notna().any()]


class Comparison:
    """A setting of distinct sequences, of which the first half is fitted on and the other measured, and the draws of
    the second half."""

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
        part = Part.distinct(tokens, lengths, scored)
        n, half = len(part), len(part) // 2
        if n < 4:
            raise ProbeError(f"at least 4 distinct sequences are needed, 2 to fit and 2 to measure, got {n}")
        self.setting = Setting(model, part[:half], part[half:], batch_size=n)
        self.fitted, self.held_out = self.setting.fitted, self.setting.held_out
        if self.fitted.rows.sum(1).max() < 2:
            longest = int(self.fitted.lengths.max())
            raise ProbeError(
                f"sequences must have at least 3 tokens, since position 0 is left out, got at most {longest}"
            )
        if not self.held_out.scored.any():
            raise ProbeError("at least one token of the second half of the sequences must be scored, got none")
        self.bootstrap = Bootstrap.draw(n - half, n_bootstrap, confidence, seed)
        self.weights = self.bootstrap.value_and_draws
        self.generator = torch.Generator().manual_seed(seed)

    def states(self, site: str) -> tuple[States, States]:
        """Hidden states of the first half and of the second."""
        return self.setting.states(self.fitted, site), self.setting.states(self.held_out, site)

    def run(
        self,
        edits: Edits,
        of_pattern: OfPattern | None = None,
        watch: Mapping[str, Callable[[Tensor], object]] | None = None,
    ) -> "Outcome":
        """What the model makes of the second half under these edits, and ``of_pattern`` of its patterns; ``watch`` is
        called with the values at other sites."""
        measured: dict[int, Tensor] = {}
        tokens, lengths, scored = self.held_out.tokens, self.held_out.lengths, self.held_out.scored

        def measure(layer: int, of_pattern: OfPattern) -> Callable[[Tensor], object]:
            def seen(pattern: Tensor) -> None:
                measured[layer] = of_pattern(layer, pattern.detach().cpu(), lengths)

            return seen

        patterns: dict[str, Callable[[Tensor], object]] = {}
        if of_pattern is not None:
            patterns = {block_site(layer, PATTERN): measure(layer, of_pattern) for layer in self.setting.attending}
        (logits,) = self.setting.run(tokens, edits, {**patterns, **(watch or {})})
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


def after_first(edit: Edit) -> Edit:
    """The edit of all positions but the first."""

    def edited(x: Tensor) -> Tensor:
        return torch.cat((x[:, :1], edit(x[:, 1:])), dim=1)

    return edited


def one_site(site: str, model: nn.Module) -> str:
    sites = expand_sites([site], model)
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
