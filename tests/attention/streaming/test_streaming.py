import math

import numpy as np
import pytest
import torch
from peak_memory import peak_bytes
from scipy import stats
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from probe.attention import StreamTemplate, attention_inputs, stream, stream_attention
from probe.errors import ProbeError
from probe.limits import limits
from probe.models.encodings import ENCODINGS, alibi_slopes, t5_bucket
from probe.models.lens import to_bridge
from probe.tracing import trace

ROWS = ("entropy", "mean_distance", "first", "previous", "self_", "log_normaliser")


def random_qk(heads, kv_heads, n, d_head, std=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    # Scores of this standard deviation at scale d_head^-1/2.
    q = torch.randn(heads, n, d_head, generator=generator) * std
    return q, torch.randn(kv_heads, n, d_head, generator=generator)


def pattern_of(scores):
    """ln of the causal pattern, float64 numpy, 0 at future keys, and the pattern."""
    scores = np.where(np.tri(scores.shape[-1], dtype=bool), scores, -np.inf)
    highest = scores.max(-1, keepdims=True)
    log_z = highest + np.log(np.exp(scores - highest).sum(-1, keepdims=True))
    p = np.exp(scores - log_z)
    return np.where(np.isfinite(scores), scores - log_z, 0.0), p, log_z[..., 0]


def dense(scores):
    """The statistics of whole patterns, "head query key" in float64."""
    log_p, p, log_z = pattern_of(scores)
    position = np.arange(p.shape[-1])
    return {
        "entropy": -(p * log_p).sum(-1),
        "mean_distance": (p * (position[:, None] - position)).sum(-1),
        "first": p[..., 0],
        "previous": np.pad(np.diagonal(p, -1, 1, 2), ((0, 0), (1, 0))),
        "self_": np.diagonal(p, 0, 1, 2),
        "log_normaliser": log_z,
        "histogram": np.stack([np.diagonal(p, -d, 1, 2).sum(-1) for d in position], -1) / len(position),
    }


def dense_divergence(scores, template_scores):
    (log_p, p, _), (log_t, t, _) = pattern_of(scores), pattern_of(template_scores)
    log_m = np.logaddexp(log_p, log_t) - math.log(2)
    js = (p * (log_p - log_m)).sum(-1) / 2 + (t * (log_t - log_m)).sum(-1) / 2
    return {"kl": (p * (log_p - log_t)).sum(-1), "reverse_kl": (t * (log_t - log_p)).sum(-1), "jensen_shannon": js}


def dense_scores(q, k, scale, bias=None):
    k = k.repeat_interleave(len(q) // len(k), dim=0)
    scores = scale * q.double().numpy() @ k.double().numpy().transpose(0, 2, 1)
    return scores if bias is None else scores + by_query(bias)


def by_query(bias):
    bias, position = np.asarray(bias, dtype=np.float64), np.arange(bias.shape[-1])
    return bias[:, np.maximum(position[:, None] - position, 0)]


def close(got, want, tolerance=1e-4):
    assert not got.isnan().any()
    np.testing.assert_allclose(got.double().numpy(), want, atol=tolerance, rtol=tolerance)


def templates_of(heads):
    table = 2 * torch.randn(32, heads, generator=torch.Generator().manual_seed(5))
    return {
        "alibi": StreamTemplate.alibi(alibi_slopes(8)[:heads]),  # from 2^-1 …
        "shallow": StreamTemplate.alibi(alibi_slopes(8).flip(0)[:heads]),  # … and from 2^-8
        "rising": StreamTemplate.alibi(torch.full((heads,), -0.25)),
        "uniform": StreamTemplate.alibi(torch.zeros(heads)),
        "t5": StreamTemplate.t5(table),
        "t5, far larger": StreamTemplate.t5(table * 10),
    }


CASES = {
    "of any length": (8, 8, 333, 16, 1.0),
    "grouped heads": (4, 2, 260, 64, 2.0),
    "one kv head, odd d_head": (3, 1, 129, 5, 1.0),
    "length 1": (2, 2, 1, 8, 1.0),
    "length 2": (1, 1, 2, 8, 1.0),
    "one head": (1, 1, 700, 32, 1.0),
    "large scores": (8, 4, 400, 64, 20.0),
}


@pytest.mark.parametrize("path", ["fused", "blocks"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_both_paths_equal_the_whole_pattern(case, path):
    heads, _, n, d_head, std = case
    q, k = random_qk(*case)
    templates = templates_of(heads)
    got = stream_attention(q, k, scale=d_head**-0.5, templates=templates, path=path)
    scores = dense_scores(q, k, d_head**-0.5)
    want = dense(scores)
    for name in ROWS:
        assert getattr(got, name).shape == (heads, n)
        close(getattr(got, name), want[name])
    for name, template in templates.items():
        if std > 10 and name == "t5, far larger":
            continue  # scores and biases of hundreds of nats: there float32 has no 1e-4 to give
        found = got.divergence[name]
        want = dense_divergence(scores, by_query(template.bias(n)))
        close(found.kl, want["kl"])
        close(found.reverse_kl, want["reverse_kl"])
        close(found.symmetric_kl, want["kl"] + want["reverse_kl"], 2e-4)
        assert found.jensen_shannon is None


@pytest.mark.parametrize("block", [1, 1000, 5000, 2**22])
def test_blocks_with_a_bias_give_every_statistic(block):
    q, k = random_qk(2, 1, 150, 8, std=2.0)
    bias = torch.randn(2, 150, generator=torch.Generator().manual_seed(3))
    templates = templates_of(2) | {"any": StreamTemplate.by_distance(torch.linspace(0, 3, 300).sin().repeat(2, 1))}
    asked = {"bias": bias, "templates": templates, "histogram": True, "jensen_shannon": True}
    with limits(pattern_block=block):
        got = stream_attention(q, k, scale=0.4, **asked)
    scores = dense_scores(q, k, 0.4, bias)
    want = dense(scores)
    for name in (*ROWS, "histogram"):
        close(getattr(got, name), want[name])
    close(got.histogram.sum(-1), 1.0, 1e-6)
    # The same mean in another way: attended distance is what the histogram says it is.
    close(got.histogram @ torch.arange(150.0), want["mean_distance"].mean(-1))
    for name, template in templates.items():
        for kind, value in dense_divergence(scores, by_query(template.bias(150))).items():
            close(getattr(got.divergence[name], kind), value)
    assert all((d.jensen_shannon <= math.log(2)).all() for d in got.divergence.values())


def test_scipy_says_the_same_of_single_rows():
    q, k = random_qk(2, 2, 40, 8)
    slope = torch.tensor([0.5, 0.01])
    templates = {"alibi": StreamTemplate.alibi(slope)}
    for path in ("fused", "blocks"):
        got = stream_attention(q, k, scale=0.3, templates=templates, path=path)
        for head in range(2):
            for t in (0, 1, 17, 39):
                p = np.exp(0.3 * (k[head, : t + 1] @ q[head, t]).double().numpy())
                template = np.exp(-float(slope[head]) * np.arange(t, -1, -1))
                found = got.divergence["alibi"]
                assert float(got.entropy[head, t]) == pytest.approx(stats.entropy(p), abs=1e-5)  # it normalises
                assert float(found.kl[head, t]) == pytest.approx(stats.entropy(p, template), abs=1e-5)
                assert float(found.reverse_kl[head, t]) == pytest.approx(stats.entropy(template, p), abs=1e-5)


@pytest.mark.parametrize("path", ["fused", "blocks"])
def test_constant_scores_attend_to_all_keys_alike(path):
    q, k = torch.zeros(2, 100, 8), random_qk(1, 2, 100, 8)[1]
    got = stream_attention(q, k, scale=1.0, templates={"uniform": StreamTemplate.alibi(torch.zeros(2))}, path=path)
    t = np.arange(100)[None].repeat(2, 0)
    close(got.entropy, np.log(t + 1), 1e-6)
    close(got.mean_distance, t / 2, 1e-5)
    close(got.first, 1 / (t + 1), 1e-6)
    close(got.divergence["uniform"].symmetric_kl, 0.0, 2e-6)


def test_an_alibi_models_attention_is_its_own_template():
    slopes = alibi_slopes(4)
    template = StreamTemplate.alibi(slopes)
    got = stream_attention(
        torch.zeros(4, 300, 8),
        torch.zeros(4, 300, 8),
        scale=1.0,
        bias=template.bias(300).float(),
        templates={"alibi": template},
        jensen_shannon=True,
    )
    close(got.divergence["alibi"].symmetric_kl, 0.0, 1e-5)
    close(got.divergence["alibi"].jensen_shannon, 0.0, 1e-6)
    # Σ_{d ≤ t} d r^d / Σ r^d for r = exp(-m), of the geometric series; its tail is of no account at the last query.
    r = np.exp(-slopes[:2].numpy())
    close(got.mean_distance[:2, -1], r / (1 - r))


def test_templates_are_what_they_say():
    table = torch.randn(32, 3, generator=torch.Generator().manual_seed(1))
    bias = table.double()[t5_bucket(torch.arange(500))].T
    t5 = StreamTemplate.t5(table)
    assert t5.near.shape[1] == 113  # the distance from which on T5's last bucket is used
    for n in (1, 113, 114, 500):
        assert torch.equal(t5.bias(n), bias[:, :n])
    torch.testing.assert_close(
        StreamTemplate.alibi(torch.tensor([0.5, -1.0])).bias(3),
        -torch.tensor([[0, 0.5, 1], [0, -1, -2]], dtype=torch.float64),
    )
    assert torch.equal(StreamTemplate.by_distance(bias).bias(20), bias[:, :20])


def test_double_is_exact_and_half_is_read_as_float():
    q, k = random_qk(2, 2, 90, 8)
    templates = templates_of(2)
    exact = stream_attention(q.double(), k.double(), scale=0.3, templates=templates)
    want = dense(dense_scores(q, k, 0.3))
    for name in ROWS:
        close(getattr(exact, name), want[name], 1e-10)
    half = stream_attention(q.bfloat16(), k.bfloat16(), scale=0.3, templates=templates)
    want = stream_attention(q.bfloat16().float(), k.bfloat16().float(), scale=0.3, templates=templates)
    assert torch.equal(half.entropy, want.entropy) and half.entropy.dtype == torch.float32


def test_positions_are_exact_on_a_long_sequence():
    # All attention on the previous key, 6,000 tokens, more stretches than by default: the distance is 1, not 1 ± 1e-3.
    n = 6000
    k = torch.randint(2, (1, n, 64), generator=torch.Generator().manual_seed(0)) * 2.0 - 1  # nearly orthogonal codes
    with limits(fused_stretch=300):
        got = stream_attention(k.roll(1, dims=1), k, scale=3.0)
    close(got.mean_distance[:, 1:], 1.0)
    close(got.previous[:, 1:], 1.0)


def test_inputs_stay_and_nothing_wants_a_gradient():
    q, k = random_qk(2, 1, 30, 8)
    before = q.clone(), k.clone()
    got = stream_attention(q.requires_grad_(), k, scale=0.3, templates=templates_of(2), histogram=True)
    assert torch.equal(q, before[0]) and torch.equal(k, before[1])
    assert not got.entropy.requires_grad


BEYOND_DISTANCE = ("fire", "transformer_xl", "cope", "alibi_keys")


@pytest.mark.parametrize("options", [{}, {"n_kv_heads": 2, "d_head": 6}], ids=str)
@pytest.mark.parametrize("encoding", [name for name in ENCODINGS if name not in BEYOND_DISTANCE])
def test_a_models_attention_is_its_patterns(encoding, options, make_decoder, random_tokens):
    decoder = make_decoder(encoding=encoding, n_ctx=150, **options)
    tokens, lengths = random_tokens(batch=2, length=150), torch.tensor([150, 37])
    templates = templates_of(4)
    patterns = trace(decoder.double(), tokens, ["attn.hook_pattern"])
    decoder.float()
    for model in (decoder, to_bridge(decoder)):
        streams = [
            stream(model, tokens, templates, lengths=lengths),
            stream(model, tokens, templates, lengths=lengths, histogram=True, jensen_shannon=True),
        ]
        for layer in range(2):
            for sequence, n in enumerate(lengths.tolist()):
                # ln P stands for the scores: their softmax is P.
                scores = patterns.pattern(layer)[sequence, :, :n, :n].log().numpy()
                want = dense(scores)
                for streamed in streams:
                    got = streamed.layers[layer]
                    for name in set(ROWS) - {"log_normaliser"}:
                        close(getattr(got, name)[sequence, :, :n], want[name])
                        assert getattr(got, name)[sequence, :, n:].isnan().all()
                    for name, template in templates.items():
                        divergence = dense_divergence(scores, by_query(template.bias(n)))
                        close(got.divergence[name].kl[sequence, :, :n], divergence["kl"])
                        close(got.divergence[name].reverse_kl[sequence, :, :n], divergence["reverse_kl"])
                close(streams[1].layers[layer].histogram[sequence, :, :n], want["histogram"])
                assert (streams[1].layers[layer].histogram[sequence, :, n:] == 0).all()


@pytest.mark.parametrize("encoding", BEYOND_DISTANCE)
def test_scores_that_depend_on_more_than_the_distance_are_refused(encoding, make_decoder, random_tokens):
    decoder, seen = make_decoder(encoding=encoding), []
    for model in (decoder, to_bridge(decoder)):
        with pytest.raises(ProbeError, match="streaming wants .* distance alone, got"):
            attention_inputs(model, random_tokens(), lambda layer, inputs: None)
    hybrid = make_decoder(encoding=encoding, position_layers=(1,))
    attention_inputs(hybrid, random_tokens(), lambda layer, inputs: seen.append(layer), layers=[0])
    assert seen == [0]


def test_randomized_positions_are_refused_where_they_add_to_the_scores(make_decoder, random_tokens):
    turning, adding = (make_decoder(encoding="randomized", encoding_options={"base": b}) for b in ("rotary", "alibi"))
    patterns = trace(turning, random_tokens(), ["attn.hook_pattern"])
    want = dense(patterns.pattern(1)[0].double().log().numpy())["entropy"]
    close(stream(turning, random_tokens()).layers[1].entropy[0], want)
    with pytest.raises(ProbeError, match="depends on the distance alone, got Randomized"):
        stream(adding, random_tokens())


def test_hybrid_layers_have_a_bias_only_where_they_see_position(make_decoder, random_tokens):
    for encoding in ("alibi", "t5"):
        decoder = make_decoder(encoding=encoding, position_layers=(1,))
        seen = {}
        attention_inputs(decoder, random_tokens(), seen.__setitem__)
        assert seen[0].bias is None and seen[1].bias.shape == (4, 16)
        scores = trace(decoder, random_tokens(), ["attn.hook_attn_scores"]).scores(1)
        ours = (
            seen[1].q @ seen[1].k.transpose(-1, -2) * seen[1].scale + torch.from_numpy(by_query(seen[1].bias)).float()
        )
        visible = torch.ones(16, 16, dtype=torch.bool).tril()
        torch.testing.assert_close(ours[..., visible], scores[..., visible])


def test_only_what_was_asked_for_is_visited_and_no_more_is_computed(make_decoder, random_tokens):
    decoder = make_decoder(n_layers=4)
    decoder.train()
    decoder.layers[2].attention.o_proj.weight.data.fill_(torch.nan)  # what comes after would be NaN
    seen = []
    attention_inputs(decoder, random_tokens(), lambda layer, inputs: seen.append(layer), layers=[2, 0])
    assert seen == [0, 2]
    assert decoder.training
    assert list(stream(decoder, random_tokens(), layers=[1]).layers) == [1]


def test_rows_are_means_over_sequences_and_bins(make_decoder, random_tokens):
    decoder, tokens, lengths = make_decoder(), random_tokens(), torch.tensor([16, 5, 16])
    streamed = stream(decoder, tokens, templates_of(4), lengths=lengths, histogram=True)
    rows = streamed.rows()
    assert list(rows.columns) == ["layer", "head", "query", "metric", "template", "value", "n", "n_visible"]
    assert len(rows) == 2 * 4 * 16 * (5 + 3 * len(templates_of(4)))
    row = rows[(rows.layer == 1) & (rows["head"] == 2) & (rows["query"] == 9)].set_index(["metric", "template"])
    kl = streamed.layers[1].divergence["t5"].kl[[0, 2], 2, 9]
    assert row.loc[("kl", "t5"), "value"] == pytest.approx(float(kl.mean()))
    assert (row["n"] == 2).all()
    pooled = streamed.rows(n_bins=4)
    assert sorted(set(pooled["query"])) == [1.5, 5.5, 9.5, 13.5]
    assert set(pooled["n"]) == {12, 9, 8}
    entropy = pooled[(pooled.metric == "entropy") & (pooled.layer == 0) & (pooled["head"] == 3)]
    values = streamed.layers[0].entropy[:, 3, 4:8]
    assert entropy["value"].iloc[1] == pytest.approx(float(values[~values.isnan()].mean()), rel=1e-6)
    mass = streamed.histogram_rows(n_bins=16)
    assert len(mass) == 2 * 4 * 16
    np.testing.assert_allclose(mass.groupby(["layer", "head"])["value"].sum(), 1, atol=1e-6)
    with pytest.raises(ProbeError, match="make it with histogram=True"):
        stream(decoder, tokens).histogram_rows()
    with pytest.raises(ProbeError, match="n_bins must be at least 1, got 0"):
        streamed.rows(0)


def bridge_of(model):
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    return build_bridge_from_module(model.eval(), type(model).__name__, hf_config=model.config)


def test_bridges_of_hugging_face_models(random_tokens):
    torch.manual_seed(0)
    tokens = random_tokens()
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=19, n_positions=32, n_embd=32, n_layer=2, n_head=4))
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=19,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
        )
    )
    for model in (gpt2, llama):
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.data.mul_(8)  # for patterns that are not uniform
        bridge = bridge_of(model)
        streamed, traced = stream(bridge, tokens), trace(bridge, tokens, ["attn.hook_pattern"])
        for layer in range(2):
            for sequence in range(3):
                want = stats.entropy(traced.pattern(layer)[sequence].numpy(), axis=-1)
                close(streamed.layers[layer].entropy[sequence], want)
                assert want[:, 1:].min() < 0.9 * math.log(2)
    bloom = bridge_of(BloomForCausalLM(BloomConfig(vocab_size=19, hidden_size=32, n_layer=2, n_head=4)))
    with pytest.raises(ProbeError, match=r"the pattern of layer 0 is not softmax\(scale q·k\): the model has a bias"):
        stream(bloom, tokens)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": torch.full((2, 5, 4), math.nan)}, "q must be finite, got NaN or infinity"),
        ({"k": torch.full((2, 5, 4), -math.inf)}, "k must be finite, got NaN or infinity"),
        ({"k": torch.zeros(2, 6, 4)}, r"as many queries as keys, got \(2, 5, 4\) and \(2, 6, 4\)"),
        ({"q": torch.zeros(2, 0, 4), "k": torch.zeros(2, 0, 4)}, r"got \(2, 0, 4\) and \(2, 0, 4\)"),
        ({"q": torch.zeros(3, 5, 4)}, r"number of heads \(3\) must be divisible by that of kv_heads \(2\)"),
        ({"k": torch.zeros(2, 5, 4, dtype=torch.float64)}, "of one dtype, got torch.float32 and torch.float64"),
        ({"scale": math.inf}, "scale must be finite, got inf"),
        ({"bias": torch.zeros(2, 4)}, r"bias must be of shape \(2, 5\) \(head, distance\), got \(2, 4\)"),
        ({"bias": torch.full((2, 5), math.nan)}, "bias must be finite"),
        ({"templates": {"a": StreamTemplate.alibi(torch.ones(3))}}, "'a' must be one for 2 heads, got one for 3"),
        (
            {"templates": {"a": StreamTemplate.by_distance(torch.ones(2, 4))}},
            "bias for 4 distances, got .* of 5 tokens",
        ),
        ({"path": "fast"}, "unknown path 'fast'; known: auto, blocks, fused"),
        ({"path": "fused", "histogram": True}, "the fused path knows no float64, bias, window, histogram"),
    ],
)
def test_bad_input_is_one_clear_line(change, message):
    inputs = {"q": torch.zeros(2, 5, 4), "k": torch.zeros(2, 5, 4), "scale": 0.5} | change
    with pytest.raises(ProbeError, match=message) as caught:
        stream_attention(inputs.pop("q"), inputs.pop("k"), **inputs)
    assert "\n" not in str(caught.value)


