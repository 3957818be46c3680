"""A generator: from a seed and a variant, a model whose answer is known."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch

from constructions.known.answer import KnownModel
from constructions.known.blueprint import Blueprint
from constructions.known.drawing import N_SEQUENCES, Draw
from constructions.known.reading import with_every_head
from constructions.known.variants import VARIANTS
from probe.config import check_name, check_size
from probe.errors import ProbeError

#: From the constants of the weights, those of the tokens, and the number of sequences.
Make = Callable[[Draw, Draw, int], Blueprint]


@dataclass(frozen=True)
class Known:
    """A kind of model, drawn anew from every seed, whose answer follows from how its weights are written."""

    name: str  #: its key in ``KNOWN``
    make: Make  #: writes the weights and draws the tokens
    variants: tuple[str, ...] = tuple(VARIANTS)  #: those names in ``VARIANTS`` that the kind has

    @torch.no_grad()
    def build(self, seed: int = 0, variant: str = "clean", *, n_sequences: int = N_SEQUENCES) -> KnownModel:
        """The model of a seed, its tokens and its answer.

        All variants of a seed have the same tokens and, up to rounding, the same logits.

        Args:
            seed: draws the free constants and, independently, the tokens; at least 0.
            variant: a name in ``variants``.
            n_sequences: sequences of ``LENGTH`` tokens, at least 1.

        Raises:
            ProbeError: for a seed below 0, an unknown variant or one that this kind does not have, or no sequences.
        """
        check_size("seed", seed, least=0, most=2**31)
        check_size("n_sequences", n_sequences)
        check_name("variant", variant, VARIANTS)
        if variant not in self.variants:
            raise ProbeError(f"{self.name} must be built in one of {', '.join(self.variants)}, got variant {variant!r}")
        blueprint = self.make(Draw(self.name, seed), Draw(f"{self.name} tokens", seed), n_sequences)
        blueprint = dataclasses.replace(blueprint, answer=with_every_head(blueprint))
        decoder, answer = VARIANTS[variant](blueprint, Draw(f"{self.name} {variant}", seed))
        return KnownModel(decoder.float().eval(), blueprint.tokens, blueprint.scored, answer)
