"""A construction: weights that a theorem promises, what they are claimed to do, and the check that they do it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from constructions.weights import zero_weights
from probe.errors import ProbeError
from probe.models.decoder import Decoder, DecoderConfig, Hook

# The residual stream of every construction begins with three rows, as in Kazemnejad et al. 2023, appendix C (whose
# rows 1, 2, 3 these are); behind them stands the content, N_CONTENT numbers that are the token's and arbitrary.
ONE, IS_BOS, POSITION = 0, 1, 2
CONTENT = slice(3, None)
N_CONTENT = 13
D_MODEL = 3 + N_CONTENT

BOS = 0
D_VOCAB = 32


class Construction(ABC):
    """Hand-built weights for a ``Decoder``, claimed up to a length and a tolerance that depend on the dtype.

    To add one: subclass it, say what is claimed in the class attributes, write ``config``, ``write_weights`` and
    ``errors``, and add it to the ``CONSTRUCTIONS`` at the foot of its file.
    """

    name: ClassVar[str]
    claim: ClassVar[str]  # one sentence
    source: ClassVar[str]  # paper and theorem
    layers: ClassVar[int]
    max_length: ClassVar[Mapping[torch.dtype, int]]  # tokens, <bos> among them
    tolerance: ClassVar[Mapping[torch.dtype, Mapping[str, float]]]  # by dtype, then by the quantity that is measured
    attention_paths: ClassVar[tuple[str, ...]] = ("explicit", "fused")  # those on which the claim can be looked at

    @abstractmethod
    def config(self, length: int) -> DecoderConfig:
        """The shape of the decoder for sequences of up to ``length`` tokens."""

    @abstractmethod
    def write_weights(self, decoder: Decoder, length: int) -> None:
        """Write the weights into a float64 decoder in which everything is 0."""

    @abstractmethod
    def errors(self, decoder: Decoder, tokens: Int[Tensor, "batch pos"], attention: str) -> dict[str, float]:
        """How far ``decoder`` is from the claim on these tokens: the largest error of each quantity in ``tolerance``.

        Every number comes from ``Decoder.forward`` (``observe``); what it is compared with does not.
        """

    def build(self, length: int, dtype: torch.dtype = torch.float64) -> Decoder:
        """The construction for sequences of up to ``length`` tokens, in evaluation mode, on the CPU.

        The weights are computed in float64 and then rounded to ``dtype``.

        Raises:
            ProbeError: for a dtype it was not made for, or a length outside 1…max_length[dtype].
        """
        self._require(length, dtype)
        decoder = Decoder(self.config(length), seed=None).double()
        zero_weights(decoder)
        self.write_weights(decoder, length)
        return decoder.to(dtype).eval()

    def tokens(self, length: int, seed: int = 0) -> Int[Tensor, "1 length"]:
        """A sequence on which the construction is claimed: ``<bos>`` first and only there, then random content."""
        tokens = torch.randint(1, D_VOCAB, (1, length), generator=torch.Generator().manual_seed(seed))
        tokens[:, 0] = BOS
        return tokens

    def check(
        self,
        length: int,
        dtype: torch.dtype = torch.float64,
        decoder: Decoder | None = None,
        tokens: Int[Tensor, "batch pos"] | None = None,
        attention: str = "explicit",
    ) -> pd.DataFrame:
        """Run the decoder and compare: one row for each quantity of the claim.

        Args:
            length: tokens in the sequence, ``<bos>`` among them.
            dtype: of weights and activations; what they are compared with is computed in float64.
            decoder: another decoder than the one that ``build`` makes, one with a weight changed, say.
            tokens: another sequence than ``self.tokens(length)``, one without ``<bos>``, say.
            attention: the path taken by ``Decoder.forward``.

        Returns:
            Columns construction, claim, quantity, source, length, dtype, attention, largest_error, tolerance, holds.
            ``largest_error`` is in the unit of the quantity; ``holds`` says that it is within ``tolerance`` (NaN is
            not).

        Raises:
            ProbeError: for a dtype it was not made for, a length outside 1…max_length[dtype], or a decoder or tokens
                that are not of that dtype and length.
        """
        self._require(length, dtype)
        decoder = self.build(length, dtype) if decoder is None else decoder
        tokens = self.tokens(length) if tokens is None else tokens
        if decoder.dtype != dtype:
            raise ProbeError(f"the check wants a decoder in {_short(dtype)}, got one in {_short(decoder.dtype)}")
        if tokens.shape[-1] != length:
            raise ProbeError(f"the check wants sequences of {length} tokens, got {tokens.shape[-1]}")
        errors = self.errors(decoder, tokens, attention)
        rows = [
            {
                "construction": self.name,
                "claim": self.claim,
                "quantity": quantity,
                "source": self.source,
                "length": length,
                "dtype": _short(dtype),
                "attention": attention,
                "largest_error": errors[quantity],
                "tolerance": tolerance,
                "holds": errors[quantity] <= tolerance,
            }
            for quantity, tolerance in self.tolerance[dtype].items()
        ]
        return pd.DataFrame(rows)

    def _require(self, length: int, dtype: torch.dtype) -> None:
        if dtype not in self.max_length:
            made_for = ", ".join(_short(known) for known in self.max_length)
            raise ProbeError(f"{self.name} is made for {made_for}; got {_short(dtype)}")
        if not 1 <= length <= self.max_length[dtype]:
            raise ProbeError(
                f"{self.name} is claimed for lengths 1…{self.max_length[dtype]} in {_short(dtype)}, got {length}"
            )


def write_embeddings(decoder: Decoder, seed: int = 0) -> None:
    """Row ONE = 1, row IS_BOS = 1 for ``<bos>`` and 0 for the others, row POSITION = 0; content ~ N(0, 1)."""
    embedding = decoder.token_embedding.weight.detach()
    embedding[:, ONE] = 1
    embedding[BOS, IS_BOS] = 1
    content = embedding[:, CONTENT]
    content.copy_(
        torch.randn(content.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(content)
    )


@torch.no_grad()
def observe(
    decoder: Decoder,
    tokens: Int[Tensor, "batch pos"],
    sites: Sequence[str],
    *,
    attention: str = "explicit",
    edits: Mapping[str, Hook] | None = None,
) -> dict[str, Float[Tensor, "..."]]:
    """The values at ``sites`` in one forward pass, float64, on the CPU, with ``edits`` made at other sites.

    ``probe.trace`` does this for measurements; a check must also choose the attention path and edit on the way.
    """
    seen: dict[str, Tensor] = {}

    def keep(site: str) -> Hook:
        return lambda value: seen.update({site: value.cpu().double()})

    hooks = {**(edits or {}), **{site: keep(site) for site in sites}}
    decoder(tokens.to(decoder.device), hooks=hooks, attention=attention)
    return seen


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
