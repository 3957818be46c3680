"""Position planted in a living model: the positive control of every probe and comparison.

``widen`` gives a trained decoder free dimensions without changing its logits; ``plant`` writes a counting head into
them, by which the stream holds the position at every site from that layer on, while the logits stay as they were.
"""

import dataclasses
import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from constructions.counting import counting_score
from constructions.weights import head_weights
from probe.config import check_number, check_size
from probe.errors import ProbeError
from probe.models.decoder import Decoder, check_decoder


@dataclass(frozen=True)
class Planted:
    """A decoder with a planted position, and where it stands.

    ``row`` is the coordinate of the stream that holds ``slope * p`` at the 0-based position p, from
    ``blocks.<layer>.hook_resid_mid`` on; ``twin`` holds its negative where the decoder has LayerNorms (whose mean it
    must not move), and is None elsewhere.
    """

    decoder: Decoder  #: the copy in which it was planted
    layer: int  #: of the planted head
    head: int  #: its number in that layer
    row: int
    twin: int | None
    slope: float
    length: int  #: tokens of the longest sequence in which it counts

    def read(self, stream: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos"]:
        """The 0-based position that the stream holds, to about ``constructions.counting.CURVATURE`` tokens."""
        return stream[..., self.row] / self.slope


def widen(decoder: Decoder, *, rows: int = 4, heads: int = 1) -> Decoder:
    """A decoder with the same logits and room to plant in: ``rows`` more coordinates of the stream, which nothing
    writes or reads, and ``heads`` more heads in every layer, which write nothing. It has biases, and a head of its own
    where the old one was tied to the embedding.

    Raises:
        ProbeError: where the encoding is a function of the shape: sinusoidal positions of d_model, ALiBi's slopes of
            the number of heads; or heads share their keys and values.
    """
    check_decoder(decoder)
    old = decoder.config
    check_size("rows", rows, least=0)
    check_size("heads", heads, least=0)
    if old.encoding == "sinusoidal" and rows:
        raise ProbeError("sinusoidal positions follow from d_model, so a decoder with them cannot be given more rows")
    if old.encoding == "alibi" and heads:
        raise ProbeError("ALiBi's slopes follow from the number of heads, so a decoder with them cannot be given more")
    if heads and old.n_kv_heads != old.n_heads:
        raise ProbeError(f"room for heads wants n_kv_heads = n_heads, got {old.n_kv_heads} for {old.n_heads}")
    d_model = old.d_model + rows
    # With zeros in the new rows the mean of squares is d/d' of what it was. With eps scaled alike, so is all that the
    # norm divides by, and its gain takes that back: x / √(s d/d' + eps d/d') · g √(d/d') = x / √(s + eps) · g.
    shrunk = old.d_model / d_model
    config = dataclasses.replace(
        old,
        d_model=d_model,
        n_heads=old.n_heads + heads,
        n_kv_heads=old.n_kv_heads + heads,
        bias=True,
        tie_embeddings=False,
        norm_eps=old.norm_eps * shrunk,
    )
    wide = Decoder(config, seed=None).to(decoder.device, decoder.dtype)
    with torch.no_grad():
        for parameter in wide.parameters():
            parameter.zero_()
        sources = decoder.state_dict()
        for name, parameter in wide.named_parameters():
            if name in sources:
                # Old coordinates, heads and units come first in every direction, in the old order.
                corner = tuple(slice(0, n) for n in sources[name].shape)
                parameter[corner] = sources[name]
        for module in wide.modules():
            if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
                module.weight[: old.d_model] *= math.sqrt(shrunk)
                module.weight[old.d_model :] = 1
        if old.normalization == "layer":
            _centre(wide, old.d_model)
    return wide.train(decoder.training)


def _centre(decoder: Decoder, d_old: int) -> None:
    """Take out of all that is written into the stream its mean over the first ``d_old`` rows. LayerNorm takes it out
    anyway, over those rows; over more rows it would take out less."""
    written = [decoder.token_embedding.weight.T]
    table = getattr(decoder.encoding, "weight", None)
    if isinstance(table, nn.Parameter) and decoder.encoding.embeds:
        written.append(table.T)
    for block in decoder.layers:
        for projection in (block.attention.o_proj, block.mlp.down_proj):
            written += [projection.weight, projection.bias[:, None]]
    for matrix in written:
        matrix[:d_old] -= matrix[:d_old].mean(dim=0)


def free_rows(decoder: Decoder) -> list[int]:
    """The coordinates of the stream that nothing writes and nothing reads."""
    used = decoder.token_embedding.weight.abs().amax(0) + decoder.head.weight.abs().amax(0)
    if decoder.encoding.embeds:
        last = decoder.encoding.last_position
        positions = torch.arange(decoder.config.n_ctx if last is None else last + 1)
        zeros = used.new_zeros(1, len(positions), len(used))
        used = used + decoder.encoding.embed(zeros, positions).abs().amax((0, 1))
    for block in decoder.layers:
        for projection in (block.attention.o_proj, block.mlp.down_proj):
            used = used + projection.weight.abs().amax(1)
            if projection.bias is not None:
                used = used + projection.bias.abs()
        readers = [block.attention.q_proj, block.attention.k_proj, block.attention.v_proj, block.mlp.up_proj]
        if hasattr(block.mlp, "gate_proj"):
            readers.append(block.mlp.gate_proj)
        for projection in readers:
            used = used + projection.weight.abs().amax(0)
    return (used == 0).nonzero().flatten().tolist()


def free_heads(decoder: Decoder, layer: int) -> list[int]:
    """The heads of a layer that write nothing, whatever they attend to."""
    return [h for h in range(decoder.config.n_heads) if not head_weights(decoder, layer, h).W_O.any()]


@torch.no_grad()
def plant(
    decoder: Decoder,
    construction: str = "counting_head",
    layer: int = 0,
    *,
    length: int | None = None,
    bos: int = 1,
    amplitude: float = 1e-3,
) -> Planted:
    """A copy of a decoder in which one head counts: from ``layer`` on its stream holds the position.

    The head is ``constructions.counting``'s: its score is c on ``<bos>`` and 0 on every other key, its value 0 on
    ``<bos>`` and 1 elsewhere, so that it returns a multiple of the number of other keys. No MLP is needed, and nothing
    that the norm does to other tokens matters: the query and the value of 1 come from biases, and the key reads a row
    that is 0 for all but ``<bos>``, whose hidden state is the same in every sequence. (The sum starts from a rounding
    error of the value at ``<bos>``; it is the same everywhere and is taken back by the output's bias.)

    Args:
        decoder: with biases, a free head in that layer, and free rows: two, or four where there are LayerNorms.
            ``widen`` makes room.
        construction: "counting_head", the one that any norm lets through: the others read the stream by an MLP, behind
            a norm whose scale is the content's, and hold in a living model only where there is no norm.
        layer: where to plant.
        length: the longest sequence, n_ctx by default.
        bos: the id of the token that starts every sequence and stands nowhere else.
        amplitude: the largest number written into the stream, small beside what the model writes, so that its norms
            do not notice: the logits change by about amplitude² / d_model, relatively.

    Raises:
        ProbeError: for another construction, too few free rows or heads, no biases, or an encoding that acts on the
            planted head.
    """
    check_decoder(decoder)
    if construction != "counting_head":
        raise ProbeError(f"only 'counting_head' can be planted (no MLP reads it behind a norm), got {construction!r}")
    length = decoder.config.n_ctx if length is None else length
    check_size("length", length, least=2)
    check_number("amplitude", amplitude)
    if not 0 <= layer < decoder.config.n_layers:
        raise ProbeError(f"layer must lie in 0…{decoder.config.n_layers - 1}, got {layer}")
    if not 0 <= bos < decoder.config.d_vocab:
        raise ProbeError(f"bos must lie in 0…{decoder.config.d_vocab - 1}, got {bos}")
    if not decoder.config.bias:
        raise ProbeError("a planted head wants biases, got a decoder without; widen(decoder) gives it zero ones")
    mirrored = decoder.config.normalization == "layer"
    wanted, rows, heads = (4 if mirrored else 2), free_rows(decoder), free_heads(decoder, layer)
    if len(rows) < wanted or not heads:
        raise ProbeError(
            f"planting wants {wanted} free rows of the stream and 1 free head in layer {layer}, got {len(rows)} and "
            f"{len(heads)}; widen(decoder) makes room"
        )
    planted = Decoder(decoder.config, seed=None).to(decoder.device, decoder.dtype).eval()
    planted.load_state_dict(decoder.state_dict())
    head, here = heads[0], rows[:wanted]
    _check_unbiased(planted, layer, head)

    # Rows: is <bos> (and its mirror image), position (and its mirror image).
    signs = torch.tensor([1.0, -1.0] if mirrored else [1.0], dtype=decoder.dtype, device=decoder.device)
    is_bos, position = here[: len(signs)], here[len(signs) :]
    planted.token_embedding.weight[bos, is_bos] = amplitude * signs
    # What the layer reads of these rows at <bos>, behind its norm: half the difference of the two, so that a mean
    # which the norm takes out of both does not count.
    seen: list[Tensor] = []
    handle = planted.layers[layer].attention_norm.register_forward_hook(lambda m, i, out: seen.append(out))
    planted(torch.tensor([[bos]], device=decoder.device))
    handle.remove()
    height = (seen[0][0, 0, is_bos] * signs).mean()

    attention, config = planted.layers[layer].attention, planted.config
    first = head * config.d_head
    block = slice(first, first + config.d_head)
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        projection.weight[block] = 0
        projection.bias[block] = 0
    c = counting_score(length)
    attention.q_proj.bias[first] = c / config.score_scale
    attention.k_proj.weight[first, is_bos] = signs / (height * len(signs))
    attention.v_proj.bias[first] = 1
    attention.v_proj.weight[first, is_bos] = -signs / (height * len(signs))
    slope = amplitude / length
    attention.o_proj.weight[position, first] = slope * math.exp(c) * signs
    start = _value_at_bos(planted, layer, head, bos)
    attention.o_proj.bias[position] -= attention.o_proj.weight[position, first] * start
    twin = position[1] if mirrored else None
    return Planted(planted, layer, head, position[0], twin, slope, length)


def _value_at_bos(decoder: Decoder, layer: int, head: int, bos: int) -> Tensor:
    seen: list[Tensor] = []
    decoder(torch.tensor([[bos]], device=decoder.device), hooks={f"blocks.{layer}.attn.hook_z": seen.append})
    return seen[0][0, 0, head, 0]


def _check_unbiased(decoder: Decoder, layer: int, head: int) -> None:
    """Refuse a head on which the encoding acts: its scores must be the content's alone."""
    if not decoder.config.sees_position(layer):
        return
    positions: Int[Tensor, "two"] = torch.arange(2)
    like = decoder.token_embedding.weight
    bias = decoder.encoding.bias(positions, positions, like)
    acts = decoder.encoding.rotation(positions, like) is not None or decoder.encoding.reads_content
    if acts or (bias is not None and bias[head].any()):
        raise ProbeError(
            f"the counting head wants scores without position, but encoding {decoder.config.encoding!r} acts on head "
            f"{head} of layer {layer}"
        )
