"""Tiny random decoders of every class that the installed transformers has, to be looked at in tests.

``kinds()`` are the model types, ``build(kind)`` makes one. A config is given those of ``SIZES`` that it has fields for,
and what ``OVERRIDES`` says of its kind: which layers mix tokens how, and which of them see position or a window.
"""

import contextlib
import functools
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from probe.models.open.quiet import quiet_transformers

N_VOCAB, N_LAYERS, WINDOW, N_EXPERTS = 128, 4, 8, 4
MOST_WEIGHTS = 5 * 10**6

# By group, what a field is set to in any config that has it.
GROUPS: dict[str, dict[str, Any]] = {
    "stream": {
        **{"vocab_size": N_VOCAB, "unpadded_vocab_size": N_VOCAB, "hidden_size": 64, "intermediate_size": 128},
        **{"num_hidden_layers": N_LAYERS},
        **{"max_position_embeddings": 256, "n_positions": 256, "ffn_dim": 128, "num_layers": N_LAYERS},
        **{"embedding_size": 64, "word_embed_proj_dim": 64, "ffn_hidden_size": 128, "dim_ff": 128},
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    },
    "heads": {
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "attention_heads": 4, "num_heads": 4},
        **{"n_heads": 4, "dim_head": 16, "rotary_dim": 8, "query_pre_attn_scalar": 16, "global_head_dim": 16},
        **{"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16, "attention_head_dim": 16},
    },
    "windows": {"sliding_window": WINDOW, "sliding_window_size": WINDOW, "window_size": WINDOW}
    | {"attention_window_size": WINDOW, "keep_window_size": 64},
    "mixture of experts": {
        **{"num_experts": N_EXPERTS, "num_local_experts": N_EXPERTS, "n_routed_experts": N_EXPERTS},
        **{"moe_num_experts": N_EXPERTS, "num_experts_per_tok": 2, "top_k_experts": 2, "moe_intermediate_size": 32},
        **{"shared_expert_intermediate_size": 32, "shared_intermediate_size": 64, "intermediate_size_mlp": 64},
        **{"moe_shared_expert_intermediate_size": 32, "expert_ffn_hidden_size": 32, "dense_intermediate_size": 64},
        **{"prefix_dense_intermediate_size": 64, "n_shared_experts": 1, "num_shared_experts": 1, "n_group": 1},
        **{"topk_group": 1, "first_k_dense_replace": 1, "num_dense_layers": 1, "interleave_moe_layer_step": 2},
        **{"expert_layer_period": 2, "zero_expert_num": 1, "moe_num_shared_experts": 1, "router_hidden_size": 16},
        **{"shared_experts_intermediate_size": 32},
    },
    "latent attention": {"q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
    | {"v_head_dim": 16, "o_groups": 2, "o_lora_rank": 16, "gated_norm_rank": 8},
    "index of keys": {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 64, "index_block_size": 8}
    | {"index_topk_blocks": 4, "index_local_blocks": 1, "indexer_n_heads": 2, "indexer_head_dim": 16},
    "state space": {
        **{"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_d_conv": 4},
        **{"mamba_expand": 2, "mamba_chunk_size": 16, "mamba_d_ssm": 128, "mamba_num_heads": 8, "mamba_head_dim": 16},
        **{"ssm_state_size": 16, "state_size": 16, "n_groups": 1, "chunk_size": 16, "conv_kernel": 4, "expand": 2},
        **{"n_mamba_heads": 8, "mamba_ngroups": 1, "time_step_rank": 8, "use_mamba_kernels": False, "lru_width": 64},
        **{"mamba_dt_rank": 8, "adapter_rank": 8, "num_mem_blocks": 1},
    },
    "linear attention": {
        **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_num_heads": 4},
        **{"linear_value_head_dim": 16, "linear_head_dim": 16, "linear_conv_kernel_dim": 4, "block_size": 16},
        **{"short_conv_kernel_size": 4},
    },
    "additions to a layer": {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": N_VOCAB}
    | {"laurel_rank": 8, "altup_num_inputs": 2, "num_kv_shared_layers": 0, "d_rel": 4, "rel_extent": 16},
}
SIZES = functools.reduce(dict.__or__, GROUPS.values())

_SLIDING, _FULL, _LINEAR = "sliding_attention", "full_attention", "linear_attention"
_LAST_FULL = {"layer_types": [_SLIDING, _SLIDING, _SLIDING, _FULL]}
_EVERY_SECOND_FULL = {"layer_types": [_SLIDING, _FULL, _SLIDING, _FULL]}
_EVERY_SECOND_LINEAR = {"layer_types": [_LINEAR, _FULL, _LINEAR, _FULL]}
_EVERY_SECOND_CONVOLUTION = {"layer_types": ["conv", _FULL] * 2, "block_dim": 64}
_LAST_LAYER_WITHOUT_POSITION = {"layer_rope_theta": [10000.0, 10000.0, 10000.0, 0]}
_LATENT = {"num_key_value_heads": 4, "head_dim": 8}  # as many keys as queries, and the size of the turned part

# By kind, what else is set.
OVERRIDES: dict[str, dict[str, Any]] = {
    # sliding windows in some layers
    "afmoe": _LAST_FULL,
    "beam": _LAST_FULL,
    "cohere2": _LAST_FULL,
    "cohere2_moe": _LAST_FULL,
    "cwm": {"layer_types": [_FULL, _SLIDING, _SLIDING, _SLIDING]},
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1} | _LAST_FULL,
    "exaone4": _LAST_FULL | {"sliding_window_pattern": "LLLG"},
    "exaone_moe": _LAST_FULL,
    "flint": {"layer_types": [_FULL, _FULL, _SLIDING, _FULL], "mlp_only_layers": [0, 1]},
    "gemma3_text": {"num_hidden_layers": 6},
    "gemma3n_text": {"num_hidden_layers": 5, "activation_sparsity_pattern": None},
    "gemma4_text": {"num_hidden_layers": 6, "hidden_size_per_layer_input": 0},
    "gemma4_unified_text": {"num_hidden_layers": 6},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gpt_oss": _EVERY_SECOND_FULL,
    "granite_swa": _LAST_FULL | _LAST_LAYER_WITHOUT_POSITION,
    "granitemoe_swa": _LAST_FULL | _LAST_LAYER_WITHOUT_POSITION,
    "kolibri1": _LAST_FULL,
    "ministral": _EVERY_SECOND_FULL,
    # layers without position, and a temperature
    "llama4_text": {"attention_chunk_size": 64, "floor_scale": 8, "attn_scale": 0.1, "attn_temperature_tuning": True},
    "smollm3": {"no_rope_layer_interval": 4},
    "cohere_compass_text": {"rope_parameters": {_FULL: {"rope_type": "default", "rope_theta": 10000.0}}},
    # latent attention
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"), _LATENT),
    **dict.fromkeys(("dots3_note_text", "glm_moe_dsa", "minicpm3", "sarvam_mla", "youtu"), _LATENT),
    "longcat_flash": _LATENT | {"num_layers": 2},
    "kimi_linear": {"num_key_value_heads": 4, "layer_types": [_LINEAR, _LINEAR, _LINEAR, _FULL]},
    # recurrence and convolution
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "qwen4_exp_text": {"indexer_kv_heads": 1, "indexer_budget": 64, "indexer_compress_ratio": 4},
    "zamba": {"attention_head_dim": 32, "layers_block_type": [_LINEAR, _LINEAR, "hybrid", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
    "bamba": {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, "position_embedding_type": "nope"},
    "jamba": {"num_hidden_layers": 8, "attn_layer_period": 4, "attn_layer_offset": 1},
    "lfm2": _EVERY_SECOND_CONVOLUTION,
    "lfm2_moe": _EVERY_SECOND_CONVOLUTION,
    "minimax": _EVERY_SECOND_LINEAR,
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "mlp", "attention"]},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2, "hybrid_layer_ids": [1, 3], "use_mem_rope": True},
}

