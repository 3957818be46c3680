"""What is looked at: decoders with any position encoding and clockwork RNNs, on disk and as TransformerLens bridges."""

from probe.models.anatomy import layer_encodings
from probe.models.checkpoint import load, save
from probe.models.clockwork import ClockworkConfig, ClockworkRNN
from probe.models.decoder import Decoder, DecoderConfig, KVCache
from probe.models.encodings import ENCODINGS, PositionEncoding, alibi_slopes, t5_bucket
from probe.models.identity import weights_digest
from probe.models.kinds import build
from probe.models.lens import to_bridge
from probe.models.pretrained import load_pretrained
from probe.models.twins import twin_seed, untrained_like, untrained_twin
from probe.models.variants import variant

__all__ = [
    "ENCODINGS",
    "ClockworkConfig",
    "ClockworkRNN",
    "Decoder",
    "DecoderConfig",
    "KVCache",
    "PositionEncoding",
    "alibi_slopes",
    "build",
    "layer_encodings",
    "load",
    "load_pretrained",
    "save",
    "t5_bucket",
    "to_bridge",
    "twin_seed",
    "untrained_like",
    "untrained_twin",
    "variant",
    "weights_digest",
]
