"""What can be asked of any model: its size, its sites, what its layers are made of and see."""

from torch import nn

from probe.errors import ProbeError
from probe.models.decoder import Decoder
from probe.models.open.ways import as_model
from probe.models.protocol import Layer


def layers_of(model: nn.Module) -> tuple[Layer, ...]:
    """What each layer of a model is: kind, position encoding, heads, window, sink, temperature."""
    return as_model(model).anatomy.layers


def n_layers_of(model: nn.Module) -> int:
    """The number of layers."""
    return len(layers_of(model))


def n_heads_of(model: nn.Module) -> int:
    """The number of heads of the first layer that has some.

    Raises:
        ProbeError: for a model without attention.
    """
    heads = next((layer.n_heads for layer in layers_of(model) if layer.attends), None)
    if heads is None:
        raise ProbeError(f"a model with attention was wanted, got a {type(model).__name__}, which has no heads")
    return heads


def d_model_of(model: nn.Module) -> int:
    """The width of the residual stream."""
    return as_model(model).anatomy.d_model


def d_vocab_of(model: nn.Module) -> int:
    """The number of token ids that it takes."""
    return as_model(model).anatomy.d_vocab


def n_ctx_of(model: nn.Module) -> int | None:
    """The longest sequence that it takes or was made for; None where nothing says."""
    return as_model(model).anatomy.n_ctx


def our_decoder(model: nn.Module) -> Decoder | None:
    """The decoder of ours that a model is, or is a bridge of."""
    inner = as_model(model).owner
    return inner if isinstance(inner, Decoder) else None


def sites_of(model: nn.Module) -> list[str]:
    """The full names of all sites, in the order in which they are computed."""
    return [*as_model(model).anatomy.sites]


def layer_encodings(model: nn.Module) -> list[str]:
    """The name of the position encoding that each layer sees, "none" where it sees none, "unknown" without a name.

    A decoder's config says so; of any other model it is measured. A recurrent layer's is "recurrence".
    """
    return [layer.encoding for layer in layers_of(model)]
