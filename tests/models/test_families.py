import weakref

import pytest
import torch
import transformers
from released import CLASSES, LLAMA, RW, assert_same, configure, edit, make, observe, relative, rope
from safetensors import safe_open
from safetensors.torch import save_model
from t5_decoder import t5_decoder

from probe.errors import ProbeError
from probe.models.checkpoint import save
from probe.models.decoder import KVCache
from probe.models.lens import to_bridge
from probe.models.pretrained import load_pretrained
from probe.models.stored import Stored
from probe.models.variants import variant

MODELS = {
    "llama": ("llama", {}),
    "llama, grouped heads, tied, biases": (
        "llama",
        {"num_key_value_heads": 2, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "llama, one kv head, free d_head, biases in attention": (
        "llama",
        {"num_key_value_heads": 1, "head_dim": 6, "attention_bias": True},
    ),
    "llama, biases in mlps, another base": ("llama", {"mlp_bias": True} | rope("default", rope_theta=500000.0)),
    "llama, linear": ("llama", rope("linear", factor=4.0)),
    "llama, yarn": (
        "llama",
        {"hidden_size": 64} | rope("yarn", factor=4.0, original_max_position_embeddings=16, rope_theta=500.0),
    ),
    "llama, yarn with numbers of its own": (
        "llama",
        {"hidden_size": 64}
        | rope(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=16,
            rope_theta=500.0,
            beta_fast=8.0,
            beta_slow=0.5,
            attention_factor=1.3,
        ),
    ),
    "llama, llama3": (
        "llama",
        {"hidden_size": 64}
        | rope("llama3", factor=8.0, original_max_position_embeddings=16, low_freq_factor=1.0, high_freq_factor=4.0),
    ),
    "smollm3": ("smollm3", {"num_key_value_heads": 2}),
    "smollm3, layers of its own": (
        "smollm3",
        {"no_rope_layers": [0, 1, 1, 0, 1], "tie_word_embeddings": False, "attention_bias": True},
    ),
    "smollm3, every second, another base": (
        "smollm3",
        {"no_rope_layer_interval": 2} | rope("default", rope_theta=99.0),
    ),
    "gpt2": ("gpt2", {}),
    "gpt2, untied, relu, free d_mlp": (
        "gpt2",
        {"tie_word_embeddings": False, "activation_function": "relu", "n_inner": 40},
    ),
    "gpt2, unscaled scores, erf": ("gpt2", {"scale_attn_weights": False, "activation_function": "gelu"}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox, one after another, all turned": (
        "gpt_neox",
        {"use_parallel_residual": False} | rope("default", partial_rotary_factor=1.0),
    ),
    "gpt_neox, half turned, no biases in attention, tied": (
        "gpt_neox",
        {"attention_bias": False, "tie_word_embeddings": True} | rope("default", partial_rotary_factor=0.5),
    ),
    "bloom": ("bloom", {}),
    "bloom, 6 heads": ("bloom", {"n_head": 6, "hidden_size": 36}),
    "bloom, 3 heads, untied": ("bloom", {"n_head": 3, "hidden_size": 24, "tie_word_embeddings": False}),
    "mpt": ("mpt", {}),
    "mpt, 6 heads": ("mpt", {"n_heads": 6, "d_model": 36}),
    "mpt, 3 heads, scores of its own, untied": (
        "mpt",
        {"n_heads": 3, "d_model": 24, "tie_word_embeddings": False, "attn_config": {"softmax_scale": 0.2}},
    ),
    "opt": ("opt", {}),
    "opt, gelu, no biases but in norms, untied": (
        "opt",
        {"activation_function": "gelu", "enable_bias": False, "tie_word_embeddings": False},
    ),
    "falcon, one key": ("falcon", {}),
    "falcon, biases, free d_mlp, untied, linear": (
        "falcon",
        {"bias": True, "ffn_hidden_size": 40, "tie_word_embeddings": False} | rope("linear", factor=4.0),
    ),
    "falcon, one key, one after another": ("falcon", {"parallel_attn": False}),
    "falcon, a key for each head": ("falcon", {"multi_query": False, "bias": True}),
    "falcon, grouped heads": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon, grouped heads, one norm": (
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1, "bias": True},
    ),
    "falcon, alibi": ("falcon", RW | {"bias": True}),
    "falcon, alibi, 6 heads, one key": (
        "falcon",
        RW | {"num_attention_heads": 6, "hidden_size": 36, "multi_query": True},
    ),
    "falcon, alibi, 12 grouped heads": (
        "falcon",
        RW
        | {"num_attention_heads": 12, "hidden_size": 36, "new_decoder_architecture": True, "num_kv_heads": 3}
        | {"parallel_attn": True},
    ),
}


@pytest.fixture
def tokens(random_tokens):
    return random_tokens(length=40)


