"""A model before it is brought into a variant, and the weights that most models of the suite share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float64, Int
from torch import Tensor, nn

from constructions.known.answer import Answer, Head
from constructions.known.drawing import FIRST, LENGTH, Draw
from constructions.layout import Layout, write_embeddings
from constructions.weights import Unit, write_units, zero_weights
from probe.models.decoder import Decoder, DecoderConfig

N_FREE = 8  # rows of the stream that no model reads, for heads that distract


@dataclass(frozen=True)
class Placement:
    """Where the rows of a model stand in the wider stream of an encoding that fixes its own coordinates."""

    encoding: str
    options: Mapping[str, Any]
    rows: Int[Tensor, "d_model"]  #: for each row of the model, the coordinate of the wider stream
    added: Float64[Tensor, "d_model"]  #: the constant that the encoding adds to each row, which the embeddings take out
    d_model: int  #: of the wider stream


@dataclass(frozen=True)
class Blueprint:
    """A model in float64 and without norms, its tokens, and what is true of it."""

    decoder: Decoder
    layout: Layout  #: the rows of its stream; the group "free" is read by nothing
    tokens: Int[Tensor, "sequence pos"]
    scored: Bool[Tensor, "sequence pos"]
    answer: Answer
    placement: Placement | None = None


def make_layout(n_content: int, **sizes: int) -> Layout:
    """The rows of a model: "token", which is 1 in the row of the token and else 0, "out", the same for the token that
    is predicted beside it, "free", and the given groups."""
    return Layout(token=n_content, out=n_content, free=N_FREE, **sizes)


def make_decoder(
    draw: Draw,
    layout: Layout,
    *,
    n_layers: int = 1,
    n_heads: int = 1,
    d_head: int = 4,
    d_mlp: int = 1,
    encoding: str = "none",
    **options: Any,
) -> Decoder:
    """A decoder that knows its tokens and does nothing else: all weights but the embeddings are 0, norms are absent,
    and scores are q · k, unscaled."""
    n_content = len(layout["token"])
    config = DecoderConfig(
        d_vocab=n_content + FIRST,
        n_ctx=LENGTH,
        n_layers=n_layers,
        d_model=layout.d_model,
        n_heads=n_heads,
        d_head=d_head,
        d_mlp=d_mlp,
        activation="relu",
        normalization="none",
        encoding=encoding,
        encoding_options=options,
        score_scale=1.0,
    )
    decoder = empty_decoder(config)
    write_embeddings(decoder, layout, seed=draw.integer(0, 2**31))
    for c, row in enumerate(layout["token"]):
        decoder.token_embedding.weight[FIRST + c, row] = 1
    return decoder


def empty_decoder(config: DecoderConfig) -> Decoder:
    """A decoder in float64 whose weights are all 0, those of its encoding too; norms have the gain 1."""
    decoder = Decoder(config, seed=None).double()
    zero_weights(decoder)
    for parameter in decoder.encoding.parameters():
        parameter.zero_()
    return decoder


def write_shift(decoder: Decoder, rows: Sequence[int], shift: int, gain: float) -> None:
    """Weights by which row c of ``rows`` adds ``gain`` times its value to the logit of content token c + shift."""
    for c, row in enumerate(rows):
        decoder.head.weight[FIRST + (c + shift) % len(rows), row] += gain


def late_units(x: int, late: int, before: float, after: float) -> list[Unit]:
    """Two units that add to row ``late``: 0 where row ``x`` is at ``before`` or beyond, and 1 where it is at ``after``
    or beyond on the other side.

    Between them the row rises from 0 at a quarter of the way to 1 at three quarters, so that rounding moves neither.
    """
    # u = (x - before) / (after - before) is 0 at before and 1 at after; ReLU(2u - 1/2) - ReLU(2u - 3/2) is the ramp.
    slope = 2 / (after - before)
    at = -before * slope
    return [({x: slope}, at - 0.5, {late: 1.0}), ({x: slope}, at - 1.5, {late: -1.0})]


def switch_units(layout: Layout, late: Sequence[int], shifts: Sequence[int]) -> list[Unit]:
    """Units by which the predicted shift is ``shifts[m]`` where the first m of the rows ``late`` are 1 and the others
    0: with ``write_switch_head``, the logit of content token c + shifts[m] is the gain and all others are 0, c being
    the token.

    ReLU(token_c + late_j - 1) is 1 where both are 1 and else 0. It takes the token of shifts[j] out of the rows "out"
    and puts the one of shifts[j + 1] in; without any, shifts[0] stands, which the unembedding reads off the token.
    """
    n = len(layout["token"])
    return [
        (
            {row: 1.0, flag: 1.0},
            -1.0,
            {layout["out"][(c + shifts[j + 1]) % n]: 1.0, layout["out"][(c + shifts[j]) % n]: -1.0},
        )
        for j, flag in enumerate(late)
        for c, row in enumerate(layout["token"])
    ]


def write_switch(decoder: Decoder, layer: int, layout: Layout, shifts: Sequence[int], gain: float) -> None:
    """``switch_units`` over the group "late" in the MLP of a layer, and the unembedding."""
    write_units(decoder, layer, switch_units(layout, layout["late"], shifts))
    write_shift(decoder, layout["token"], shifts[0], gain)
    write_shift(decoder, layout["out"], 0, gain)


def scored_from(tokens: Int[Tensor, "sequence pos"], first: int) -> Bool[Tensor, "sequence pos"]:
    """All tokens from the 0-based position ``first`` on."""
    return (torch.arange(tokens.shape[1]) >= first).expand(tokens.shape)


def all_heads(decoder: Decoder, value: str) -> dict[Head, str]:
    """The same name for every head."""
    config = decoder.config
    return {(layer, head): value for layer in range(config.n_layers) for head in range(config.n_heads)}


def causal_softmax(scores: Float64[Tensor, "query key"]) -> Float64[Tensor, "query key"]:
    """The pattern of those scores, each query over the keys up to its own."""
    hidden = torch.ones_like(scores, dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1)


def by_distance(bias: Float64[Tensor, "distance"]) -> Float64[Tensor, "query key"]:
    """The scores bias[t - i] of every query t and key i up to it, 0 elsewhere."""
    at = torch.arange(len(bias))
    distance = at[:, None] - at
    return torch.where(distance >= 0, bias[distance.clamp(min=0)], 0.0)


def weight_of(encoding: nn.Module) -> Tensor:
    """The table of a learned encoding or of T5's biases."""
    table = encoding.get_parameter("weight")
    return table.detach()
