"""Writing weights into a decoder the way a proof writes them: this row of the stream, that dimension of the head.

"Row" means a coordinate of the residual stream, as in the papers, where a hidden state is a column vector. All numbers
here are 0-based: the papers' row 1 is row 0. The matrices keep the field's orientation, in which a hidden state
multiplies from the left: q = x W_Q, k = x W_K, v = x W_V, and z W_O is added to the stream.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from probe.errors import ProbeError, unknown_name
from probe.models.decoder import Decoder

#: A hidden unit: {row read: weight}, bias, {row written: weight}.
Unit = tuple[Mapping[int, float], float, Mapping[int, float]]


class HeadWeights(NamedTuple):
    """The four matrices of one head: views, so that what is written into them is written into the decoder."""

    W_Q: Float[Tensor, "d_model d_head"]
    W_K: Float[Tensor, "d_model d_head"]
    W_V: Float[Tensor, "d_model d_head"]
    W_O: Float[Tensor, "d_head d_model"]


def head_weights(decoder: Decoder, layer: int, head: int) -> HeadWeights:
    """The matrices of a head (0-based) in a layer (0-based).

    Raises:
        ProbeError: for a layer or head that the decoder does not have, or heads that share their keys and values.
    """
    config = decoder.config
    if config.n_kv_heads != config.n_heads:
        raise ProbeError(
            f"a hand-built head wants keys of its own (n_kv_heads = n_heads), got {config.n_kv_heads} for "
            f"{config.n_heads} heads"
        )
    attention = decoder.layers[_within("layer", layer, config.n_layers)].attention
    head = _within("head", head, config.n_heads)

    def reads(projection: nn.Linear) -> Tensor:
        return projection.weight.detach().unflatten(0, (config.n_heads, config.d_head))[head].T

    W_O = attention.o_proj.weight.detach().unflatten(1, (config.n_heads, config.d_head))[:, head].T
    return HeadWeights(reads(attention.q_proj), reads(attention.k_proj), reads(attention.v_proj), W_O)


def zero_weights(decoder: Decoder) -> None:
    """Set every embedding, linear map and bias to 0: such a decoder hands its (zero) residual stream on untouched.

    Norms get their gain of 1 (and bias of 0).
    """
    for module in decoder.modules():
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            module.reset_parameters()
        if isinstance(module, (nn.Linear, nn.Embedding)):
            for parameter in module.parameters(recurse=False):
                parameter.detach().zero_()


def write_head(
    decoder: Decoder,
    layer: int,
    head: int,
    *,
    query: Mapping[tuple[int, int], float] | None = None,
    key: Mapping[tuple[int, int], float] | None = None,
    value: Mapping[tuple[int, int], float] | None = None,
    output: Mapping[tuple[int, int], float] | None = None,
) -> None:
    """Write single entries of a head's matrices; what is not named stays as it is.

    ``query``, ``key`` and ``value`` are read as {(row, head dimension): weight}, ``output`` as {(head dimension, row):
    weight}: ``value={(IS_BOS, 0): 1.0}, output={(0, POSITION): 1.0}`` moves row IS_BOS through dimension 0 into
    row POSITION.
    """
    for matrix, entries in zip(head_weights(decoder, layer, head), (query, key, value, output), strict=True):
        for (i, j), weight in (entries or {}).items():
            matrix[i, j] = weight


def write_mlp_units(
    decoder: Decoder,
    layer: int,
    *,
    read: Mapping[int, Float[Tensor, "unit"]],
    bias: Float[Tensor, "unit"],
    write: Mapping[int, Float[Tensor, "unit"]],
    output_bias: Mapping[int, float] | None = None,
    gate: Mapping[int, Float[Tensor, "unit"]] | None = None,
    gate_bias: Float[Tensor, "unit"] | None = None,
    first: int = 0,
) -> None:
    """Write hidden units ``first``, ``first + 1``, … of a layer's MLP; what is not named stays as it is.

    Unit j computes h_j = act(Σ_row read[row][j] · x[row] + bias[j]), and the MLP adds
    Σ_j write[row][j] · h_j + output_bias[row] to each row of the stream. In a swiglu MLP h_j is
    silu(Σ_row gate[row][j] · x[row] + gate_bias[j]) · (Σ_row read[row][j] · x[row] + bias[j]).

    Raises:
        ProbeError: for more units than the MLP has left, a layer that the decoder does not have, or a gate where the
            MLP has none (and the reverse).
    """
    mlp = decoder.layers[_within("layer", layer, decoder.config.n_layers)].mlp
    units = slice(first, first + len(bias))
    if not 0 <= units.start <= units.stop <= decoder.config.d_mlp:
        raise ProbeError(f"d_mlp is {decoder.config.d_mlp}, got units {units.start}…{units.stop - 1}")
    gated = decoder.config.activation == "swiglu"
    if gated != (gate is not None):
        raise ProbeError(f"a gate is for swiglu and swiglu wants one, got activation {decoder.config.activation!r}")
    mlp.up_proj.bias.detach()[units] = bias.to(decoder.dtype)
    for row, weights in read.items():
        mlp.up_proj.weight.detach()[units, row] = weights.to(decoder.dtype)
    if gate is not None:
        mlp.gate_proj.bias.detach()[units] = 0 if gate_bias is None else gate_bias.to(decoder.dtype)
        for row, weights in gate.items():
            mlp.gate_proj.weight.detach()[units, row] = weights.to(decoder.dtype)
    for row, weights in write.items():
        mlp.down_proj.weight.detach()[row, units] = weights.to(decoder.dtype)
    for row, weight in (output_bias or {}).items():
        mlp.down_proj.bias.detach()[row] = weight


def write_units(
    decoder: Decoder,
    layer: int,
    units: Sequence[Unit],
    output_bias: Mapping[int, float] | None = None,
    first: int = 0,
) -> int:
    """Write ReLU units one by one, each as ({row read: weight}, bias, {row written: weight}); the next free unit.

    For units that read many rows; ``write_mlp_units`` is shorter where all read the same few.
    """
    read: dict[int, Tensor] = {}
    write: dict[int, Tensor] = {}
    for j, (reads, _, writes) in enumerate(units):
        for table, entries in ((read, reads), (write, writes)):
            for row, weight in entries.items():
                table.setdefault(row, torch.zeros(len(units), dtype=torch.float64))[j] = weight
    bias = torch.tensor([bias for _, bias, _ in units], dtype=torch.float64)
    write_mlp_units(decoder, layer, read=read, bias=bias, write=write, output_bias=output_bias, first=first)
    return first + len(units)


def perturbed(decoder: Decoder, weight: str, index: tuple[int, ...], factor: float = 1.01) -> Decoder:
    """A copy of the decoder in which one number is multiplied: ``perturbed(d, "layers.0.mlp.down_proj.bias", (2,))``.

    Raises:
        ProbeError: for a name that is no parameter of the decoder, or an entry that is 0, which no factor changes.
    """
    parameters = dict(decoder.named_parameters())
    if weight not in parameters:
        raise unknown_name("weight", weight, parameters)
    if parameters[weight][index].item() == 0:
        raise ProbeError(f"a perturbed weight must not be 0, got {weight}{list(index)} = 0")
    twin = copy.deepcopy(decoder)
    with torch.no_grad():
        twin.get_parameter(weight)[index] *= factor
    return twin


def _within(kind: str, value: int, n: int) -> int:
    if not 0 <= value < n:
        raise ProbeError(f"{kind} must lie in 0…{n - 1}, got {value}")
    return value
