"""Tiny models of Hugging Face's with random weights, in folders as they are released."""

import json

import torch
import transformers
from safetensors.torch import load_file, save_file

LLAMA = {
    "vocab_size": 19,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
GPT2 = {"vocab_size": 19, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
NEOX = {name: value for name, value in LLAMA.items() if name not in ("num_key_value_heads", "rms_norm_eps")}
BLOOM = {"vocab_size": 19, "hidden_size": 32, "n_layer": 2, "n_head": 4}
MPT = {"vocab_size": 19, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}

CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, LLAMA),
    "smollm3": (transformers.SmolLM3Config, transformers.SmolLM3ForCausalLM, LLAMA | {"num_hidden_layers": 5}),
    "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel, GPT2),
    "gpt_neox": (transformers.GPTNeoXConfig, transformers.GPTNeoXForCausalLM, NEOX),
    "bloom": (transformers.BloomConfig, transformers.BloomForCausalLM, BLOOM),
    "mpt": (transformers.MptConfig, transformers.MptForCausalLM, MPT),
}


def rope(kind, **options):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **options}}


def make(folder, family, options=None, dtype=torch.float32, **saving):
    """A model of Hugging Face's with random weights, and biases and norms that a test sees, saved to a folder."""
    config_class, model_class, defaults = CLASSES[family]
    torch.manual_seed(0)
    config = config_class(**(defaults | (options or {})), attn_implementation="eager")
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(noise / 4 if parameter.ndim > 1 else parameter + noise / 4)
    model.to(dtype).save_pretrained(folder, **saving)
    return model


def relative(ours, theirs):
    return float(((ours - theirs).abs().max() / theirs.abs().max()).detach())


def edit(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")


def configure(folder, **changes):
    values = json.loads((folder / "config.json").read_text()) | changes
    kept = {name: value for name, value in values.items() if value != "missing"}
    (folder / "config.json").write_text(json.dumps(kept))
