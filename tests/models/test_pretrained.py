import json

import pytest
import torch
from released import CLASSES, REFINED_WEB, configure, edit, make

from probe.errors import ProbeError
from probe.models.families import FAMILIES
from probe.models.pretrained import load_pretrained

BAD_CONFIGS = {
    "llama": [
        ({"hidden_act": "gelu"}, "'hidden_act' must be one of silu, swish, got 'gelu'"),
        ({"hidden_size": "missing"}, "key 'hidden_size' is missing"),
        ({"hidden_size": "wide"}, "'hidden_size' must be an integer of at least 1, got 'wide'"),
        ({"attention_bias": 1}, "'attention_bias' must be true or false, got 1"),
        ({"num_key_value_heads": 3}, r"n_heads \(4\) must be divisible by n_kv_heads \(3\)"),
        ({"sliding_window": 8}, "'sliding_window' must be absent or at least the context of 64 tokens, got 8"),
        ({"layer_types": ["sliding_attention"] * 2}, "'layer_types' must all be 'full_attention'"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'rope_type' must be one of .*, got 'dynamic'"),
        ({"rope_scaling": {"type": "su"}}, "rope_scaling: 'type' must be one of .*, got 'su'"),
        ({"rope_scaling": {"type": "linear"}}, "key 'factor' is missing"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": "8"}}, "'beta_fast' must be"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attention_factor": -2.0}}, "attention_factor"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 2, "high_freq_factor": 4}},
            "'low_freq_factor' must be",
        ),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "'partial_rotary_factor' must be 1 or absent: a Llama"),
        ({"layer_types": 3}, "'layer_types' must all be 'full_attention', got 3"),
        ({"rope_scaling": [1]}, r"'rope_scaling' must be a JSON object, got \[1\]"),
        ({"use_qk_norm": True}, "'use_qk_norm' must be False or absent, got True"),
        ({"quantization_config": {"bits": 4}}, "'quantization_config' must be None or absent"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "'auto_map' must be None or absent"),
        ({"model_type": "none"}, "unknown model_type 'none'; known: .*, bloom, custom_decoder.* and all that"),
        ({"model_type": ["llama"]}, r"unknown model_type \['llama'\]"),
    ],
    "smollm3": [
        ({"use_sliding_window": True, "sliding_window": 8}, "'sliding_window' must be absent or at least"),
        ({"num_key_value_heads": "missing"}, "key 'num_key_value_heads' is missing"),
    ],
    "gpt2": [
        ({"activation_function": "tanh"}, "'activation_function' must be one of gelu, .*, got 'tanh'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "'scale_attn_by_inverse_layer_idx' must be False or absent"),
        ({"add_cross_attention": True}, "'add_cross_attention' must be False or absent"),
    ],
    "gpt_neox": [
        ({"rope_parameters": {"partial_rotary_factor": 0.4}}, "'rotary_pct' must turn an even number of the 8 dim"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "'rope_type' must be one of .*, got 'longrope'"),
    ],
    "bloom": [
        (
            {"apply_residual_connection_post_layernorm": True},
            "connection_post_layernorm' must be False or absent",
        ),
    ],
    "mpt": [
        ({"attn_config": {"alibi": False}}, "attn_config: 'alibi' must be True or absent, got False"),
        ({"attn_config": {"clip_qkv": 6}}, "attn_config: 'clip_qkv' must be None or absent, got 6"),
        ({"attn_config": {"qk_ln": True}}, "'qk_ln' must be False or absent"),
        ({"logit_scale": "inv_sqrt_d_model"}, "'logit_scale' must be None or absent"),
        ({"no_bias": False}, "'no_bias' must be True or absent"),
        ({"norm_type": "rmsnorm"}, "'norm_type' must be one of layernorm, low_precision_layernorm, got 'rmsnorm'"),
    ],
    "opt": [
        ({"do_layer_norm_before": False}, "'do_layer_norm_before' must be True or absent, got False"),
        ({"word_embed_proj_dim": 16}, "'word_embed_proj_dim' must be 32 or absent, got 16"),
        ({"_remove_final_layer_norm": True}, "'_remove_final_layer_norm' must be False or absent, got True"),
        ({"layer_norm_elementwise_affine": False}, "'layer_norm_elementwise_affine' must be True or absent"),
        ({"activation_function": "silu"}, "'activation_function' must be one of gelu, .*, got 'silu'"),
    ],
    "falcon": [
        ({"new_decoder_architecture": True, "parallel_attn": False}, "'parallel_attn' must be True or absent"),
        ({"num_ln_in_parallel_attn": 2}, "'num_ln_in_parallel_attn' must be 1 or absent, got 2"),
        ({"new_decoder_architecture": True, "num_ln_in_parallel_attn": 3}, "attn' must be 1, 2 or absent, got 3"),
        ({"multi_query": False, "num_kv_heads": 2}, "'num_kv_heads' must be 4 or absent, got 2"),
        ({"new_decoder_architecture": True, "num_kv_heads": 3}, r"n_heads \(4\) must be divisible by n_kv_heads \(3\)"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "'partial_rotary_factor' must be 1 or absent: a Falcon"),
        (
            {"apply_residual_connection_post_layernorm": True},
            "'apply_residual_connection_post_layernorm' must be False",
        ),
        ({"alibi": True, "num_attention_heads": 64}, r"d_model \(32\) must be divisible by n_heads \(64\)"),
        ({"activation": "swish"}, "'activation' must be one of gelu, .*, got 'swish'"),
    ],
}


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [(family, *case) for family, cases in BAD_CONFIGS.items() for case in cases],
)
def test_configs_that_cannot_be_done_exactly_are_one_clear_line(family, changes, message, tmp_path):
    make(tmp_path, family)
    configure(tmp_path, **changes)
    with pytest.raises(ProbeError, match=message) as caught:
        load_pretrained(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "config.json")) and "\n" not in str(caught.value)


