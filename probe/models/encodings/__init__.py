"""Position encodings. The base class does nothing, and that is NoPE.

A decoder asks its encoding a few things, and each encoding overrides what it needs:

- ``embed``: what is added to the token embeddings (learned, sinusoidal);
- ``rotation`` and ``decay``: how queries and keys are turned and faded (rotary, xPos);
- ``bias``: what is added to the attention scores before the softmax (T5, ALiBi, KERPLE, Sandwich, FIRE);
- ``content_bias``: the same where it depends on queries and keys (Transformer-XL, CoPE);
- ``positions``: the positions themselves, where they are not 0, 1, 2, … (randomized).

Positions are 0-based: ``<bos>`` stands at position 0. A distance is ``query - key``, so it is >= 0 wherever a causal
decoder looks. To add an encoding: write the class and add it at the end of ``ENCODINGS``; the seeds of a study go by
the places there.
"""

from typing import Any

from probe.models.encodings.absolute import Learned, Sinusoidal
from probe.models.encodings.base import PositionEncoding, Rotation, build
from probe.models.encodings.bias import (
    T5,
    Alibi,
    AlibiKeys,
    AlibiLearned,
    Fire,
    Kerple,
    RelativeBias,
    Sandwich,
    alibi_slopes,
    t5_bucket,
)
from probe.models.encodings.content import Cope, TransformerXL
from probe.models.encodings.randomized import POSITIONAL, Randomized
from probe.models.encodings.rotation import Rotary, XPos, rotate

__all__ = [
    "ENCODINGS",
    "T5",
    "Alibi",
    "AlibiKeys",
    "AlibiLearned",
    "Cope",
    "Fire",
    "Kerple",
    "Learned",
    "PositionEncoding",
    "Randomized",
    "RelativeBias",
    "Rotary",
    "Rotation",
    "Sandwich",
    "Sinusoidal",
    "TransformerXL",
    "XPos",
    "alibi_slopes",
    "make_encoding",
    "rotate",
    "t5_bucket",
]


def make_encoding(name: str, options: dict[str, Any], **dimensions: int) -> PositionEncoding:
    """The encoding of that name, for ``d_model, n_heads, d_head, n_ctx, n_layers``.

    Raises:
        ProbeError: for an unknown name or option, or an impossible value.
    """
    return build(ENCODINGS, "encoding", name, options, **dimensions)


#: Every position encoding by its name. New ones stand at the end: the seeds of a study go by the places here.
ENCODINGS: dict[str, type[PositionEncoding]] = {
    "none": PositionEncoding,
    **POSITIONAL,
    "cope": Cope,
    "randomized": Randomized,
    "alibi_keys": AlibiKeys,
}
