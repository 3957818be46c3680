"""What the layers of the decoders in ``decoder_classes`` are, written from their configs."""

from decoder_classes import N_LAYERS, WINDOW

from probe.models.protocol import ATTENTION, CONVOLUTION, LINEAR, NO_MIXING, RECURRENCE, Layer


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
