"""What the patterns of a decoder of ours follow from, layer by layer, without any pattern being held."""

import contextlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from probe.errors import ProbeError
from probe.models.config import DecoderConfig
from probe.models.encodings import PositionEncoding, RelativeBias
from probe.models.protocol import AttentionInputs, Hook, Visit


class Enough(Exception):
    """The last layer that was asked for has been seen; the logits of a long text alone may fill the memory."""


def visit_layers(
    run: Callable[[Mapping[str, Hook]], object],
    config: DecoderConfig,
    encoding: PositionEncoding,
    visit: Visit,
    layers: Sequence[int],
) -> None:
    """Call ``visit(layer, inputs)`` at each of these layers, and stop at the last of them.

    Args:
        run: runs the decoder by fused attention with some hooks, so that memory grows with the length alone.
        config, encoding: the decoder's.
        visit: called at each layer, in order.
        layers: those to visit.

    Raises:
        ProbeError: as ``layer_inputs``.
    """
    _check_softmax(config)  # before the run, whose fused attention would say it in its own way
    pending: list[Tensor] = []

    def hook_k(layer: int) -> Callable[[Tensor], None]:
        def hook(k: Tensor) -> None:
            visit(layer, layer_inputs(config, encoding, layer, pending.pop(), k))
            if layer == layers[-1]:
                raise Enough

        return hook

    hooks = {f"blocks.{layer}.attn.hook_rot_q": pending.append for layer in layers}
    hooks |= {f"blocks.{layer}.attn.hook_rot_k": hook_k(layer) for layer in layers}
    with contextlib.suppress(Enough):
        run(hooks)


def layer_inputs(
    config: DecoderConfig, encoding: PositionEncoding, layer: int, q: Tensor, k: Tensor
) -> AttentionInputs:
    """Those of a decoder's layer, from the values at its sites, "batch pos head d_head".

    Raises:
        ProbeError: for patterns that are no softmax, or that follow from more than queries, keys and distances.
    """
    _check_softmax(config)
    bias, distance = None, torch.arange(q.shape[1])
    if config.sees_position(layer):
        if encoding.reads_content:
            raise ProbeError(f"streaming wants scores of q·k and the distance alone, got {type(encoding).__name__}")
        if isinstance(encoding, RelativeBias):
            bias = encoding.by_distance(distance, q).detach()
        elif encoding.bias(distance[:1], distance[:1], q) is not None:
            raise ProbeError(
                f"streaming wants a bias that depends on the distance alone, got {type(encoding).__name__}"
            )
    window = config.window(layer)
    window = None if window is None or window >= q.shape[1] else window
    return AttentionInputs(q.transpose(1, 2), k.transpose(1, 2), config.score_scale, bias, window)


def _check_softmax(config: DecoderConfig) -> None:
    if not config.is_softmax:
        name = config.attention_function
        raise ProbeError(f"streaming wants patterns that are a softmax of the scores, got attention function {name!r}")
