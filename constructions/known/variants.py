"""Variants: the same answer in other weights."""

import dataclasses
import math
from collections.abc import Callable

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from constructions.known.answer import Answer
from constructions.known.blueprint import Blueprint, Placement, empty_decoder, weight_of
from constructions.known.drawing import Draw
from constructions.known.reading import first_reader
from constructions.layout import Layout
from constructions.weights import head_weights
from probe.models.decoder import Decoder, DecoderConfig

N_DISTRACTING = 2  # heads a layer
# The constant coordinate of the variants with a norm: the norm divides by a power of two as long as the sum of all
# other squares is small beside its square (``constructions.normalised``).
CONSTANT = 2.0**18
LEAST_WIDTH = 256


def clean(blueprint: Blueprint, draw: Draw) -> tuple[Decoder, Answer]:
    """The model as its weights were written."""
    return _placed(blueprint.decoder, blueprint.placement), blueprint.answer


def distracting(blueprint: Blueprint, draw: Draw) -> tuple[Decoder, Answer]:
    """Two more heads a layer attend to random content and write into rows that nothing reads.

    What they write may tell the position, as any average over a prefix does, so verdicts of "nothing" are kept only for
    the encoding.
    """
    decoder, answer = _with_distraction(blueprint, draw)
    return _placed(decoder, blueprint.placement), answer


def rotated(blueprint: Blueprint, draw: Draw) -> tuple[Decoder, Answer]:
    """The residual stream stands in a random orthogonal basis."""
    return _in_random_basis(blueprint.decoder, draw), blueprint.answer


def distracting_rotated(blueprint: Blueprint, draw: Draw) -> tuple[Decoder, Answer]:
    """Both: the distracting heads, in a random orthogonal basis."""
    decoder, answer = _with_distraction(blueprint, draw)
    return _in_random_basis(decoder, draw), answer


def layernorm(blueprint: Blueprint, draw: Draw) -> tuple[Decoder, Answer]:
    """The model has LayerNorms, which multiply by a constant."""
    return _through_norm(blueprint.decoder, "layer"), blueprint.answer


def rmsnorm(blueprint: Blueprint, draw: Draw) -> tuple[Decoder, Answer]:
    """The model has RMSNorms, which multiply by a constant."""
    return _through_norm(blueprint.decoder, "rms"), blueprint.answer


Variant = Callable[[Blueprint, Draw], tuple[Decoder, Answer]]

#: Every variant by its name: from a blueprint, the model in float64 and its answer.
VARIANTS: dict[str, Variant] = {
    "clean": clean,
    "distracting": distracting,
    "layernorm": layernorm,
    "rmsnorm": rmsnorm,
    "rotated": rotated,
    "distracting_rotated": distracting_rotated,
}


def moved(
    decoder: Decoder,
    config: DecoderConfig,
    read: Float64[Tensor, "new old"],
    write: Float64[Tensor, "new old"],
) -> Decoder:
    """The decoder in another stream: what wrote the column x writes ``write`` x, and what read the row w reads
    w ``read``ᵀ. The numbers that heads and units see are the same where ``read``ᵀ ``write`` = 1."""
    new = empty_decoder(config)
    new.token_embedding.weight.copy_(decoder.token_embedding.weight @ write.T)
    if decoder.config.encoding == "learned":
        weight_of(new.encoding).copy_(weight_of(decoder.encoding) @ write.T)
    elif decoder.config.encoding == "t5":
        weight_of(new.encoding).copy_(weight_of(decoder.encoding))
    for ours, theirs in zip(new.layers, decoder.layers, strict=True):
        for name in ("q_proj", "k_proj", "v_proj"):
            _copy_read(getattr(ours.attention, name), getattr(theirs.attention, name), read)
        _copy_write(ours.attention.o_proj, theirs.attention.o_proj, write)
        _copy_read(ours.mlp.up_proj, theirs.mlp.up_proj, read)
        _copy_write(ours.mlp.down_proj, theirs.mlp.down_proj, write)
    _copy_read(new.head, decoder.head, read)
    return new


def _copy_read(outer: nn.Linear, inner: nn.Linear, read: Tensor) -> None:
    outer.weight.copy_(inner.weight @ read.T)
    if inner.bias is not None:
        outer.bias.copy_(inner.bias)


def _copy_write(outer: nn.Linear, inner: nn.Linear, write: Tensor) -> None:
    outer.weight.copy_(write @ inner.weight)
    outer.bias.copy_(write @ inner.bias)


