"""What is looked at: decoders with any position encoding, on disk and as TransformerLens bridges."""

from probe.models.checkpoint import load, save
from probe.models.decoder import Decoder, DecoderConfig, KVCache
from probe.models.encodings import ENCODINGS, PositionEncoding, alibi_slopes, t5_bucket
from probe.models.lens import to_bridge

__all__ = [
    "ENCODINGS",
    "Decoder",
    "DecoderConfig",
    "KVCache",
    "PositionEncoding",
    "alibi_slopes",
    "load",
    "save",
    "t5_bucket",
    "to_bridge",
]
