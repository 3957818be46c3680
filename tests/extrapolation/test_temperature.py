import copy
import threading

import pytest
import torch
from torch import nn

from probe.errors import ProbeError
from probe.extrapolation import HeadScale, UniformScale, can_scale, scaled
from probe.models import checkpoint
from probe.models.clockwork import ClockworkConfig, ClockworkRNN
from probe.models.encodings import ENCODINGS
from probe.models.lens import to_bridge
from probe.models.scaled import is_scaled
from probe.tracing import SCORES, trace

SCALES = torch.tensor([[0.5, 1.0, 1.5, 2.0], [1.25, 1.75, 1.0, 3.0]])


@pytest.mark.parametrize("kind", [UniformScale, HeadScale])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_scale_of_one_changes_no_bit(make_decoder, random_tokens, encoding, kind):
    decoder, tokens = make_decoder(encoding=encoding), random_tokens()
    before, weights = decoder(tokens), copy.deepcopy(decoder.state_dict())
    scale = kind(decoder, 1.0)
    assert torch.equal(decoder(tokens), before)
    scale.fold()
    assert torch.equal(decoder(tokens), before)
    assert list(decoder.state_dict()) == list(weights)
    assert all(torch.equal(decoder.state_dict()[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize("grouped", [False, True])
def test_scores_are_scaled_head_by_head(make_decoder, random_tokens, grouped):
    decoder, tokens = make_decoder(encoding="rotary", n_kv_heads=2 if grouped else 4, n_layers=1), random_tokens()
    nn.init.normal_(decoder.layers[0].attention.q_proj.bias, generator=torch.Generator().manual_seed(0))
    before = trace(decoder, tokens, [SCORES]).scores(0)
    with HeadScale(decoder, SCALES[:1]):
        during = trace(decoder, tokens, [SCORES]).scores(0)
    seen = before.isfinite()
    expected = before * SCALES[0, :, None, None]
    assert torch.allclose(during[seen], expected[seen], atol=1e-5)
    assert torch.equal(trace(decoder, tokens, [SCORES]).scores(0), before)


def test_biases_of_encodings_are_not_scaled(make_decoder, random_tokens):
    decoder, tokens = make_decoder(encoding="alibi", n_layers=1), random_tokens()
    bias = trace(decoder, tokens, [SCORES]).scores(0) - trace(make_decoder(n_layers=1), tokens, [SCORES]).scores(0)
    with UniformScale(decoder, 2.0):
        scores = trace(decoder, tokens, [SCORES]).scores(0)
    with UniformScale(make_decoder(n_layers=1), 2.0), UniformScale(plain := make_decoder(n_layers=1), 2.0):
        expected = trace(plain, tokens, [SCORES]).scores(0) + bias
    seen = scores.isfinite()
    assert torch.allclose(scores[seen], expected[seen], atol=1e-5)


@pytest.mark.parametrize("make", ["decoder", "bridge", "llama"])
def test_folded_equals_unfolded(make_decoder, make_llama, random_tokens, make):
    model = {"decoder": make_decoder, "bridge": lambda: to_bridge(make_decoder()), "llama": make_llama}[make]()
    tokens = random_tokens()

    def logits():
        out = model(tokens)
        return (out if isinstance(out, torch.Tensor) else out.logits).detach()

    before = logits()
    scale = HeadScale(model, SCALES)
    unfolded = logits()
    assert not torch.allclose(unfolded, before, atol=1e-3)
    scale.fold()
    assert (logits() - unfolded).abs().max() <= 1e-5
    HeadScale(model, 1 / SCALES).fold()
    assert torch.allclose(logits(), before, atol=1e-5)


def test_llama_is_scaled_as_by_its_own_scaling(make_llama):
    model, tokens = make_llama(), torch.arange(6)[None]
    other = make_llama()
    for layer in other.model.layers:
        layer.self_attn.scaling *= 1.7
    with UniformScale(model, 1.7):
        assert torch.allclose(model(tokens).logits, other(tokens).logits, atol=1e-5)


def test_folding_leaves_an_ordinary_checkpoint(make_decoder, random_tokens, tmp_path):
    decoder = make_decoder()
    scale = HeadScale(decoder, SCALES)
    expected = decoder(random_tokens())
    with pytest.raises(
        ProbeError, match="saving needs a model with weights of its own; a scale is on its attention: fold or remove it"
    ):
        checkpoint.save(decoder, tmp_path / "unfolded")
    assert not (tmp_path / "unfolded").exists()
    scale.fold()
    checkpoint.save(decoder, tmp_path / "folded")
    assert torch.allclose(checkpoint.load(tmp_path / "folded")(random_tokens()), expected, atol=1e-5)


def test_a_copy_is_scaled_and_the_model_is_not(make_decoder, random_tokens):
    decoder, tokens = make_decoder(), random_tokens()
    before = decoder(tokens)
    twin = scaled(decoder, SCALES)
    assert torch.equal(decoder(tokens), before)
    with HeadScale(decoder, SCALES):
        assert torch.allclose(twin(tokens), decoder(tokens), atol=1e-5)


def test_lambda_is_the_only_parameter_with_a_gradient(make_decoder, random_tokens):
    decoder = make_decoder().requires_grad_(False)
    names = [name for name, _ in decoder.named_parameters()]
    for kind, shape in ((HeadScale, (2, 4)), (UniformScale, ())):
        with kind(decoder, 1.3) as scale:
            assert scale.scale.shape == shape
            assert len(list(decoder.parameters())) == len(names)
            decoder(random_tokens()).square().sum().backward()
            assert scale.scale.grad.shape == shape and (scale.scale.grad != 0).all()
    assert [name for name, _ in decoder.named_parameters()] == names


def test_half_precision_stays_half(make_decoder, random_tokens):
    decoder = make_decoder().to(torch.bfloat16)
    scale = HeadScale(decoder, SCALES)
    assert decoder(random_tokens()).dtype == torch.bfloat16
    scale.fold()
    assert decoder.dtype == torch.bfloat16


def test_clamp_lifts(make_decoder):
    scale = HeadScale(make_decoder(), SCALES)
    scale.clamp(1.2)
    assert torch.equal(scale.by_head().detach(), SCALES.clamp(min=1.2))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.0, r"scales must be numbers above 0, got \[0.0\]"),
        (-1.0, "scales must be numbers above 0"),
        (float("nan"), "scales must be numbers above 0"),
        (torch.ones(3, 4), r"scales must be one number or of shape \(2, 4\) \(layer, head\), got \(3, 4\)"),
    ],
)
def test_wrong_scales_are_refused_and_nothing_is_left(make_decoder, value, said):
    decoder = make_decoder()
    with pytest.raises(ProbeError, match=said):
        HeadScale(decoder, value)
    HeadScale(decoder, 1.0).fold()


