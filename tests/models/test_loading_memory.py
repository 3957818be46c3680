"""A billion parameters in the memory that they take and little more."""

import json
import shutil

import pytest
import torch
from peak_memory import peak_bytes
from safetensors.torch import save_file

# TinyLlama-1.1B. Zhang et al. 2024.
CONFIG = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


def shards():
    """The tensors of such a model by key, one layer at a time."""
    d_model, d_mlp, d_vocab, d_kv = 2048, 5632, 32000, 256
    yield {
        "model.embed_tokens.weight": torch.zeros(d_vocab, d_model, dtype=torch.bfloat16),
        "model.norm.weight": torch.zeros(d_model, dtype=torch.bfloat16),
        "lm_head.weight": torch.zeros(d_vocab, d_model, dtype=torch.bfloat16),
    }
    shapes = {
        "input_layernorm": (d_model,),
        "self_attn.q_proj": (d_model, d_model),
        "self_attn.k_proj": (d_kv, d_model),
        "self_attn.v_proj": (d_kv, d_model),
        "self_attn.o_proj": (d_model, d_model),
        "post_attention_layernorm": (d_model,),
        "mlp.gate_proj": (d_mlp, d_model),
        "mlp.up_proj": (d_mlp, d_model),
        "mlp.down_proj": (d_model, d_mlp),
    }
    for layer in range(CONFIG["num_hidden_layers"]):
        yield {
            f"model.layers.{layer}.{name}.weight": torch.zeros(shape, dtype=torch.bfloat16)
            for name, shape in shapes.items()
        }


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with such a model, and the bytes of its weights; 2.2 GB that are not left behind."""
    folder = tmp_path / "1.1B"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    places, n_bytes = {}, 0
    for i, shard in enumerate(shards()):
        name = f"model-{i + 1:05}-of-00023.safetensors"
        save_file(shard, folder / name)
        places |= dict.fromkeys(shard, name)
        n_bytes += sum(tensor.nbytes for tensor in shard.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    yield folder, n_bytes
    shutil.rmtree(folder)


@pytest.mark.slow
def test_a_billion_parameters_take_little_more_than_their_size(checkpoint):
    folder, n_bytes = checkpoint
    assert n_bytes == 2 * 1_100_048_384  # the parameters that TinyLlama has
    script = f"""
import torch, probe
model = probe.load_pretrained({str(folder)!r}, device="cpu")
assert model.dtype == torch.bfloat16 and sum(p.nbytes for p in model.parameters()) == {n_bytes}
"""
    # All that the process holds, Python and torch with it.
    assert peak_bytes(script) < 1.3 * n_bytes