def test_a_config_that_lies_about_shapes_is_caught(tmp_path):
    make(tmp_path, "llama", {"num_key_value_heads": 2})
    for changes, message in [
        ({"num_key_value_heads": 4}, r"self_attn\.k_proj\.weight' must have shape \(32, 32\), got \(16, 32\)"),
        ({"num_key_value_heads": 2, "head_dim": 16}, r"self_attn\.q_proj\.weight' must have shape \(64, 32\)"),
        ({"head_dim": 8, "num_hidden_layers": 3}, r"key 'model\.layers\.2\.input_layernorm\.weight' is missing"),
        ({"num_hidden_layers": 1}, r"unknown key 'model\.layers\.1\."),
        ({"num_hidden_layers": 2, "attention_bias": True}, r"key 'model\.layers\.0\.self_attn\.q_proj\.bias' is miss"),
        (
            {"attention_bias": False, "vocab_size": 20},
            r"embed_tokens\.weight' must have shape \(20, 32\)",
        ),
        ({"vocab_size": 19, "tie_word_embeddings": True}, r"model\.safetensors: 'lm_head\.weight' must equal the emb"),
    ]:
        configure(tmp_path, **changes)
        with pytest.raises(ProbeError, match=message):
            load_pretrained(tmp_path)
    make(tmp_path, "llama", {"attention_bias": True})
    configure(tmp_path, attention_bias=False)
    with pytest.raises(ProbeError, match=r"unknown key 'model\.layers\.\d\.self_attn\.\w_proj\.bias'"):
        load_pretrained(tmp_path)


def test_weights_that_are_not_what_was_wanted(tmp_path):
    make(tmp_path, "llama")
    norm = "model.norm.weight"
    for change, message in [
        (lambda s: s.update(surprise=torch.zeros(2)), r"model\.safetensors: unknown key 'surprise'"),
        (lambda s: (s.pop("surprise"), s.pop(norm)), r"key 'model\.norm\.weight' is missing"),
        (lambda s: s.update({norm: torch.ones(31)}), r"'model\.norm\.weight' must have shape \(32,\), got \(31,\)"),
        (lambda s: s.update({norm: torch.ones(32, dtype=torch.int32)}), "must be one of F64, F32, F16, BF16, got I32"),
        (lambda s: s.update({norm: torch.ones(32).half()}), "weights of one dtype were wanted.* got F16, F32"),
        (lambda s: s.update({"norm.weight": torch.ones(32)}), "there twice, the other time as"),
        (
            lambda s: (s.pop("norm.weight"), s.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(8)})),
            r"unknown key 'model\.layers\.0\.self_attn\.q_norm\.weight'",
        ),
    ]:
        edit(tmp_path, change)
        with pytest.raises(ProbeError, match=message):
            load_pretrained(tmp_path)
    edit(tmp_path, lambda s: s.pop("model.layers.0.self_attn.q_norm.weight"))
    assert load_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32


def test_folders_and_files_that_are_not_there(tmp_path):
    with pytest.raises(ProbeError, match="nowhere: no such folder$"):
        load_pretrained(tmp_path / "nowhere")
    with pytest.raises(ProbeError, match=r"config\.json: no such file"):
        load_pretrained(tmp_path)
    make(tmp_path, "gpt2")
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    for size in (0, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ProbeError, match=r"model\.safetensors: not a whole safetensors file"):
            load_pretrained(tmp_path)
    path.unlink()
    with pytest.raises(ProbeError, match=r"model\.safetensors: no such file, and no model\.safetensors\.index\.json$"):
        load_pretrained(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ProbeError, match=r"no such file.*, got pytorch_model\.bin: a pickle can run code"):
        load_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").rename(path)
    with pytest.raises(ProbeError, match=r"model\.safetensors: not a whole safetensors file"):
        load_pretrained(tmp_path)


def test_shards_that_are_not_what_the_index_says(tmp_path):
    make(tmp_path, "llama", max_shard_size="10KB")
    index = tmp_path / "model.safetensors.index.json"
    places = json.loads(index.read_text())
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(ProbeError, match=rf"{shard.name}: not a whole safetensors file"):
        load_pretrained(tmp_path)
    shard.unlink()
    with pytest.raises(ProbeError, match=rf"{shard.name}: no such file"):
        load_pretrained(tmp_path)
    shard.write_bytes(whole)
    first = next(key for key, name in places["weight_map"].items() if name != shard.name)
    for change, message in [
        ({first: shard.name}, rf"{shard.name}: key {first!r} is missing, which model\.safetensors\.index\.json says"),
        ({first: "../model.safetensors"}, "must lie in a file of the same folder"),
        ({first: 3}, "'weight_map' must be a JSON object of file names"),
    ]:
        index.write_text(json.dumps(places | {"weight_map": places["weight_map"] | change}))
        with pytest.raises(ProbeError, match=message):
            load_pretrained(tmp_path)


def test_every_family_is_tested():
    assert set(FAMILIES) == {*CLASSES, *REFINED_WEB, "custom_decoder_only_t5", "llama_nope"}