# Kinds with another config, by a name "kind+what it is".
VARIANTS: dict[str, dict[str, Any]] = {
    "granitemoehybrid+attention": {"layer_types": ["attention"] * 4, "num_local_experts": 0},
    "phi3+longrope": {
        "original_max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64}
        | {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "factor": 4.0},
    },
}


def kinds() -> list[str]:
    """The model types that have a causal language model of text, apart from those of encoders."""
    found = []
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        config = CONFIG_MAPPING[kind]
        fields = _fields(config)
        if "vocab_size" in fields and not ({"vision_config", "audio_config", "encoder_layers"} & fields):
            encoder = getattr(config, "is_decoder", None) is False and kind not in ("gpt_neox", "gpt_neox_japanese")
            if not encoder:
                found.append(kind)
    return sorted({*found} & {*CONFIG_MAPPING}) + sorted(VARIANTS)


def build(name: str, *, seed: int = 0, **options: Any) -> PreTrainedModel:
    """A random decoder in evaluation mode.

    Args:
        name: a model type, or one of ``VARIANTS``.
        seed: of its weights; those of queries and keys are large, so that attention is far from uniform.
        options: further fields of its config.
    """
    kind = name.split("+")[0]
    config_class: Any = CONFIG_MAPPING[kind]
    fields = _fields(config_class)
    values = {field: value for field, value in SIZES.items() if field in fields}
    values |= OVERRIDES.get(kind, {}) | VARIANTS.get(name, {}) | options
    config = config_class(**values)
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        with torch.device("meta"):
            n = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
        if n > MOST_WEIGHTS:
            raise ValueError(f"a {kind} must have at most {MOST_WEIGHTS} weights, got {n}: a size is missing in SIZES")
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        _sharpen(model)
    return model


def tokens_of(model: PreTrainedModel, batch: int = 2, length: int = 24, seed: int = 1) -> torch.Tensor:
    """Random ids that a model knows, without the special ones."""
    n_vocab = model.get_input_embeddings().num_embeddings
    return torch.randint(3, n_vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def _sharpen(model: PreTrainedModel) -> None:
    """Larger weights of queries and keys; no norm, bias, sink or decay that is the same everywhere."""
    for name, weight in model.named_parameters():
        if weight.ndim > 1 and any(part in name for part in ("q_", "k_", "qkv", "query", "key", "c_attn", "kv_")):
            weight.mul_(6)
        elif weight.ndim == 1 and weight.is_floating_point() and ("norm" in name or "bias" in name or "sink" in name):
            weight.add_(torch.randn_like(weight) / 8)


def _fields(config: Any) -> set[str]:
    with contextlib.suppress(AttributeError):
        return {*config.__dataclass_fields__, *(config.attribute_map or {})}
    return set()
