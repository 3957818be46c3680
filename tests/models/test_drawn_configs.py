"""Configs drawn at random for every family that transformers knows: ours computes what transformers' class does, or
refuses. Every key of the class is drawn, beside keys that it resolves itself: other names, and ropes said twice."""

import json
import random

import pytest
import torch
import transformers
from released import CLASSES, RW, relative
from safetensors.torch import save_file

from probe.errors import ProbeError
from probe.models.open.quiet import quiet_transformers
from probe.models.pretrained import load_pretrained

DRAWN = 24  # configs of a family

# What a key may be; of any other key it is what the class has, another of its kind, or null.
SIZES = (1, 2, 4, 8, 16, 32)
VALUES = {
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_key_value_heads", "num_kv_heads"), (1, 2, 4, 8)),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers"), (1, 2, 3)),
    **dict.fromkeys(("hidden_size", "n_embd", "n_embed", "d_model", "word_embed_proj_dim"), (16, 32)),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"), (16, 48)),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"), (32, 64)),
    **dict.fromkeys(("hidden_act", "activation_function", "activation"), ("relu", "gelu", "gelu_new", "silu", "tanh")),
    **dict.fromkeys(("rope_theta", "rotary_emb_base"), (500.0, 10000.0, 99)),
    **dict.fromkeys(("partial_rotary_factor", "rotary_pct"), (0.25, 0.5, 1.0)),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"), (1e-5, 1e-3)),
    "original_max_position_embeddings": (8, 16, 32),
    "head_dim": (4, 8, 6),
    "sliding_window": (4, 64),
    "vocab_size": (19,),
    "expansion_ratio": (1, 2),
    "num_ln_in_parallel_attn": (1, 2),
    "no_rope_layers": ([1, 0, 1], [0, 0, 1], [1]),
    "no_rope_layer_interval": (1, 2),
    "layer_types": (["full_attention"] * 2, ["sliding_attention", "full_attention"]),
    "norm_type": ("layernorm", "low_precision_layernorm"),
    "logit_scale": (None, 0.5),
}
ROPES = {
    "default": {},
    "linear": {"factor": (2.0, 4.0)},
    "yarn": {
        "factor": (2.0, 4.0, None),
        "original_max_position_embeddings": (8, 16, 32, None),
        "truncate": (True, None),
    }
    | {"beta_fast": (32, 16, None, None), "attention_factor": (None, None, 1.5), "mscale": (None, None, 0.7)}
    | {"mscale_all_dim": (None, None, 0.5)},
    "llama3": {"factor": (8.0,), "low_freq_factor": (1.0,), "high_freq_factor": (4.0,)}
    | {"original_max_position_embeddings": (8, 16, 32, None)},
    "dynamic": {"factor": (2.0,)},
}
# Keys that are no attributes of each class, and that it reads, maps or ignores.
BESIDE = ("original_max_position_embeddings", "rope_theta", "partial_rotary_factor", "rotary_pct", "rotary_emb_base")
BESIDE += ("n_embed", "n_head", "n_layer", "n_ctx", "head_dim", "sliding_window", "layer_types", "num_key_value_heads")
BESIDE += ("hidden_size", "num_attention_heads", "num_hidden_layers", "max_position_embeddings", "seq_length")
ATTENTION = {"softmax_scale": (None, 0.2), "clip_qkv": (None, None, 6.0), "qk_ln": (False, True), "alibi": (True,)}
REQUIRED = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# What no config of a decoder alone says, and what has nothing to do with logits.
NOT_DRAWN = ("dtype", "chunk_size_feed_forward", "is_encoder_decoder", "architectures", "id2label", "label2id")
# With it transformers' Falcon takes its eager attention, which adds ALiBi twice.
NOT_DRAWN += ("output_attentions", "return_dict")


def rope(rng):
    kind = rng.choice(["default", "linear", "yarn", "yarn", "llama3", "llama3", "dynamic"])
    values = {name: rng.choice(choices) for name, choices in ROPES[kind].items()}
    values |= {rng.choice(["rope_type", "rope_type", "type"]): kind}
    for name in ("rope_theta", "partial_rotary_factor"):
        if rng.random() < 0.3:
            values[name] = rng.choice(VALUES[name])
    nulls = rng.random() < 0.2  # said to be null, and not left away
    return {name: value for name, value in values.items() if nulls or value is not None}