def test_models_without_such_heads_are_refused(make_decoder):
    clockwork = ClockworkRNN(ClockworkConfig(d_vocab=5, d_model=8, n_layers=1, n_modules=2))
    for model in (clockwork, nn.Linear(3, 3)):
        with pytest.raises(ProbeError, match="a scale needs a model with linear q_proj of heads of head_dim"):
            UniformScale(model, 1.1)
    decoder = make_decoder()
    with UniformScale(decoder, 1.1), pytest.raises(ProbeError, match="is scaled already"):
        UniformScale(decoder, 1.1)


SIZES = {"vocab_size": 19, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": None}

# Models in which a factor of 2 in the rows of W_Q does not multiply log-odds by 2, and by how much it does.
WITHOUT_EFFECT = {
    "qwen3": ({"head_dim": 8}, "1.000"),
    "stablelm": ({"qk_layernorm": True}, "1.000"),
    "phi": ({"qk_layernorm": True, "num_key_value_heads": 4}, "1.000"),
    "olmo": ({"clip_qkv": 0.1}, r"1\.0"),
    "olmo2": ({}, r"1\.0"),
    "cohere": ({"use_qk_norm": True}, "1.000"),
    "gemma2": ({"head_dim": 8}, r"1\.9"),
    "llama4_text": (
        {"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 32, "no_rope_layers": [0, 1]},
        "1.0",
    ),
}


@pytest.mark.parametrize("kind", WITHOUT_EFFECT)
def test_a_model_whose_odds_do_not_scale_is_refused_and_left_as_it_was(kind):
    import transformers

    options, ratio = WITHOUT_EFFECT[kind]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **SIZES | options))
    training, implementation = model.training, model.config._attn_implementation
    weights = copy.deepcopy(model.state_dict())
    layer = 1 if kind == "llama4_text" else 0  # where Llama 4 has no positions it does not normalise
    with pytest.raises(ProbeError, match=f"the log-odds of layer {layer}'s keys by 2, got {ratio}"):
        UniformScale(model, 1.1)
    assert not can_scale(model) and not is_scaled(model) and model.training == training
    assert model.config._attn_implementation == implementation
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma", "stablelm", "olmo", "smollm3"])
def test_where_it_is_not_refused_the_odds_are_multiplied(kind):
    import transformers

    torch.manual_seed(0)
    options = SIZES | {"head_dim": 8} | ({"qk_layernorm": False} if kind == "stablelm" else {})
    config = transformers.AutoConfig.for_model(kind, **options)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    tokens = torch.randint(19, (3, 15), generator=torch.Generator().manual_seed(1))

    def odds():
        first = model(tokens, output_attentions=True).attentions[0].detach().double().log()[:, :, -1]
        return first[..., 1:] - first[..., :1]

    before = odds()
    with UniformScale(model, 2.0):
        assert torch.allclose(odds(), 2 * before, rtol=1e-3, atol=1e-6)


def test_positions_that_depend_on_queries_do_not_scale(make_decoder):
    decoder = make_decoder(encoding="cope")
    assert can_scale(decoder)  # as it is drawn, CoPE adds nothing
    nn.init.normal_(decoder.encoding.embedding, generator=torch.Generator().manual_seed(1))
    with pytest.raises(ProbeError, match="or its positions depend on queries"):
        UniformScale(decoder, 1.1)


def test_queries_of_zero_can_be_scaled(make_decoder):
    decoder = make_decoder(encoding="alibi")
    for layer in decoder.layers:
        for parameter in layer.attention.q_proj.parameters():
            nn.init.zeros_(parameter)
    assert can_scale(decoder)


def test_of_two_threads_one_scales_and_the_other_is_refused(make_decoder, random_tokens):
    """Nothing but a refusal is raised, and whoever runs the model sees one of the two scales or none."""
    decoder, tokens, outcomes = make_decoder(n_layers=1), random_tokens(), []
    wanted = {value: scaled(decoder, value)(tokens) for value in (1.5, 2.0)}
    plain = decoder(tokens)

    def work(value):
        for _ in range(6):
            try:
                with HeadScale(decoder, value):
                    outcomes.append((decoder(tokens) - wanted[value]).abs().max().item() < 1e-5)
            except ProbeError as error:
                outcomes.append("is scaled already" in str(error))
            except Exception as error:
                outcomes.append(error)

    threads = [threading.Thread(target=work, args=(value,)) for value in (1.5, 2.0)]
    for thread in threads:
        thread.start()
    for _ in range(6):
        seen = decoder(tokens)
        assert seen.isfinite().all()
    for thread in threads:
        thread.join()
    assert outcomes == [True] * 12
    assert torch.equal(decoder(tokens), plain)
