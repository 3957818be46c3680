"""Kinds of models whose TransformerBridges are exact, and kinds whose are not, with the reason."""

from released import GPT2, LLAMA

GROUPED = LLAMA | {"num_key_value_heads": 2}
HEADS = GROUPED | {"head_dim": 8}
WINDOWED = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}

# By kind, whose bridges are exact, a config on which its class is drawn at random.
OPTIONS = {
    "qwen2": GROUPED,
    "qwen3": HEADS,
    "mistral": GROUPED | {"sliding_window": 6},
    "gemma": HEADS,
    "gemma2": HEADS | WINDOWED,
    "gemma3_text": HEADS | WINDOWED,
    "phi": LLAMA,
    "phi3": GROUPED,
    "stablelm": GROUPED,
    "olmo": GROUPED,
    "olmo2": GROUPED,
    "starcoder2": GROUPED | {"sliding_window": None},
    "gpt_bigcode": GPT2,
    "granite": GROUPED,
    "cohere": GROUPED,
    "cohere2": GROUPED | WINDOWED,
    "nemotron": GROUPED,
    "glm": HEADS,
}
REFUSED = {
    "gptj": (GPT2 | {"rotary_dim": 4}, "the softmax of layer 0's scores and its pattern must agree"),
    "gpt_neo": (
        {"vocab_size": 19, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64}
        | {"attention_types": [[["global", "local"], 1]], "window_size": 4},
        "the softmax of layer 0's scores and its pattern must agree",
    ),
    "xglm": (
        {"vocab_size": 19, "d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4},
        "the softmax of layer 0's scores and its pattern must agree",
    ),
    "codegen": (GPT2 | {"rotary_dim": 4}, "the bridge does not run: AttributeError"),
    "mamba": ({"vocab_size": 19, "hidden_size": 32, "num_hidden_layers": 2}, "gives no attention patterns"),
}
