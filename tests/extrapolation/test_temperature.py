import copy

import pytest
import torch
from torch import nn

from probe.errors import ProbeError
from probe.extrapolation import HeadScale, UniformScale, scaled
from probe.models import checkpoint
from probe.models.clockwork import ClockworkConfig, ClockworkRNN
from probe.models.encodings import ENCODINGS
from probe.models.lens import to_bridge
from probe.tracing import SCORES, trace

SCALES = torch.tensor([[0.5, 1.0, 1.5, 2.0], [1.25, 1.75, 1.0, 3.0]])


def llama(**options):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 19, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, "attn_implementation": "eager", **options})).eval()


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
def test_folded_equals_unfolded(make_decoder, random_tokens, make):
    model = {"decoder": make_decoder, "bridge": lambda: to_bridge(make_decoder()), "llama": llama}[make]()
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


def test_llama_is_scaled_as_by_its_own_scaling():
    model, tokens = llama(), torch.arange(12)[None]
    other = llama()
    for layer in other.model.layers:
        layer.self_attn.scaling *= 1.7
    with UniformScale(model, 1.7):
        assert torch.allclose(model(tokens).logits, other(tokens).logits, atol=1e-5)


def test_folding_leaves_an_ordinary_checkpoint(make_decoder, random_tokens, tmp_path):
    decoder = make_decoder()
    scale = HeadScale(decoder, SCALES)
    expected = decoder(random_tokens())
    with pytest.raises(ProbeError, match="a scale is on its attention: fold or remove it first"):
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
        with pytest.raises(ProbeError, match="a model with linear q_proj of heads of head_dim was wanted"):
            UniformScale(model, 1.1)
    decoder = make_decoder()
    with UniformScale(decoder, 1.1), pytest.raises(ProbeError, match="is scaled already"):
        UniformScale(decoder, 1.1)


def test_normalised_queries_are_refused():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {"vocab_size": 19, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    model = Qwen3ForCausalLM(Qwen3Config(**sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=8))
    with pytest.raises(ProbeError, match="normalises its queries behind W_Q"):
        UniformScale(model, 1.1)
