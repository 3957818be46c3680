"""Tiny models of Hugging Face's with random weights, in folders as they are released, and what they compute."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from probe.tracing import trace

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
OPT = {name: value for name, value in NEOX.items() if name != "intermediate_size"} | {"ffn_dim": 48}
FALCON = {name: value for name, value in NEOX.items() if name != "intermediate_size"}
# Falcon-RW. Hugging Face's eager attention adds its ALiBi twice: it is in the mask already (transformers 5.24).
RW = {"alibi": True, "multi_query": False, "parallel_attn": False, "attn_implementation": "sdpa"}

CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, LLAMA),
    "smollm3": (transformers.SmolLM3Config, transformers.SmolLM3ForCausalLM, LLAMA | {"num_hidden_layers": 5}),
    "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel, GPT2),
    "gpt_neox": (transformers.GPTNeoXConfig, transformers.GPTNeoXForCausalLM, NEOX),
    "bloom": (transformers.BloomConfig, transformers.BloomForCausalLM, BLOOM),
    "mpt": (transformers.MptConfig, transformers.MptForCausalLM, MPT),
    "opt": (transformers.OPTConfig, transformers.OPTForCausalLM, OPT),
    "falcon": (transformers.FalconConfig, transformers.FalconForCausalLM, FALCON),
}

# The module of a layer that reads all heads side by side.
OUT_PROJECTIONS = {
    "llama": "model.layers.{}.self_attn.o_proj",
    "smollm3": "model.layers.{}.self_attn.o_proj",
    "gpt2": "transformer.h.{}.attn.c_proj",
    "gpt_neox": "gpt_neox.layers.{}.attention.dense",
    "bloom": "transformer.h.{}.self_attention.dense",
    "mpt": "transformer.blocks.{}.attn.out_proj",
    "opt": "model.decoder.layers.{}.self_attn.out_proj",
    "falcon": "transformer.h.{}.self_attention.dense",
}

# What the configs of two Falcons were before they were Falcons: made from this one, under these names.
REFINED_WEB = {
    "RefinedWebModel": {},
    "RefinedWeb": {"new_decoder_architecture": True, "num_kv_heads": 2},
}


def rope(kind, **options):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **options}}


def make(folder, family, options=None, dtype=torch.float32, **saving):
    """A model of Hugging Face's with random weights, and biases and norms that a test sees, saved to a folder."""
    config_class, model_class, defaults = CLASSES[family]
    torch.manual_seed(0)
    config = config_class(**(defaults | {"attn_implementation": "eager"} | (options or {})))
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(noise / 4 if parameter.ndim > 1 else parameter + noise / 4)
    model.to(dtype).save_pretrained(folder, **saving)
    return model


def make_refined_web(folder, name):
    """A Falcon under its older name, with the keys that its config had."""
    model = make(folder, "falcon", REFINED_WEB[name])
    old = {"n_head": model.config.num_attention_heads, "n_layer": model.config.num_hidden_layers}
    if name == "RefinedWeb":
        old |= {"n_head_kv": model.config.num_kv_heads, "multi_query": "missing"}
    new = ("num_attention_heads", "num_hidden_layers", "num_kv_heads", "new_decoder_architecture", "activation")
    new += ("num_ln_in_parallel_attn", "ffn_hidden_size", "max_position_embeddings", "rope_parameters")
    configure(
        folder, **dict.fromkeys(new, "missing"), **old, model_type=name, auto_map={"AutoModel": "modelling_RW.RWModel"}
    )
    return model


@dataclass
class Observed:
    """What a model makes of tokens; patterns and the heads' outputs, side by side before W_O, layer by layer."""

    logits: Tensor
    patterns: Sequence[Tensor]
    heads: Sequence[Tensor]


@torch.no_grad()
def observe(model, family, tokens) -> Observed:
    """What a model of Hugging Face's makes of tokens.

    Fused attention hands out no pattern: there it is the softmax, taken here in float64, of the queries, keys and masks
    that the kernel is called with.
    """
    path, eager = OUT_PROJECTIONS[family], model.config._attn_implementation == "eager"
    projections = [model.get_submodule(path.format(layer)) for layer in range(model.config.num_hidden_layers)]
    with inputs_of(projections) as heads, fused_patterns() as patterns:
        out = model(tokens, output_attentions=eager)
    return Observed(out.logits, out.attentions if eager else patterns, heads)


def assert_same(decoder, tokens, want: Observed, tolerance: float = 1e-5) -> None:
    """The logits, and the pattern and the output of every head, against those that were observed."""
    with torch.no_grad():
        assert relative(decoder(tokens), want.logits) < tolerance
    found = trace(decoder, tokens, ["attn.hook_pattern", "attn.hook_z"])
    n_layers, n_heads = decoder.config.n_layers, decoder.config.n_heads
    assert len(want.patterns) == len(want.heads) == n_layers
    for layer in range(n_layers):
        torch.testing.assert_close(found.pattern(layer), want.patterns[layer], atol=tolerance, rtol=10 * tolerance)
        z = want.heads[layer].unflatten(-1, (n_heads, -1))
        assert relative(found[f"blocks.{layer}.attn.hook_z"], z) < tolerance


@contextmanager
def inputs_of(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """What enters these modules, which are called one after another."""
    seen: list[Tensor] = []
    handles = [module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0])) for module in modules]
    yield seen
    for handle in handles:
        handle.remove()


@contextmanager
def fused_patterns() -> Iterator[list[Tensor]]:
    """The patterns of all calls of torch's fused attention, from what it is called with."""
    seen: list[Tensor] = []
    kernel = F.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None, **rest):
        scores = q.double() @ k.double().transpose(-1, -2) * q.shape[-1] ** -0.5
        seen.append((scores + attn_mask.double()).softmax(-1).to(q))
        return kernel(q, k, v, attn_mask=attn_mask, **rest)

    with mock.patch.object(F, "scaled_dot_product_attention", spy):
        yield seen


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


def gpt_oss_with_sinks():
    """A random gpt-oss: a learned sink in each head of two layers, of which the first sees 8 keys."""
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        vocab_size=19, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1, sliding_window=8, pad_token_id=0,
        layer_types=["sliding_attention", "full_attention"], max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    return transformers.GptOssForCausalLM(config).eval()
