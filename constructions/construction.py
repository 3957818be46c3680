"""A construction: weights that a theorem promises, what they are claimed to do, and the check that they do it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from constructions.layout import BOS, D_VOCAB, Layout
from constructions.observing import observe
from constructions.weights import zero_weights
from probe.errors import ProbeError
from probe.models.decoder import Decoder, DecoderConfig


class Construction(ABC):
    """Hand-built weights for a ``Decoder``, claimed up to a length and a tolerance that depend on the dtype.

    To add one: subclass it (or ``StreamConstruction``), say what is claimed in the class
    attributes, write ``config``, ``write_weights`` and ``errors``, and add it to the ``CONSTRUCTIONS`` at the foot of
    its file.
    """

    name: str  #: its key in ``CONSTRUCTIONS``
    claim: str  #: one sentence
    source: str  #: paper and theorem
    layers: int  #: blocks of the decoder
    # A layer without attention is a block whose W_V is 0, one without MLP a block whose W_out is 0.
    attention_layers: int  #: those of the layers that attend
    mlp_layers: int  #: those of the layers whose MLP writes something
    max_length: Mapping[torch.dtype, int]  #: tokens of the longest sequence, by dtype, ``<bos>`` among them
    tolerance: Mapping[torch.dtype, Mapping[str, float]]  #: by dtype, then by the quantity that is measured
    attention_paths: tuple[str, ...] = ("explicit", "fused")  #: those on which the claim can be looked at
    #: Whether a weight is chosen for the dtype (the constant of a rounding unit), and not only rounded to it.
    dtype_specific: bool = False

    @abstractmethod
    def config(self, length: int) -> DecoderConfig:
        """The shape of the decoder for sequences of up to ``length`` tokens."""

    @abstractmethod
    def write_weights(self, decoder: Decoder, length: int, dtype: torch.dtype) -> None:
        """Write the weights into a float64 decoder in which everything is 0; it will run in ``dtype``."""

    @abstractmethod
    def errors(
        self, decoder: Decoder, tokens: Int[Tensor, "1 pos"], attention: str
    ) -> tuple[Int[Tensor, "looked_at"], dict[str, Float[Tensor, "looked_at"]]]:
        """How far ``decoder`` is from the claim on these tokens: the positions that were looked at (t = 1 at
        ``<bos>``), and for each quantity in ``tolerance`` the error at each of them, float64.

        Every number comes from ``Decoder.forward``; what it is compared with does not.
        """

    def build(self, length: int, dtype: torch.dtype = torch.float64) -> Decoder:
        """The construction for sequences of up to ``length`` tokens, in evaluation mode, on the CPU.

        The weights are computed in float64 and then rounded to ``dtype``.

        Raises:
            ProbeError: for a dtype it was not made for, or a length outside 1…max_length[dtype].
        """
        self._require(length, dtype)
        return self.build_unclaimed(length, dtype)

    def build_unclaimed(self, length: int, dtype: torch.dtype) -> Decoder:
        """``build`` for any length and dtype, claimed or not: for the search for the first length that fails."""
        return self.written(length, dtype).to(dtype).eval()

    @torch.no_grad()
    def written(self, length: int, dtype: torch.dtype) -> Decoder:
        """The decoder with its weights in float64, as they are before they are rounded to ``dtype``."""
        decoder = Decoder(self.config(length), seed=None).double()
        zero_weights(decoder)
        self.write_weights(decoder, length, dtype)
        return decoder

    def claims(self, length: int, dtype: torch.dtype) -> bool:
        """Whether anything is claimed at that length in that dtype."""
        return dtype in self.max_length and 1 <= length <= self.max_length[dtype]

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
        tokens: Int[Tensor, "1 pos"] | None = None,
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
            Columns construction, claim, quantity, source, length, dtype, attention, largest_error, tolerance, holds,
            attention_layers, mlp_layers, width (units of the widest MLP), first_failure and positions_checked.
            ``largest_error`` is in the unit of the quantity; ``holds`` says that it is within ``tolerance`` (NaN is
            not); ``first_failure`` is the first position, 1 at ``<bos>``, where it is not, or missing.

        Raises:
            ProbeError: for a dtype it was not made for, a length outside 1…max_length[dtype], or a decoder or tokens
                that are not of that dtype and length.
        """
        self._require(length, dtype)
        decoder = self.build(length, dtype) if decoder is None else decoder
        tokens = self.tokens(length) if tokens is None else tokens
        if decoder.dtype != dtype:
            raise ProbeError(f"the check wants a decoder in {short(dtype)}, got one in {short(decoder.dtype)}")
        if tokens.shape[-1] != length:
            raise ProbeError(f"the check wants sequences of {length} tokens, got {tokens.shape[-1]}")
        t, errors = self.errors(decoder, tokens, attention)
        rows = self.rows(t, errors, length, dtype, attention, decoder.config.d_mlp)
        return pd.DataFrame(rows).astype({"first_failure": "Int64"})

    def rows(
        self,
        t: Int[Tensor, "looked_at"],
        errors: Mapping[str, Float[Tensor, "looked_at"]],
        length: int,
        dtype: torch.dtype,
        attention: str,
        width: int,
        tolerances: Mapping[str, float] | None = None,
    ) -> list[dict[str, Any]]:
        """The rows of ``check``, out of the errors at the positions t; other tolerances than those claimed may be
        had."""
        rows = []
        for quantity, tolerance in (self.tolerance[dtype] if tolerances is None else tolerances).items():
            error = errors[quantity].nan_to_num(nan=torch.inf)
            failures = t[error > tolerance]
            rows.append(
                {
                    "construction": self.name,
                    "claim": self.claim,
                    "quantity": quantity,
                    "source": self.source,
                    "length": length,
                    "dtype": short(dtype),
                    "attention": attention,
                    "largest_error": error.max().item(),
                    "tolerance": tolerance,
                    "holds": len(failures) == 0,
                    "attention_layers": self.attention_layers,
                    "mlp_layers": self.mlp_layers,
                    "width": width if self.mlp_layers else 0,
                    "first_failure": failures.min().item() if len(failures) else None,
                    "positions_checked": len(t),
                }
            )
        return rows

    def _require(self, length: int, dtype: torch.dtype) -> None:
        if dtype not in self.max_length:
            made_for = ", ".join(short(known) for known in self.max_length)
            raise ProbeError(f"{self.name} is made for {made_for}; got {short(dtype)}")
        if not self.claims(length, dtype):
            raise ProbeError(
                f"{self.name} is claimed for lengths 1…{self.max_length[dtype]} in {short(dtype)}, got {length}"
            )


