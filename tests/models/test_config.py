import copy
import json
import math

import pytest

from probe.errors import ProbeError
from probe.models.config import DecoderConfig
from probe.models.encodings import ENCODINGS

OPTIONS = {
    "t5": {"max_distance": 99},
    "rotary": {"fraction": 0.5},
    "kerple": {"kernel": "power"},
    "randomized": {"base": "rotary", "base_options": {"fraction": 0.5}, "max_position": 99},
}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_config_goes_through_json(encoding):
    config = DecoderConfig(
        d_vocab=7,
        n_ctx=9,
        n_layers=2,
        d_model=8,
        n_heads=2,
        encoding=encoding,
        encoding_options=OPTIONS.get(encoding, {}),
        position_layers=None if encoding in ("learned", "sinusoidal") else (1,),
    )
    assert DecoderConfig.from_json(config.to_json()) == config
    assert copy.deepcopy(config) == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_layers": 0}, "n_layers must be an integer of at least 1, got 0"),
        ({"d_model": -4}, "d_model must be an integer of at least 1, got -4"),
        ({"n_heads": 3}, r"d_model \(8\) must be divisible by n_heads \(3\)"),
        ({"n_heads": 2, "n_kv_heads": 3}, r"n_heads \(2\) must be divisible by n_kv_heads \(3\)"),
        ({"d_vocab": True}, "d_vocab must be an integer of at least 1, got True"),
        ({"encoding": "rope"}, "unknown encoding 'rope'; known: alibi"),
        ({"activation": "tanh"}, "unknown activation 'tanh'; known: gelu, gelu_tanh, relu, swiglu"),
        ({"normalization": "batch"}, "unknown normalization 'batch'; known: layer, none, rms"),
        ({"bias": ("norms",)}, r"bias must be true, false or a list of parts out of norm, .* got \('norms',\)"),
        ({"dropout": 1.0}, "dropout must be a number at least 0 and below 1, got 1.0"),
        ({"score_scale": 0}, "score_scale must be a number above 0, got 0"),
        ({"norm_eps": math.nan}, "norm_eps must be a number above 0, got nan"),
        ({"encoding": "rotary", "position_layers": (2,)}, "position_layers must be layers in 0…1"),
        ({"encoding": "learned", "position_layers": (1,)}, "wants an encoding that acts in attention, got 'learned'"),
    ],
)
def test_bad_configs_are_one_clear_line(options, message):
    with pytest.raises(ProbeError, match=message):
        DecoderConfig(**({"d_vocab": 7, "n_ctx": 9, "n_layers": 2, "d_model": 8, "n_heads": 2} | options))


def test_what_came_later_is_written_only_where_it_is_not_the_default():
    size = {"d_vocab": 7, "n_ctx": 9, "n_layers": 2, "d_model": 8, "n_heads": 2}
    written = json.loads(DecoderConfig(**size).to_json())
    assert not {"attention_function", "attention_options", "parallel", "embedding_norm"} & set(written)
    assert written["bias"] is True
    for changes in ({"parallel": True}, {"embedding_norm": True}, {"bias": ("mlp", "norm")}, {"bias": ("qkv",)}):
        config = DecoderConfig(**size, **changes)
        assert len(json.loads(config.to_json())) == len(written) + ("bias" not in changes)
        assert DecoderConfig.from_json(config.to_json()) == config
    assert DecoderConfig(**size, bias=("mlp", "norm")) == DecoderConfig(**size, bias=("norm", "mlp"))
    assert DecoderConfig(**size, bias=("norm", "qkv", "attn_out", "mlp")) == DecoderConfig(**size)
    assert DecoderConfig(**size, bias=()) == DecoderConfig(**size, bias=False)


def test_unknown_and_missing_keys_are_refused():
    with pytest.raises(ProbeError, match="unknown option of a decoder's config 'heads'"):
        DecoderConfig.from_dict({"d_vocab": 7, "n_ctx": 9, "n_layers": 2, "d_model": 8, "n_heads": 2, "heads": 1})
    with pytest.raises(ProbeError, match="wants 'n_heads', which is missing"):
        DecoderConfig.from_dict({"d_vocab": 7, "n_ctx": 9, "n_layers": 2, "d_model": 8})
    with pytest.raises(ProbeError, match="must be a JSON object, got list"):
        DecoderConfig.from_json("[]")
