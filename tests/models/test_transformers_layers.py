"""What the layers of released decoders are, against tables written from their configs."""

import decoder_classes
import pytest
import torch
from decoder_classes import N_LAYERS, WINDOW, build

from probe.models.open.wrapping import wrap
from probe.models.protocol import (
    ATTENTION,
    CONVOLUTION,
    LINEAR,
    NO_MIXING,
    RECURRENCE,
    Layer,
    layers_in_words,
)


def attends(encoding, **more):
    return Layer(ATTENTION, encoding, 4, **more)


ROTARY, NOPE, LEARNED = attends("rotary"), attends("none"), attends("learned")
SLIDING = attends("rotary", window=WINDOW)
SINK, SLIDING_SINK = attends("rotary", sink=True), attends("rotary", window=WINDOW, sink=True)
MAMBA, DELTA, CONV = Layer(RECURRENCE, RECURRENCE), Layer(LINEAR, "none"), Layer(CONVOLUTION, "none")
BOTH = Layer(f"{ATTENTION}+{RECURRENCE}", "rotary", 4)

# By kind of model, its layers: what the config that decoder_classes makes says.
LAYERS = {
    # full and sliding layers, and layers without position
    "afmoe": [SLIDING, SLIDING, SLIDING, NOPE],
    "beam": [SLIDING, SLIDING, SLIDING, attends("none", temperature=True)],
    "cohere2": [SLIDING, SLIDING, SLIDING, NOPE],
    "cohere2_moe": [SLIDING, SLIDING, SLIDING, NOPE],
    "exaone4": [SLIDING, SLIDING, SLIDING, NOPE],
    "exaone_moe": [SLIDING, SLIDING, SLIDING, NOPE],
    "gemma2": [SLIDING, ROTARY, SLIDING, ROTARY],
    "gemma3_text": [SLIDING, SLIDING, SLIDING, SLIDING, SLIDING, ROTARY],
    "gemma4_text": [SLIDING, SLIDING, SLIDING, SLIDING, SLIDING, ROTARY],
    "llama4_text": [ROTARY, ROTARY, ROTARY, attends("none", temperature=True)],
    "olmo3": [SLIDING, SLIDING, SLIDING, ROTARY],
    "smollm3": [ROTARY, ROTARY, ROTARY, NOPE],
    "mistral": [SLIDING] * N_LAYERS,
    # learned sinks
    "gpt_oss": [SLIDING_SINK, SINK, SLIDING_SINK, SINK],
    "granite_swa": [SLIDING_SINK] * 3 + [attends("none", sink=True)],
    "granitemoe_swa": [SLIDING_SINK] * 3 + [attends("none", sink=True)],
    "mimo_v2_flash": [ROTARY, SLIDING_SINK, SLIDING_SINK, SLIDING_SINK],
    # layers without attention
    "bamba": [MAMBA, ROTARY, MAMBA, ROTARY],
    "falcon_h1": [BOTH] * N_LAYERS,
    "granitemoehybrid": [MAMBA, NOPE, MAMBA, NOPE],
    "jamba": [MAMBA, NOPE, MAMBA, MAMBA, MAMBA, NOPE, MAMBA, MAMBA],
    "kimi_linear": [DELTA, DELTA, DELTA, NOPE],
    "lfm2": [CONV, ROTARY, CONV, ROTARY],
    "minimax": [DELTA, SLIDING, DELTA, SLIDING],
    "nemotron_h": [MAMBA, NOPE, Layer(NO_MIXING, "none"), NOPE],
    "olmo_hybrid": [DELTA, DELTA, DELTA, ROTARY],
    "qwen3_next": [DELTA, DELTA, DELTA, ROTARY],
    "recurrent_gemma": [MAMBA, MAMBA, SLIDING, MAMBA],
    # one kind of layer
    "deepseek_v2": [ROTARY] * N_LAYERS,
    "deepseek_v3": [ROTARY] * N_LAYERS,
    "diffllama": [ROTARY] * N_LAYERS,
    "gpt2": [LEARNED] * N_LAYERS,
    "hunyuan_v1_dense": [ROTARY] * N_LAYERS,
    "inkling_text": [attends("relative bias", window=WINDOW)] * N_LAYERS,
    "olmo2": [ROTARY] * N_LAYERS,
    "opt": [LEARNED] * N_LAYERS,
    "qwen2": [ROTARY] * N_LAYERS,
}


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