def test_bad_templates_models_and_layers(make_decoder, random_tokens):
    with pytest.raises(ProbeError, match="a template's slope must be finite"):
        StreamTemplate.alibi(torch.tensor([math.nan]))
    with pytest.raises(ProbeError, match="a template's near must be finite"):
        StreamTemplate.t5(torch.full((32, 2), math.inf))
    with pytest.raises(ProbeError, match="model must be a Decoder, .* got Linear"):
        stream(torch.nn.Linear(2, 2), random_tokens())
    with pytest.raises(ProbeError, match=r"layers must be some of .* got \[0, 2\]"):
        stream(make_decoder(), random_tokens(), layers=[2, 0])
    with pytest.raises(ProbeError, match="lengths must be 3 numbers in 1…16, got"):
        stream(make_decoder(), random_tokens(), lengths=torch.tensor([1, 2, 17]))
    with pytest.raises(ProbeError, match="at least one sequence of one token"):
        stream(make_decoder(), random_tokens()[:0])


AT_16K = """
import torch

torch.set_grad_enabled(False)
from probe import Decoder, DecoderConfig
from probe.attention import StreamTemplate, stream, stream_attention
from probe.models.encodings import alibi_slopes

n, generator = 16384, torch.Generator().manual_seed(0)
def templates(heads):
    return {
        "alibi": StreamTemplate.alibi(alibi_slopes(heads)),
        "t5": StreamTemplate.t5(torch.randn(32, heads, generator=generator)),
    }
q, k = torch.randn(2, 8, n, 64, generator=generator).unbind()
fused = stream_attention(q, k, scale=0.125, templates=templates(8))
# Blocks have as many rows as fit into a fixed size: of fewer heads, more. One head needs as much memory as eight.
one = {"alibi": StreamTemplate.alibi(alibi_slopes(1))}
blocks = stream_attention(q[:1], k[:1], scale=0.125, templates=one, histogram=True, jensen_shannon=True)
for name in ("entropy", "mean_distance", "first", "previous", "self_"):
    torch.testing.assert_close(getattr(fused, name)[:1], getattr(blocks, name), atol=1e-4, rtol=1e-4)
assert abs(float(blocks.histogram.sum()) - 1) < 1e-5
for encoding, heads in (("none", 8), ("alibi", 1)):
    shape = dict(d_vocab=19, n_ctx=n, n_layers=2, d_model=32, n_heads=heads)
    decoder = Decoder(DecoderConfig(**shape, encoding=encoding))
    tokens = torch.randint(19, (1, n), generator=generator)
    assert decoder(tokens).isfinite().all()
    streamed = stream(decoder, tokens, templates(heads), layers=[1])
    assert streamed.layers[1].entropy.isfinite().all()
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_square_of_the_length():
    # One float32 pattern of 8 heads would take 8 GiB.
    assert peak_bytes(AT_16K) < 1.5e9
