"""Which model it is: a digest of its config and weights, wherever it lies and whatever it is called."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from probe.models.kinds import OwnModel
from probe.models.open.ways import as_model

# What the config of a Hugging Face model says of where the model came from, and not of what it computes.
_ORIGIN = ("_name_or_path", "name_or_path", "transformers_version", "_commit_hash", "architectures")
# What it says of the dtype; an older version of transformers has the longer name.
_DTYPE = ("dtype", "torch_dtype")


def weights_digest(model: nn.Module, *, with_dtype: bool = True) -> str:
    """The SHA-256 of a model's config and weights, as 64 hexadecimal digits.

    It is made of the config and, in the order in which the model holds them, of the shape, dtype and values of each
    parameter and then of each buffer that a checkpoint of the model holds, rounded to float32. Tied weights count once.
    A decoder and a bridge of it have the same digest, since a bridge renames parameters and keeps their order. The
    device changes nothing.

    Args:
        model: any model that measurements take.
        with_dtype: whether the dtype counts. Without it a model has the same digest in float32 and in float64.

    Example:
        >>> config = probe.DecoderConfig(d_vocab=11, n_ctx=16, n_layers=1, d_model=8, n_heads=2)
        >>> weights_digest(probe.Decoder(config, seed=0)) == weights_digest(probe.Decoder(config, seed=1))
        False
    """
    weights = as_model(model).owner
    digest = hashlib.sha256(_config(weights, with_dtype).encode())
    for tensor in (*weights.parameters(), *_kept_buffers(weights)):
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype if with_dtype else ''}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _kept_buffers(model: nn.Module) -> list[Tensor]:
    """The buffers that a checkpoint holds, each once, but those that are zero: TransformerLens adds such a bias where a
    layer has none.

    A buffer may be learned, by a rule other than gradient descent: so is the bias of experts in DeepSeek-V3.
    """
    buffers = {
        id(buffer): buffer
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }
    return [buffer for buffer in buffers.values() if buffer.count_nonzero()]


def _config(model: nn.Module, with_dtype: bool) -> str:
    if isinstance(model, OwnModel):
        return model.config.to_json()
    config: Any = getattr(model, "config", None)
    said = config.to_dict() if hasattr(config, "to_dict") else {}
    left_out = _ORIGIN if with_dtype else (*_ORIGIN, *_DTYPE)
    return f"{type(model).__name__} {json.dumps(_without(said, left_out), sort_keys=True, default=str)}"


def _without(value: Any, names: Sequence[str]) -> Any:
    """A config without these names, nor those of the configs in it."""
    if not isinstance(value, dict):
        return value
    return {name: _without(each, names) for name, each in value.items() if name not in names}
