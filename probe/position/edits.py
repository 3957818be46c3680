"""What all causal experiments share: a model, sequences to fit on and sequences to measure, and runs under edits."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor, nn

from probe.bootstrap import Bootstrap
from probe.errors import ProbeError
from probe.models.anatomy import n_layers_of
from probe.sequences import Integers, Sequences, TokenIds, first_of_each, marked, valid_rows
from probe.tracing import (
    PATTERN,
    block_site,
    expand_sites,
    likeliest,
    logits_with_edits,
    sequence_losses,
    trace,
)

Edit = Callable[[Tensor], Tensor]
# Something about a layer's pattern, a number a sequence: (layer, pattern, lengths) -> numbers.
OfPattern = Callable[
    [int, Float[Tensor, "sequence head query key"], Int[Tensor, "sequence"]], Float64[Tensor, "sequence"]
]


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
        sequences = Sequences.of(tokens, lengths)
        scored = marked("scored", scored, sequences.tokens)
        kept = first_of_each(sequences.tokens, sequences.lengths, scored)
        n, T = len(kept), sequences.tokens.shape[1]
        if n < 4:
            raise ProbeError(f"at least 4 distinct sequences are needed, 2 to fit and 2 to measure, got {n}")
        self.model, self.tokens, self.lengths = model, sequences.tokens[kept], sequences.lengths[kept]
        self.rows = valid_rows(self.lengths, T)
        self.scored = self.rows & scored[kept] & (torch.arange(T) > 0)
        self.half = n // 2
        if not self.scored[self.half :].any():
            raise ProbeError("at least one token of the second half of the sequences must be scored, got none")
        self.bootstrap = Bootstrap.draw(n - self.half, n_bootstrap, confidence, seed)
        self.weights = self.bootstrap.value_and_draws
        self.generator = torch.Generator().manual_seed(seed)

    @property
    def n_layers(self) -> int:
        return n_layers_of(self.model)

    def hidden(self, site: str) -> tuple[Tensor, Tensor]:
        """Hidden states of the first half, a row a token, and the rows' positions."""
        values = trace(self.model, self.tokens[: self.half], [site]).hidden(site)
        rows = self.rows[: self.half]
        positions = torch.arange(self.tokens.shape[1]).expand(rows.shape)[rows]
        return values[rows], positions

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


def one_site(site: str, setting: Setting) -> str:
    sites = expand_sites([site], setting.model)
    if len(sites) > 1:
        raise ProbeError(f"one site is wanted, with its layer: {sites[0]!r}, …, got {site!r}")
    return sites[0]


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
