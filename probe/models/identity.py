"""Which model it is: a digest of its config and weights, wherever it lies and whatever it is called."""

import hashlib
import json
from typing import Any

import torch
from torch import nn

from probe.models.kinds import OwnModel
from probe.models.open.ways import as_model

# What the config of a Hugging Face model says of where the model came from, and not of what it computes.
_ORIGIN = ("_name_or_path", "name_or_path", "transformers_version", "_commit_hash", "architectures")


def weights_digest(model: nn.Module, *, with_dtype: bool = True) -> str:
    """The SHA-256 of a model's config and weights, as 64 hexadecimal digits.

    It is made of the config and, in the order in which the model holds them, of each parameter's shape, dtype and
    values, rounded to float32. A decoder and a bridge of it have the same digest, since a bridge renames parameters and
    keeps their order. The device changes nothing.

    Args:
        model: any model that measurements take.
        with_dtype: whether the dtype counts. Without it a model has the same digest in float32 and in float64.

    Example:
        >>> config = probe.DecoderConfig(d_vocab=11, n_ctx=16, n_layers=1, d_model=8, n_heads=2)
        >>> weights_digest(probe.Decoder(config, seed=0)) == weights_digest(probe.Decoder(config, seed=1))
        False
    """
    weights = as_model(model).owner
    digest = hashlib.sha256(_config(weights).encode())
    for parameter in weights.parameters():
        digest.update(f"{tuple(parameter.shape)} {parameter.dtype if with_dtype else ''}".encode())
        digest.update(parameter.detach().float().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _config(model: nn.Module) -> str:
    if isinstance(model, OwnModel):
        return model.config.to_json()
    config: Any = getattr(model, "config", None)
    said = config.to_dict() if hasattr(config, "to_dict") else {}
    kept = {name: value for name, value in said.items() if name not in _ORIGIN}
    return f"{type(model).__name__} {json.dumps(kept, sort_keys=True, default=str)}"