@pytest.mark.parametrize(("family", "options"), MODELS.values(), ids=MODELS)
def test_logits_patterns_and_heads_are_those_of_transformers(family, options, tokens, tmp_path):
    want = observe(make(tmp_path, family, options), family, tokens)
    decoder = load_pretrained(tmp_path)
    assert not decoder.training and decoder.dtype == torch.float32
    assert (decoder.head.weight is decoder.token_embedding.weight) == decoder.config.tie_embeddings
    assert not any(tensor.is_meta for tensor in decoder.state_dict().values())
    assert_same(decoder, tokens, want)
    # Neither logits nor scores are so small that others would pass for them.
    assert want.logits.std() > 0.1
    uniform = torch.ones(40, 40).tril() / torch.arange(1, 41)[:, None]
    assert (want.patterns[0] - uniform).abs().max() > 0.1


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["none", "alibi", "rotary", "new_rotary"])
def test_mcgills_are_t5s_own_decoder_blocks(kind, tied, tokens, tmp_path):
    want = t5_decoder(tmp_path, kind, tied)(tokens)
    decoder = load_pretrained(tmp_path)
    assert_same(decoder, tokens, want)
    others = {"none": "alibi", "alibi": "rotary", "rotary": "none", "new_rotary": "none"}
    assert relative(variant(decoder, encoding=others[kind])(tokens), want.logits) > 1e-3


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "HeadScale"])
def test_llama_without_rotation(scaled, tokens, tmp_path, monkeypatch):
    from transformers.models.llama import modeling_llama

    theirs = make(tmp_path, "llama", {"num_key_value_heads": 2, "attention_bias": True})
    scales = torch.tensor([[0.5, 1.0, 1.5, 2.0], [3.0, 1.0, 0.7, 0.1]])
    if scaled:
        edit(tmp_path, lambda s: s.update({f"model.layers.{i}.self_attn.scale_param": scales[i] for i in (0, 1)}))
        with torch.no_grad():
            for layer, scale in zip(theirs.model.layers, scales, strict=True):
                layer.self_attn.q_proj.register_forward_hook(
                    lambda module, inputs, out, scale=scale: (out.unflatten(-1, (4, 8)) * scale[:, None]).flatten(-2)
                )
        with pytest.raises(ProbeError, match=r"unknown key 'model\.layers\.\d\.self_attn\.scale_param'"):
            load_pretrained(tmp_path)
    # As their authors do it.
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin, **rest: (q, k))
    decoder = load_pretrained(tmp_path, family="llama_nope")
    assert decoder.config.encoding == "none"
    assert_same(decoder, tokens, observe(theirs, "llama", tokens))
    if scaled:
        edit(tmp_path, lambda s: s.pop("model.layers.1.self_attn.scale_param"))
        with pytest.raises(ProbeError, match=r"'model\.layers\.1\.self_attn\.scale_param' is missing"):
            load_pretrained(tmp_path, family="llama_nope")


@pytest.mark.parametrize("family", CLASSES)
def test_bf16_is_kept_and_other_dtypes_are_cast_to(family, tokens, tmp_path):
    make(tmp_path, family, dtype=torch.bfloat16)
    _, model_class, _ = CLASSES[family]
    for dtype, tolerance in [(None, 0.05), (torch.float32, 1e-5)]:
        decoder = load_pretrained(tmp_path, dtype=dtype)
        assert {tensor.dtype for tensor in decoder.state_dict().values()} == {dtype or torch.bfloat16}
        theirs = model_class.from_pretrained(tmp_path, dtype=dtype or torch.bfloat16)
        with torch.no_grad():
            assert relative(decoder(tokens).float(), theirs(tokens).logits.float()) < tolerance


@pytest.mark.parametrize("family", CLASSES)
def test_shards_are_as_the_whole(family, tmp_path):
    make(tmp_path / "whole", family)
    make(tmp_path / "parts", family, max_shard_size="10KB")
    assert len([*(tmp_path / "parts").glob("*.safetensors")]) > 2
    whole, parts = load_pretrained(tmp_path / "whole"), load_pretrained(tmp_path / "parts")
    assert whole.config == parts.config and whole.state_dict().keys() == parts.state_dict().keys()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, parts.state_dict()[name]), name


