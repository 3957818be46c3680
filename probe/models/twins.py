"""Untrained twins: the control that shows what a model's architecture gives without training.

Every measurement and every command takes its twin from ``untrained_twin``, so one model has the same twin, and the same
numbers of it, wherever it is measured with the same seed.
"""

import hashlib

from torch import nn

from probe.models.identity import weights_digest
from probe.models.open.ways import as_model


def untrained_twin(model: nn.Module, seed: int = 0) -> nn.Module:
    """A model of the same architecture with fresh weights, on the same device and of the same dtype.

    Its weights are drawn with ``twin_seed``, so they depend on the model and not on the command that asks, nor on the
    models that are measured beside it. Two models of one shape, or two trainings of one model, have different twins:
    twins with equal weights would resemble each other head by head, and a comparison of their attention would take that
    for a finding.

    Args:
        model: any model that measurements take.
        seed: of the measurement, at least 0.

    Raises:
        ProbeError: for a model whose architecture nobody can draw.

    Example:
        >>> decoder = probe.Decoder(probe.DecoderConfig(d_vocab=11, n_ctx=16, n_layers=1, d_model=8, n_heads=2))
        >>> twin = untrained_twin(decoder, seed=1)
        >>> twin.config == decoder.config
        True
    """
    return untrained_like(model, twin_seed(model, seed))


def twin_seed(model: nn.Module, seed: int = 0) -> int:
    """The seed of the weights of a model's untrained twin, from 0 to 2³¹ − 1.

    It is made of ``weights_digest`` without the dtype and of the measurement's seed, so a decoder and a bridge of it
    have the same, on every device, in float32 and in float64.

    Args:
        model: the model whose twin is wanted.
        seed: of the measurement, at least 0.
    """
    digest = hashlib.sha256(f"{weights_digest(model, with_dtype=False)} seed {seed}".encode())
    return int.from_bytes(digest.digest()[:8]) % 2**31


def untrained_like(model: nn.Module, seed: int) -> nn.Module:
    """A model of the same architecture, on the same device and of the same dtype, with fresh weights of that seed.

    One of ours gets the weights from which a training with that seed starts. A model of transformers gets those that
    transformers draws. Take ``untrained_twin`` for the control of a measurement: it chooses the seed.

    Args:
        model: any model that measurements take.
        seed: of the weights, at least 0.

    Raises:
        ProbeError: for a model whose architecture nobody can draw.
    """
    return as_model(model).untrained(seed)