def draw(family, rng):
    """A config of a family: its smallest, with some keys changed, put beside others, or taken away."""
    config_class, _, small = CLASSES[family]
    values = {"model_type": family} | small
    if family == "falcon" and rng.random() < 0.4:
        values |= RW
    values.pop("attn_implementation", None)
    known = {name: value for name, value in config_class().to_dict().items() if name not in NOT_DRAWN}
    names = [*known, *config_class.attribute_map, *BESIDE]
    for name in rng.sample(names, rng.choice((0, 1, 1, 2, 3))):
        usual = known.get(name)
        if name in VALUES:
            values[name] = rng.choice(VALUES[name])
        elif isinstance(usual, bool):
            values[name] = not usual
        elif rng.random() < 0.5:
            values[name] = None
        else:
            values.pop(name, None)
    if "rope_parameters" in known:
        if rng.random() < 0.8:
            values[rng.choice(["rope_parameters", "rope_scaling"])] = rope(rng)
        if rng.random() < 0.5:
            values["original_max_position_embeddings"] = rng.choice(VALUES["original_max_position_embeddings"])
    if family == "mpt" and rng.random() < 0.5:
        values["attn_config"] = {name: rng.choice(choices) for name, choices in ATTENTION.items()}
    return values


def theirs(values):
    """Transformers' model of such a config with random weights, or None where it refuses it or can't run it."""
    implementation = "sdpa" if values.get("alibi") else "eager"
    try:
        kind = transformers.CONFIG_MAPPING[values["model_type"]]
        config = kind.from_dict(json.loads(json.dumps(values)))
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
    except Exception:
        return None
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(noise / 4 if parameter.ndim > 1 else parameter + noise / 4)
    return model


TOKENS = torch.randint(19, (2, 30), generator=torch.Generator().manual_seed(0))


def release(folder, values, model):
    """The files of that model, with this very config."""
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    state = {k: v.contiguous() for k, v in model.state_dict().items() if not (tied and k == "lm_head.weight")}
    (folder / "config.json").write_text(json.dumps(values))
    save_file(state, folder / "model.safetensors")


@torch.no_grad()
@pytest.mark.parametrize("family", CLASSES)
def test_logits_of_drawn_configs_are_those_of_transformers_or_it_is_refused(family, tmp_path):
    rng, outcomes = random.Random(family), []
    for _ in range(DRAWN):
        values = draw(family, rng)
        with quiet_transformers():
            model = theirs(values)
        if model is None:
            continue
        release(tmp_path, values, model)
        try:
            decoder = load_pretrained(tmp_path, device="cpu")
        except ProbeError as error:
            outcomes.append(str(error).removeprefix(str(tmp_path)))
            continue
        assert relative(decoder(TOKENS), model(TOKENS, use_cache=False, return_dict=True).logits) < 1e-4, json.dumps(
            values
        )
        outcomes.append("equal")
    assert outcomes.count("equal") >= DRAWN / 4, outcomes


@torch.no_grad()
@pytest.mark.parametrize("kind", ["yarn", "llama3"])
@pytest.mark.parametrize("family", ["llama", "smollm3", "gpt_neox", "falcon"])
def test_the_trained_length_beside_the_rope_counts(family, kind, tmp_path):
    scaling = {name: choices[0] for name, choices in ROPES[kind].items() if name in REQUIRED}
    shape = CLASSES[family][2] | {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2}
    values = {"model_type": family} | shape | {"rope_scaling": {"rope_type": kind, "rope_theta": 500.0} | scaling}
    with_both = values | {"original_max_position_embeddings": 32}
    one, both = theirs(values), theirs(with_both)
    release(tmp_path, with_both, both)
    want = both(TOKENS).logits
    assert relative(one(TOKENS).logits, want) > 0.1  # the length matters
    assert relative(load_pretrained(tmp_path, device="cpu")(TOKENS), want) < 1e-4


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        (
            "gpt2",
            {"n_head": 4, "num_attention_heads": 2},
            "'n_head' and 'num_attention_heads' mean the same and must be",
        ),
        ("bloom", {"n_head": 4, "num_attention_heads": 2}, "must be equal, got 4 and 2"),
        ("bloom", {"n_embed": 16}, "'n_embed' and 'hidden_size' mean the same"),
        ("mpt", {"num_hidden_layers": 1}, "'n_layers' and 'num_hidden_layers' mean the same"),
        ("falcon", {"n_head": 2}, "'num_attention_heads' and 'n_head' mean the same"),
        ("llama", {"rope_scaling": {"full_attention": {"factor": 2.0}}}, "'full_attention' must be one value for all"),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": None}}, "'truncate' must be True"),
    ],
)
def test_what_a_config_says_twice_or_elsewhere_is_refused(family, changes, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family} | CLASSES[family][2] | changes))
    with pytest.raises(ProbeError, match=message):
        load_pretrained(tmp_path)
