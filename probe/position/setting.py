"""What all causal experiments share: a model, sequences to fit on and sequences to measure, and runs under edits.

Position 0 is left out everywhere: nothing is fitted to it, and no prediction of it counts. Its token (``<bos>``, often)
tells its position already, and its state may be many times as large as all others, so that it would decide what is
fitted.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from probe.models.anatomy import layers_of, n_layers_of
from probe.sequences import Integers, Sequences, TokenIds, first_of_each, marked, valid_rows
from probe.tracing import logits_with_edits, trace

Edit = Callable[[Tensor], Tensor]
Edits = Mapping[str, Edit]


@dataclass(frozen=True)
class States:
    """Hidden states, one row per token after the first of each sequence."""

    x: Float[Tensor, "row feature"]
    positions: Int[Tensor, "row"]
    tokens: Int[Tensor, "row"]
    sequence: Int[Tensor, "row"]


@dataclass(frozen=True)
class Part:
    """Sequences, and the tokens whose predictions count."""

    tokens: Int[Tensor, "sequence pos"]
    lengths: Int[Tensor, "sequence"]
    scored: Bool[Tensor, "sequence pos"]

    @classmethod
    def distinct(
        cls, tokens: TokenIds, lengths: Integers | None, scored: Bool[Tensor, "sequence pos"] | None
    ) -> "Part":
        """Each distinct sequence once, in order; all tokens are scored but the first and the padding, or those of them
        that ``scored`` marks.

        Raises:
            ProbeError: for what are no sequences, or lengths or ``scored`` of another shape.
        """
        sequences = Sequences.of(tokens, lengths)
        scored = marked("scored", scored, sequences.tokens)
        kept = first_of_each(sequences.tokens, sequences.lengths, scored)
        part = cls(sequences.tokens, sequences.lengths, scored)[kept]
        return cls(part.tokens, part.lengths, part.scored & part.rows)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, which: slice | Tensor) -> "Part":
        return Part(self.tokens[which], self.lengths[which], self.scored[which])

    @property
    def rows(self) -> Bool[Tensor, "sequence pos"]:
        """The tokens that are fitted to and edited: all but the first and the padding."""
        n = self.tokens.shape[1]
        return valid_rows(self.lengths, n) & (torch.arange(n) > 0)


@dataclass(frozen=True)
class Setting:
    """A model, the sequences on which things are fitted, and those on which all else is measured."""

    model: nn.Module
    fitted: Part
    held_out: Part
    batch_size: int  #: sequences in a run at once; edits that mix sequences need all of them

    @property
    def n_layers(self) -> int:
        """The number of layers."""
        return n_layers_of(self.model)

    @property
    def attending(self) -> list[int]:
        """The layers that have attention."""
        return [i for i, layer in enumerate(layers_of(self.model)) if layer.attends]

    def attending_from(self, first: int) -> list[int]:
        """The layers that have attention, from one on."""
        return [layer for layer in self.attending if layer >= first]

    def states(self, part: Part, site: str) -> States:
        """The hidden states of a part at a site."""
        values, rows = trace(self.model, part.tokens, [site]).hidden(site), part.rows
        sequence, position = rows.nonzero(as_tuple=True)
        return States(values[rows], position, part.tokens[rows], sequence)

    def run(
        self,
        tokens: Int[Tensor, "sequence pos"],
        edits: Edits | Callable[[slice], Edits],
        watch: Mapping[str, Callable[[Tensor], object]] | None = None,
    ) -> list[Float[Tensor, "batch pos d_vocab"]]:
        """The logits under edits, batch by batch.

        Args:
            tokens: of the sequences.
            edits: what takes the place of the values at sites; or a function that gives them for a batch of sequences.
            watch: what is called with the values at sites as they are after the edits.
        """
        # Batches are of equal size, so that none is of one sequence.
        n_batches = math.ceil(len(tokens) / self.batch_size)
        logits = []
        for rows in torch.arange(len(tokens)).tensor_split(n_batches):
            batch = slice(int(rows[0]), int(rows[-1]) + 1)
            edit = dict(edits if isinstance(edits, Mapping) else edits(batch))
            for site, seen in (watch or {}).items():
                edit[site] = _watched(edit.get(site), seen)
            logits.append(logits_with_edits(self.model, tokens[batch], edit))
        return logits


def _watched(edit: Edit | None, seen: Callable[[Tensor], object]) -> Edit:
    def watched(value: Tensor) -> Tensor:
        value = value if edit is None else edit(value)
        seen(value)
        return value

    return watched