@pytest.mark.parametrize("family", CLASSES)
def test_a_cache_and_the_fused_path_change_nothing(family, tokens, tmp_path):
    make(tmp_path, family)
    decoder, cache = load_pretrained(tmp_path), KVCache()
    want = decoder(tokens)
    parts = [decoder(tokens[:, a:b], cache=cache) for a, b in [(0, 20), (20, 21), (21, 22), (22, 40)]]
    torch.testing.assert_close(torch.cat(parts, dim=1), want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(decoder(tokens, attention="fused"), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", CLASSES)
def test_what_is_loaded_is_saved_and_bridged_as_any_decoder(family, tokens, tmp_path):
    make(tmp_path / "theirs", family)
    decoder = load_pretrained(tmp_path / "theirs")
    save(decoder, tmp_path / "ours")
    back = load_pretrained(tmp_path / "ours")
    assert back.config == decoder.config and torch.equal(back(tokens), decoder(tokens))
    torch.testing.assert_close(to_bridge(decoder)(tokens), decoder(tokens), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "smollm3", "gpt_neox"])
def test_the_rotation_can_be_dropped(family, tokens, tmp_path):
    make(tmp_path, family)
    decoder = load_pretrained(tmp_path)
    dropped = variant(decoder, encoding="none")
    assert dropped.config.encoding == "none" and relative(dropped(tokens), decoder(tokens)) > 1e-3
    assert torch.equal(dropped.layers[1].attention.q_proj.weight, decoder.layers[1].attention.q_proj.weight)


def test_smollm3_has_no_positions_in_every_fourth_layer(tmp_path):
    make(tmp_path, "smollm3")
    assert load_pretrained(tmp_path).config.position_layers == (0, 1, 2, 4)
    configure(tmp_path, no_rope_layers="missing", no_rope_layer_interval="missing")
    assert load_pretrained(tmp_path).config.position_layers == (0, 1, 2, 4)
    configure(tmp_path, no_rope_layers=[1, 1, 1, 1, 1])
    assert load_pretrained(tmp_path).config.position_layers is None
    configure(tmp_path, no_rope_layers=[1, 0])
    with pytest.raises(ProbeError, match=r"config\.json: 'no_rope_layers' must be a list of 0 and 1 for each of 5"):
        load_pretrained(tmp_path)


def test_older_files_are_read(tokens, tmp_path):
    # Names without the prefix, masks among the weights, the head under another name, older keys of configs.
    llama3 = {"factor": 8.0, "original_max_position_embeddings": 16, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    folders = {family: tmp_path / family for family in ("gpt2", "bloom", "gpt_neox", "opt", "llama")}
    for family, folder in folders.items():
        make(folder, family, rope("llama3", **llama3) if family == "llama" else {})
    want = {family: load_pretrained(folder)(tokens) for family, folder in folders.items()}

    def without_prefix(state):
        for key in [*state]:
            state[key.removeprefix("transformer.").removeprefix("model.")] = state.pop(key)

    def with_head_and_masks(state):
        state |= {"lm_head.weight": state["wte.weight"].clone(), "h.0.attn.bias": torch.ones(64, 64)}
        state |= {"h.1.attn.masked_bias": torch.ones(1)}

    def as_pythia(state):
        state["embed_out.weight"] = state.pop("lm_head.weight" if "lm_head.weight" in state else "embed_out.weight")
        state["gpt_neox.layers.0.attention.rotary_emb.inv_freq"] = torch.ones(1)

    for change in (without_prefix, with_head_and_masks):
        edit(folders["gpt2"], change)
    edit(folders["opt"], without_prefix)
    edit(folders["opt"], lambda state: state.update({"decoder.version": torch.ones(1)}))
    edit(folders["bloom"], without_prefix)
    configure(folders["bloom"], n_embed=32, num_attention_heads=4, hidden_size="missing", n_head="missing")
    edit(folders["gpt_neox"], as_pythia)
    configure(folders["gpt_neox"], rope_parameters="missing", rotary_pct=0.25, rotary_emb_base=10000)
    scaling = {"rope_type": "llama3"} | llama3
    configure(folders["llama"], rope_parameters="missing", rope_theta=10000.0, rope_scaling=scaling)
    for family, logits in want.items():
        assert torch.equal(load_pretrained(folders[family])(tokens), logits), family


def test_one_tensor_is_read_at_a_time(tmp_path, monkeypatch):
    make(tmp_path, "bloom")
    alive, most = [0], [0]
    read = Stored.read

    def counted(stored):
        tensor = read(stored)
        alive[0] += 1
        most[0] = max(most[0], alive[0])
        weakref.finalize(tensor, lambda: alive.__setitem__(0, alive[0] - 1))
        return tensor

    monkeypatch.setattr(Stored, "read", counted)
    decoder = load_pretrained(tmp_path)
    # One is read while the one before is still bound; no part keeps the tensor from which it was cut.
    assert most[0] <= 2
    q = decoder.layers[0].attention.q_proj.weight
    assert q.is_contiguous() and q.untyped_storage().nbytes() == q.nbytes


@pytest.mark.parametrize("family", [*CLASSES, "qwen2"])
def test_a_tied_model_of_which_the_file_holds_the_head_alone(family, tokens, tmp_path):
    """As safetensors' ``save_model`` writes it: of two names of one tensor it keeps the first of the alphabet."""
    if family == "qwen2":
        config = transformers.Qwen2Config(**LLAMA | {"tie_word_embeddings": True})
        theirs = transformers.Qwen2ForCausalLM(config).eval()
        theirs.save_pretrained(tmp_path)
    else:
        theirs = make(tmp_path, family, {"tie_word_embeddings": True})
    save_model(theirs, str(tmp_path / "model.safetensors"))
    if family == "gpt_neox":  # its embedding comes first
        edit(tmp_path, lambda state: state.update({"embed_out.weight": state.pop("gpt_neox.embed_in.weight")}))
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        keys = set(file.keys())
    assert len(keys & {"lm_head.weight", "embed_out.weight"}) == 1 and len(keys) < len(theirs.state_dict())
    with torch.no_grad():
        assert relative(load_pretrained(tmp_path)(tokens), theirs(tokens).logits) < 1e-5
