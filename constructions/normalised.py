"""Any construction through LayerNorm or RMSNorm, with random heads and MLP units at work on random content beside
it."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from constructions import odometer
from constructions.chords import ROUNDING, ExactPosition, n_bits
from constructions.construction import Construction, StreamConstruction
from constructions.heads import HeadsFromChords, HeadsFromOdometer, PositionalHeads
from constructions.layout import POSITION
from constructions.observing import observe
from constructions.weights import head_weights
from probe.errors import unknown_name
from probe.models.decoder import Decoder, DecoderConfig

#: The power of two by which rows are divided; "length" is that of the bits of the length.
Scale = int | Literal["length"]

OTHER_HEADS, OTHER_UNITS = 2, 32
# The constant coordinate. The norm is a power of two to the last bit if the sum of all other squares is below
# 2 C² epsilon: 2¹⁷ in float32, 2²⁷ in float64. In bfloat16 it is computed in float32 and rounded to 8 bits.
CONSTANT: dict[torch.dtype, float] = {torch.float64: 2.0**40, torch.float32: 2.0**20, torch.bfloat16: 2.0**16}


class ThroughNorm(Construction):
    """The weights of another construction, rewritten so that a pre-norm decoder computes the same numbers.

    Its residual stream is [C…, Λx, 0…, -C…, -Λx, 0…], x the other's stream, Λ a power of two for each row that keeps it
    small. The quantities are those of the other construction, without the content's, which the random heads and units
    here change at will.
    """

    def __init__(
        self,
        inner: StreamConstruction | PositionalHeads,
        normalization: str,
        scales: Mapping[str, Scale],
        dtypes: Sequence[torch.dtype],
    ):
        """Args:
        normalization: "layer" or "rms".
        scales: by group of the inner layout, and "position": the rows are held divided by 2^scale, to stay near 1.
            "length" in place of a number stands for the bits of the length.
        dtypes: of the inner claims those that are kept.

        Raises:
            ProbeError: for another normalization.
        """
        if normalization not in ("layer", "rms"):
            raise unknown_name("normalization to pass through", normalization, ("layer", "rms"))
        self.inner, self.normalization, self.scales = inner, normalization, scales
        self.name = f"{inner.name}_through_{normalization}_norm"
        self.claim = f"through {normalization} norm, beside random heads and units: {inner.claim}"
        self.source = f"snap-through of the norm; {inner.source}"
        self.layers, self.attention_layers, self.mlp_layers = inner.layers, inner.attention_layers, inner.mlp_layers
        self.max_length = {dtype: inner.max_length[dtype] for dtype in dtypes}
        self.attention_paths = inner.attention_paths
        self.dtype_specific = True
        self.tolerance = {
            dtype: {quantity: most for quantity, most in by_quantity.items() if quantity != "content"}
            for dtype, by_quantity in inner.tolerance.items()
            if dtype in dtypes
        }

    def config(self, length: int) -> DecoderConfig:
        inner = self.inner.config(length)
        # From these widths on the CPU's LayerNorm kernel adds mirrored coordinates in the same order, so that their
        # mean is 0 to the last bit (measured; below them it errs by 1e-9 of C).
        least = 1024 if torch.bfloat16 in self.max_length else 256
        d_model = max(least, 2 ** math.ceil(math.log2(2 * (inner.d_model + 2))))
        return DecoderConfig(
            d_vocab=inner.d_vocab,
            n_ctx=length,
            n_layers=inner.n_layers,
            d_model=d_model,
            n_heads=inner.n_heads + OTHER_HEADS,
            d_head=inner.d_head,
            d_mlp=inner.d_mlp + OTHER_UNITS,
            activation=inner.activation,
            normalization=self.normalization,
            encoding="none",
            bias=True,
            score_scale=inner.score_scale,
        )

    def _row_scales(self, length: int) -> Float[Tensor, "d_model"]:
        layout = self.inner.layout(length)
        scales = torch.ones(layout.d_model, dtype=torch.float64)
        for group, exponent in self.scales.items():
            rows = [POSITION] if group == "position" else list(layout[group])
            scales[rows] = 2.0 ** -(n_bits(length) if exponent == "length" else exponent)
        return scales

    def write_weights(self, decoder: Decoder, length: int, dtype: torch.dtype) -> None:
        # The norm. With D = d_model coordinates the stream is mirrored, x and -x, so its mean is 0 and LayerNorm is
        # RMSNorm. Its mean square is (2 q C² + 2 Σ (λx)²)/D, where q constants C stand in each half, q = 1 or 2 such
        # that D/2q is a power of 4, as C is. With C so large that the second term is below half an epsilon of the first
        # (and norm_eps anyway), the root is √(2q/D) C, a power of two: the norm multiplies by the power of two
        # s = √(D/2q)/C and rounds nothing. Every read divides by s again.
        # RMSNorm does this to the last bit. LayerNorm's kernel computes the variance by Welford's recurrence, whose
        # root may be off by a factor 1 + δ, δ of a few epsilon (float32: 1e-6). The chords do not see it (they compare
        # 1 with s_j x, and both are scaled), units that round have half a unit to spare, and in bfloat16 it is rounded
        # away.
        # The odometer's digits are not rounded, so it is claimed in bfloat16.
        # Reading row r with weight w: w/(2 λ s) from its coordinate, -w/(2 λ s) from the mirrored one; so a common
        # error of both (LayerNorm's mean, rounded) cancels. Writing: λ w into the one, -λ w into the other. Biases
        # stay. The factors are powers of two: all products and sums are those of the inner construction, times a power
        # of two.
        # A unit that rounds (bias ROUNDING) must have one non-zero input, and reads from the one coordinate alone.
        config, inner = decoder.config, self.inner.written(length, dtype)
        D, C, d = config.d_model, CONSTANT[dtype], inner.config.d_model
        half, q = D // 2, 1 if round(math.log2(D)) % 2 else 2
        s = math.sqrt(D / (2 * q)) / C
        scales = self._row_scales(length)
        here, mirrored = slice(q, q + d), slice(half + q, half + q + d)

        def read(outer: nn.Linear, W: Float[Tensor, "out d"], bias: Tensor | None = None, first: int = 0) -> None:
            rows = slice(first, first + len(W))
            alone = torch.zeros(len(W), 1, dtype=torch.bool) if bias is None else (bias == ROUNDING[dtype])[:, None]
            W = W / scales / s
            outer.weight[rows, here] = torch.where(alone, W, W / 2)
            outer.weight[rows, mirrored] = torch.where(alone, 0, -W / 2)
            if bias is not None:
                outer.bias[rows] = bias

        def write(outer: Tensor, W: Float[Tensor, "d in"]) -> None:
            outer[here], outer[mirrored] = scales[:, None] * W, -scales[:, None] * W

        write(decoder.token_embedding.weight.T, inner.token_embedding.weight.T)
        decoder.token_embedding.weight[:, :q], decoder.token_embedding.weight[:, half : half + q] = C, -C
        generator = torch.Generator().manual_seed(2)
        content = self.inner.layout(length).content
        n_content, units = content.stop - content.start, slice(inner.config.d_mlp, config.d_mlp)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        def of_content(n: int) -> Float[Tensor, "out d"]:
            W = torch.zeros(n, d, dtype=torch.float64)
            W[:, content] = random(n, n_content) / math.sqrt(n_content)
            return W

        depth = math.sqrt(2 * config.n_layers)  # as Decoder.reset_parameters scales what writes into the stream

        for layer, (ours, theirs) in enumerate(zip(decoder.layers, inner.layers, strict=True)):
            for name in ("q_proj", "k_proj", "v_proj"):
                outer, W = getattr(ours.attention, name), getattr(theirs.attention, name).weight
                read(outer, W)
                read(outer, of_content(OTHER_HEADS * config.d_head), first=len(W))
            W_O = theirs.attention.o_proj.weight
            write(ours.attention.o_proj.weight[:, : W_O.shape[1]], W_O)
            for head in range(inner.config.n_heads, config.n_heads):
                W = torch.zeros(config.d_head, d, dtype=torch.float64)
                W[:, content] = random(config.d_head, n_content) / math.sqrt(config.d_head) / depth
                write(head_weights(decoder, layer, head).W_O.T, W.T)
            for name in ("gate_proj", "up_proj"):
                if hasattr(theirs.mlp, name):
                    outer, inward = getattr(ours.mlp, name), getattr(theirs.mlp, name)
                    read(outer, inward.weight, inward.bias)
                    read(outer, of_content(OTHER_UNITS), first=units.start)
            write(ours.mlp.down_proj.weight[:, : units.start], theirs.mlp.down_proj.weight)
            W = torch.zeros(d, OTHER_UNITS, dtype=torch.float64)
            W[content] = random(n_content, OTHER_UNITS) / math.sqrt(OTHER_UNITS) / depth
            write(ours.mlp.down_proj.weight[:, units], W)
            bias = scales * theirs.mlp.down_proj.bias
            ours.mlp.down_proj.bias[here], ours.mlp.down_proj.bias[mirrored] = bias, -bias

    def stream(self, value: Float[Tensor, "pos d_model"], length: int) -> Float[Tensor, "pos d"]:
        """The inner construction's stream, out of this one's."""
        scales = self._row_scales(length)
        q = 1 if round(math.log2(value.shape[-1])) % 2 else 2
        return value[:, q : q + len(scales)] / scales

    def errors(
        self, decoder: Decoder, tokens: Int[Tensor, "1 pos"], attention: str
    ) -> tuple[Int[Tensor, "looked_at"], dict[str, Float[Tensor, "looked_at"]]]:
        if not isinstance(self.inner, StreamConstruction):
            return self.inner.errors(decoder, tokens, attention)
        last, length = f"blocks.{self.layers - 1}.hook_resid_post", decoder.config.n_ctx
        seen = observe(decoder, tokens, ("hook_embed", last), attention=attention)
        t = torch.arange(1, tokens.shape[1] + 1)
        embedded, stream = (self.stream(seen[site][0], length) for site in ("hook_embed", last))
        return t, self.inner.stream_errors(embedded, stream, t, length)


_CHORDS: dict[str, Scale] = {"position": "length", "scratch": "length"}
_SCRATCH: dict[str, Scale] = {"scratch": "length"}
_ODOMETER: dict[str, Scale] = {"crossing 0": 16, "until 0": 32, "after 0": 32, "digits": 8, "near low": 8, "low": 8}
_FLOATS = (torch.float64, torch.float32)

CONSTRUCTIONS: dict[str, Construction] = {
    each.name: each
    for normalization in ("rms", "layer")
    for each in (
        ThroughNorm(ExactPosition(), normalization, _CHORDS, _FLOATS),
        ThroughNorm(odometer.CONSTRUCTIONS["odometer_two"], normalization, _ODOMETER, (torch.bfloat16,)),
        ThroughNorm(HeadsFromChords(), normalization, _SCRATCH, _FLOATS),
        ThroughNorm(HeadsFromOdometer(), normalization, {**_ODOMETER, "upper": 8, "lower": 8}, (torch.bfloat16,)),
    )
}
