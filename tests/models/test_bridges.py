"""Models of transformers under a TransformerBridge: the class is the oracle, and nothing wrong is let through."""

import pytest
import torch
import transformers
from bridged import GROUPED, OPTIONS, REFUSED
from released import configure, edit, make, relative
from transformers import AutoModelForCausalLM

import probe
from probe.attention import census, compare_templates, stream
from probe.errors import ProbeError
from probe.extrapolation import HeadScale, perplexity
from probe.models import untrained_like
from probe.models.anatomy import layer_encodings, sites_of
from probe.models.encodings import ENCODINGS
from probe.models.lens import check, load_pretrained, to_bridge, untrained_bridge
from probe.models.lens.released import bridge_of, load_bridge
from probe.position import fit_position_probe, probe_positions
from probe.tracing import logits_with_edits, trace
from probe.training import greedy

CPU = torch.device("cpu")


def draw(folder, kind, options):
    """A model of Hugging Face's of that kind with random weights, saved to a folder."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **options)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(noise / 4 if parameter.ndim > 1 else parameter + noise / 4)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen2")
    return draw(folder, "qwen2", GROUPED), load_bridge(folder, CPU), folder


@pytest.mark.parametrize("kind", OPTIONS)
def test_logits_patterns_and_edits_are_the_originals(kind, tmp_path, random_tokens):
    model, tokens = draw(tmp_path, kind, OPTIONS[kind]), random_tokens(length=20)
    bridge = load_bridge(tmp_path, CPU)
    with torch.no_grad():
        theirs = model(tokens, output_attentions=True)
    traced = trace(bridge, tokens, ["attn.hook_pattern", "attn.hook_attn_scores", "attn.hook_z", "hook_resid_post"])
    assert relative(bridge(tokens), theirs.logits) < 1e-5
    for layer, pattern in enumerate(theirs.attentions):
        torch.testing.assert_close(traced.pattern(layer), pattern, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(traced.scores(layer).softmax(-1), pattern, atol=1e-5, rtol=1e-5)
    # An edit of attention alone: what the original makes of it is found by a hook on its output projection's input.
    site, module = "blocks.1.attn.hook_z", _output_projection(model, 1)
    first_head = torch.arange(32) < 8
    handle = module.register_forward_pre_hook(lambda _, args: (args[0].masked_fill(first_head, 0.0),))
    with torch.no_grad():
        ablated = model(tokens).logits
    handle.remove()
    assert relative(ablated, theirs.logits) > 1e-3
    edits = {site: lambda z: z * (torch.arange(4)[:, None] > 0)}
    assert relative(logits_with_edits(bridge, tokens, edits), ablated) < 1e-5


def _output_projection(model, layer):
    names = ("self_attn.o_proj", "self_attn.dense", "attn.c_proj")
    named = dict(model.named_modules())
    return next(m for name, m in named.items() if f".{layer}." in name and name.endswith(names))


@pytest.mark.parametrize("kind", REFUSED)
def test_a_bridge_that_is_not_exact_is_refused_with_the_reason(kind, tmp_path):
    options, message = REFUSED[kind]
    draw(tmp_path, kind, options)
    with pytest.raises(ProbeError, match=message) as caught:
        load_bridge(tmp_path, CPU)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(tmp_path))


def test_what_a_family_of_ours_saves_us_from(tmp_path):
    make(tmp_path, "opt")
    assert isinstance(load_pretrained(tmp_path), probe.Decoder)
    with pytest.raises(ProbeError, match="the softmax of layer 0's scores and its pattern must agree"):
        load_bridge(tmp_path, CPU)


def test_what_is_no_decoder_and_what_brings_code_is_refused_before_weights_are_read(tmp_path):
    config = transformers.T5Config(vocab_size=19, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    with pytest.raises(ProbeError, match="'is_encoder_decoder' must be false: a decoder alone was wanted"):
        load_pretrained(tmp_path / "t5")
    draw(tmp_path / "q", "qwen2", GROUPED)
    (tmp_path / "q" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise SystemExit")
    configure(tmp_path / "q", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
    with pytest.raises(ProbeError, match="'auto_map' must be absent, got code of the checkpoint's own"):
        load_pretrained(tmp_path / "q")
    assert not (tmp_path / "ran").exists()


def test_weights_that_are_not_the_models_are_refused(qwen, tmp_path):
    model, _, _ = qwen
    norm = "model.norm.weight"
    for change, message in [
        (lambda s: s.pop(norm), "missing keys in its weights: 'model.norm.weight'"),
        (lambda s: s.update(surprise=torch.zeros(2)), "unexpected keys in its weights: 'surprise'"),
        (lambda s: s.update({norm: torch.zeros(31)}), r"'model.norm.weight' must have shape \(32,\), got \(31,\)"),
        (lambda s: s.update({norm: torch.zeros(33)}), "transformers cannot load it: .*"),
    ]:
        model.save_pretrained(tmp_path)
        edit(tmp_path, change)
        with pytest.raises(ProbeError, match=message) as caught:
            load_pretrained(tmp_path)
        assert "\n" not in str(caught.value)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ProbeError, match="model.safetensors: not a whole safetensors file"):
        load_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    path.unlink()
    with pytest.raises(ProbeError, match="no such file, .*got pytorch_model.bin: a pickle can run code"):
        load_pretrained(tmp_path)


def test_a_lie_of_transformers_itself_is_found(tmp_path, monkeypatch):
    """Its two attentions computing different things: the eager one is what TransformerLens rebuilds."""
    from transformers.models.qwen2 import modeling_qwen2

    draw(tmp_path, "qwen2", GROUPED)
    right = modeling_qwen2.eager_attention_forward

    def twice(module, query, *args, **kwargs):
        return right(module, 2 * query, *args, **kwargs)

    monkeypatch.setattr(modeling_qwen2, "eager_attention_forward", twice)
    with pytest.raises(ProbeError, match="the logits of transformers' fused and eager attention must agree to 0.0001"):
        load_pretrained(tmp_path)


def test_dtype_and_revision(qwen):
    _, bridge, folder = qwen
    assert next(bridge.parameters()).dtype == torch.float32
    half = load_bridge(folder, CPU, torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    with pytest.raises(ProbeError, match="a folder has no revisions"):
        load_pretrained(folder, "main")


def test_a_model_that_load_pretrained_gives_makes_a_bridge(qwen, random_tokens):
    model, _, folder = qwen
    tokens = random_tokens()
    bridge = bridge_of(load_pretrained(folder, device="cpu").owner, str(folder))
    assert relative(bridge(tokens), model(tokens).logits) < 1e-5


def test_everything_takes_a_bridge_without_knowing_where_it_came_from(qwen, random_tokens):
    model, bridge, _ = qwen
    tokens = random_tokens(batch=24, length=12)
    quick = {"n_bootstrap": 20, "seed": 0}
    rows = fit_position_probe(bridge, tokens, probes=["ridge"], **quick)
    assert {"none", "untrained", "embedding", "shuffled"} == set(rows["control"])
    everywhere = probe_positions(bridge, tokens, alphas=(1.0,), **quick)
    assert {f"blocks.{layer}.attn.hook_z.{head}" for layer in (0, 1) for head in range(4)} <= set(everywhere["site"])
    counted = census(bridge, tokens, **quick)
    assert len(counted.groupby(["layer", "head"])) == 8 and counted["value"].notna().all()
    near = compare_templates(trace(bridge, tokens), ["uniform", "alibi_fitted"], **quick)
    assert (near[near["template"] == "uniform"]["value"] > 0.01).all()
    streamed = stream(bridge, tokens).rows()
    assert set(streamed["layer"]) == {0, 1}
    plain = bridge(tokens).detach()
    with HeadScale(bridge, 1.5):
        assert relative(bridge(tokens), plain) > 1e-3
    assert torch.equal(bridge(tokens), plain)
    said = greedy(bridge, tokens[:5], stop=-1, max_new=6)
    seen = torch.ones_like(tokens[:5])  # else it would hide all tokens that are those of padding
    theirs = model.generate(tokens[:5], attention_mask=seen, max_new_tokens=6, do_sample=False)[:, 12:]
    assert said == theirs.tolist()
    ended = greedy(bridge, tokens[:5], stop=said[0][2], max_new=6)
    assert ended == [s[: s.index(said[0][2])] if said[0][2] in s else s for s in said]
    assert (perplexity(bridge, tokens, [8], n_bootstrap=20)["value"] > 0).all()


def test_the_untrained_twin_is_fresh_repeatable_and_drawn_as_hugging_face_draws(qwen, random_tokens):
    model, bridge, _ = qwen
    before = torch.random.get_rng_state()
    one, same, other = (untrained_bridge(bridge, seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    tokens = random_tokens()
    assert torch.equal(one(tokens), same(tokens)) and relative(one(tokens), other(tokens)) > 0.1
    weight = one.original_model.model.layers[0].mlp.up_proj.weight
    weight = getattr(weight, "original_component", weight)
    assert float(weight.detach().std()) == pytest.approx(model.config.initializer_range, rel=0.1)
    with pytest.raises(ProbeError, match="hand one over as untrained="):
        untrained_bridge(to_bridge(probe.Decoder(probe.DecoderConfig(19, 8, 1, 8, 2))), 0)


def test_sites_of_a_bridge_are_those_that_are_computed(tmp_path):
    draw(tmp_path, "phi3", OPTIONS["phi3"])
    bridge = load_bridge(tmp_path, CPU)
    # It has these hooks, and never calls them.
    assert {"blocks.0.attn.hook_rot_q", "blocks.0.attn.hook_rot_k"} <= set(bridge.hook_dict) - set(sites_of(bridge))
    with pytest.raises(ProbeError, match="unknown site 'blocks.0.attn.hook_rot_q'"):
        trace(bridge, torch.zeros(1, 4, dtype=torch.long), ["blocks.0.attn.hook_rot_q"])


def test_which_layers_see_position_is_measured(tmp_path, qwen):
    assert layer_encodings(qwen[1]) == ["rotary", "rotary"]
    draw(tmp_path, "cohere2", OPTIONS["cohere2"])
    assert layer_encodings(load_bridge(tmp_path, CPU)) == ["rotary", "none"]
    assert layer_encodings(load_bridge(tmp_path, CPU, torch.bfloat16)) == ["rotary", "none"]


@pytest.mark.parametrize("seen", [None, (1,)], ids=["all layers", "one layer"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_what_is_measured_of_a_bridge_is_what_a_decoders_config_says(encoding, seen, make_decoder, monkeypatch):
    if seen and encoding in ("learned", "sinusoidal", "randomized"):
        pytest.skip("acts on the embeddings")
    decoder = make_decoder(encoding=encoding, position_layers=seen)
    says = layer_encodings(decoder)
    assert says == [encoding if seen is None or layer in seen else "none" for layer in range(2)]
    bridge = to_bridge(decoder)
    assert layer_encodings(bridge) == says
    monkeypatch.setattr("probe.models.anatomy.our_decoder", lambda model: None)
    measured = layer_encodings(bridge)
    assert [name != "none" for name in measured] == [name != "none" for name in says]


def test_an_untrained_twin_of_ours_is_what_training_starts_from(make_decoder, random_tokens):
    decoder, tokens = make_decoder(encoding="t5"), random_tokens()
    twin = untrained_like(decoder, 7)
    assert torch.equal(twin(tokens), make_decoder(encoding="t5", seed=7)(tokens))
    torch.testing.assert_close(untrained_like(to_bridge(decoder), 7)(tokens), twin(tokens), atol=1e-5, rtol=1e-5)


def hand_made(kind, options):
    """A bridge as a user of TransformerLens makes it."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **options)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    return build_bridge_from_module(model, type(model).__name__, hf_config=model.config)