def _placed(decoder: Decoder, placement: Placement | None) -> Decoder:
    if placement is None:
        return decoder
    config = dataclasses.replace(
        decoder.config,
        d_model=placement.d_model,
        encoding=placement.encoding,
        encoding_options=dict(placement.options),
    )
    at = torch.zeros(placement.d_model, decoder.config.d_model, dtype=torch.float64)
    at[placement.rows, torch.arange(decoder.config.d_model)] = 1
    new = moved(decoder, config, at, at)
    new.token_embedding.weight -= at @ placement.added
    return new


def _in_random_basis(decoder: Decoder, draw: Draw) -> Decoder:
    d_model = decoder.config.d_model
    basis, _ = torch.linalg.qr(draw.normal(d_model, d_model))
    return moved(decoder, decoder.config, basis, basis)


def _through_norm(decoder: Decoder, normalization: str) -> Decoder:
    # The stream is [C…, x, 0…, -C…, -x, 0…], so its mean is 0 and LayerNorm is RMSNorm. Its mean square is
    # (2q C² + 2 Σ x²)/D with q constants in each half. C is so large that the second term does not count, and q is 1 or
    # 2 such that D/2q is a power of 4: the norm multiplies by the power of two s = √(D/2q)/C. A read of x with weight w
    # takes w/2s from the coordinate and -w/2s from its mirror image, in which a rounded mean cancels.
    d = decoder.config.d_model
    D = max(LEAST_WIDTH, 2 ** math.ceil(math.log2(2 * (d + 2))))
    half, q = D // 2, 1 if round(math.log2(D)) % 2 else 2
    s = math.sqrt(D / (2 * q)) / CONSTANT
    mirrored = torch.zeros(D, d, dtype=torch.float64)
    mirrored[q : q + d], mirrored[half + q : half + q + d] = torch.eye(d), -torch.eye(d)
    config = dataclasses.replace(decoder.config, d_model=D, normalization=normalization)
    new = moved(decoder, config, mirrored / (2 * s), mirrored)
    new.token_embedding.weight[:, :q], new.token_embedding.weight[:, half : half + q] = CONSTANT, -CONSTANT
    return new


def _with_distraction(blueprint: Blueprint, draw: Draw) -> tuple[Decoder, Answer]:
    decoder, layout, answer = blueprint.decoder, blueprint.layout, blueprint.answer
    kept = {name: verdict for name, verdict in answer.mechanisms.items() if verdict != "nothing" or name == "encoding"}
    # Their queries read content alone, and nothing reads what they write.
    config = decoder.config
    layers, heads = range(config.n_layers), range(config.n_heads, config.n_heads + N_DISTRACTING)
    first = first_reader(answer, config.n_layers)
    follows = {(layer, head): False for layer in layers if layer >= first for head in heads}
    used_for = {(layer, head): "nothing" for layer in layers for head in heads}
    answer = dataclasses.replace(
        answer, mechanisms=kept, follows={**answer.follows, **follows}, used_for={**answer.used_for, **used_for}
    )
    return _with_heads(decoder, layout, draw), answer


def _with_heads(decoder: Decoder, layout: Layout, draw: Draw) -> Decoder:
    """The decoder with heads that read the content rows, at random, and write into the group "free"."""
    old = decoder.config
    n_heads = old.n_heads + N_DISTRACTING
    new = empty_decoder(dataclasses.replace(old, n_heads=n_heads, n_kv_heads=n_heads))
    state = decoder.state_dict()
    for name, parameter in new.named_parameters():
        # The old heads come first, and so do their columns in a table of T5's biases.
        parameter[tuple(slice(0, n) for n in state[name].shape)] = state[name]
    free = slice(layout["free"].start, layout["free"].stop)
    n_content = layout.content.stop - layout.content.start
    for layer in range(old.n_layers):
        for head in range(old.n_heads, n_heads):
            W, sharpness = head_weights(new, layer, head), draw.number(0.5, 2)
            # Content is N(0, 1), so q and k are N(0, 1) in each dimension before the sharpness, and scores are of its
            # size.
            W.W_Q[layout.content] = draw.normal(n_content, old.d_head) * sharpness / n_content**0.5 / old.d_head**0.5
            W.W_K[layout.content] = draw.normal(n_content, old.d_head) / n_content**0.5
            W.W_V[layout.content] = draw.normal(n_content, old.d_head) / n_content**0.5
            W.W_O[:, free] = draw.normal(old.d_head, free.stop - free.start) / old.d_head**0.5
    return new
