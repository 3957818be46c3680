"""What the layers of released decoders are, against tables written from their configs."""

import decoder_classes
import pytest
import torch
from decoder_classes import N_LAYERS, build
from decoder_layers import BOTH, LAYERS, MAMBA, NOPE, SLIDING, SLIDING_SINK

from probe.models.open.wrapping import wrap
from probe.models.protocol import layers_in_words


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_are_those_of_the_config(kind):
    assert list(wrap(build(kind)).anatomy.layers) == LAYERS[kind]


@pytest.mark.parametrize("kind", ["llama4_text", "smollm3"])
def test_no_rope_layers_says_1_where_a_layer_is_rotary(kind):
    layers = wrap(build(kind, no_rope_layers=[0, 1, 1, 0])).anatomy.layers
    assert [layer.encoding for layer in layers] == ["none", "rotary", "rotary", "none"]


def test_a_temperature_far_from_the_start_is_found_where_the_config_tunes_it():
    def temperatures(**options):
        return [layer.temperature for layer in wrap(build("llama4_text", **options)).anatomy.layers]

    assert temperatures(floor_scale=64) == [False, False, False, True]  # past the tokens of the trial
    assert temperatures(attn_temperature_tuning=False) == [False] * N_LAYERS


def test_a_window_longer_than_the_trial_is_the_configs():
    layers = wrap(build("cohere2", sliding_window=100)).anatomy.layers
    assert [layer.window for layer in layers] == [100, 100, 100, None]


def test_layers_are_measured_in_half_precision_too():
    for kind in ("cohere2", "granitemoehybrid", "gpt2"):
        layers = wrap(build(kind).to(torch.bfloat16)).anatomy.layers
        assert [layer.encoding for layer in layers] == [layer.encoding for layer in LAYERS[kind]]


def test_sharp_weights_are_not_what_is_measured():
    """As transformers draws them the weights of queries and keys are small, and the layers are the same."""
    config = build("cohere2").config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        plain = decoder_classes.AutoModelForCausalLM.from_config(config).eval()
    assert list(wrap(plain).anatomy.layers) == LAYERS["cohere2"]


def test_layers_in_words():
    words = layers_in_words([SLIDING, SLIDING_SINK, MAMBA, NOPE, NOPE, BOTH])
    assert words == (
        "1 rotary with a window, 1 rotary with a window and a sink, 1 recurrence, 2 without position, "
        "1 attention+recurrence: rotary"
    )