@pytest.mark.parametrize("kind", ["gptj", "gpt_neo", "xglm"])
def test_a_bridge_of_the_users_that_contradicts_itself_is_refused_whatever_is_measured(kind, random_tokens):
    bridge, tokens = hand_made(kind, REFUSED[kind][0]), random_tokens(length=12)
    for measure in (
        lambda: trace(bridge, tokens, ["hook_embed"]),
        lambda: logits_with_edits(bridge, tokens, {"blocks.0.hook_resid_post": lambda x: x}),
        lambda: census(bridge, tokens, n_bootstrap=20, seed=0),
        lambda: stream(bridge, tokens),
    ):
        with pytest.raises(ProbeError, match=f"(?i)a bridge of {kind.replace('_', '')}.*: the softmax of layer 0's"):
            measure()


def test_a_bridge_of_the_users_is_checked_once(random_tokens, monkeypatch):
    tokens, checked, right = random_tokens(length=12), [], check._check_edits
    monkeypatch.setattr(check, "_check_edits", lambda run, plain: (checked.append(run.whose), right(run, plain)))
    bridge = hand_made("llama", GROUPED)
    bridge.train()
    for _ in range(2):
        assert trace(bridge, tokens, ["hook_resid_post"]).values
        assert bridge.training
    assert checked == ["a bridge of LlamaForCausalLM"]
    assert trace(hand_made("llama", GROUPED), tokens, ["hook_resid_post"]).values and len(checked) == 2
    trace(to_bridge(probe.Decoder(probe.DecoderConfig(19, 16, 1, 8, 2))), tokens, ["hook_resid_post"])
    assert len(checked) == 2  # one of ours is known


def test_what_was_checked_when_it_was_loaded_is_not_checked_again(qwen, random_tokens, monkeypatch):
    monkeypatch.setattr(check, "_check_edits", None)
    trace(qwen[1], random_tokens(), ["hook_resid_post"])