@runtime_checkable
class Shaped(Protocol):
    """What the shape of a plain decoder follows from."""

    layers: int

    def layout(self, length: int) -> Layout:
        """The rows of the stream."""

    def width(self, length: int) -> int:
        """Units of the widest MLP."""

    def d_head(self, length: int) -> int:
        """Dimensions of a head."""


def plain_config(construction: Shaped, length: int, *, n_heads: int = 1, activation: str = "relu") -> DecoderConfig:
    """The shape of a decoder without norms and encoding that holds a construction's ``layout``, ``width`` and
    ``d_head``."""
    return DecoderConfig(
        d_vocab=D_VOCAB,
        n_ctx=length,
        n_layers=construction.layers,
        d_model=construction.layout(length).d_model,
        n_heads=n_heads,
        d_head=construction.d_head(length),
        d_mlp=construction.width(length),
        activation=activation,
        normalization="none",
        encoding="none",
        bias=True,
    )


class StreamConstruction(Construction):
    """A construction that leaves something in named rows of the residual stream after its last layer."""

    activation: ClassVar[str] = "relu"  #: of the MLPs

    @abstractmethod
    def layout(self, length: int) -> Layout:
        """The rows of the stream."""

    @abstractmethod
    def width(self, length: int) -> int:
        """Units of the widest MLP."""

    def d_head(self, length: int) -> int:
        """Dimensions of a head: 4, so that 1/√d_head is a power of two."""
        return 4

    def config(self, length: int) -> DecoderConfig:
        return plain_config(self, length, activation=self.activation)

    @abstractmethod
    def stream_errors(
        self,
        embedded: Float[Tensor, "pos d_model"],
        stream: Float[Tensor, "pos d_model"],
        t: Int[Tensor, "pos"],
        length: int,
    ) -> dict[str, Float[Tensor, "pos"]]:
        """The errors at positions t (1 at ``<bos>``) of the stream after the last layer, ``embedded`` before the
        first, in a decoder that was built for ``length``."""

    def errors(
        self, decoder: Decoder, tokens: Int[Tensor, "1 pos"], attention: str
    ) -> tuple[Int[Tensor, "looked_at"], dict[str, Float[Tensor, "looked_at"]]]:
        last = f"blocks.{self.layers - 1}.hook_resid_post"
        seen = observe(decoder, tokens, ("hook_embed", last), attention=attention)
        t = torch.arange(1, tokens.shape[1] + 1)
        return t, self.stream_errors(seen["hook_embed"][0], seen[last][0], t, decoder.config.n_ctx)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
