"""The edges: extreme scores, weights of exactly 0 and 1, one token, one sequence, padding, half precision, NaN.

At each a measurement gives the right number, or is refused in one line.
"""

import dataclasses
import math

import measured as m
import numpy as np
import pandas as pd
import pytest
import torch
from patterns import make_trace

import probe
from probe import attention, extrapolation, position, training
from probe.attention.pooling import pooled_pattern
from probe.errors import ProbeError
from probe.position.edits.subspaces import concept_subspace
from probe.tracing import distinct

FEW = m.FEW


def refused(found):
    """What was found, or the error in its place, which is one line that says what was wanted and what was got."""
    try:
        return found()
    except ProbeError as error:
        assert "\n" not in str(error) and str(error)
        return str(error)


TEMPLATES = ("uniform", "previous_token", "alibi", "alibi_fitted", "window", "sink_t5")

# What reads a model, and what it measures at an edge where the float32 of the model itself is not in question.
MEASURED = {
    "compare_templates": lambda given: attention.compare_templates(given.trace(), TEMPLATES, **FEW).drop(
        columns="slope"
    ),
    "distance_from_template": m.distance_from_template,
    "compare_models": m.compare_models,
    "compare_to": m.compare_to,
    "attention_summary": m.summary_values,
    "attention_maps": m.attention_maps,
    "census": m.census,
    "attention_on": m.attention_on,
    "by_layer_encoding": m.by_layer_encoding,
    "split_scores": m.split_scores,
    "split_long_context": m.split_long_context,
    "stream": m.stream,
    "compare_long_context": m.compare_long_context,
    "fit_position_probe": m.fit_position_probe("ridge"),
    "fit_position_probe, logistic": m.fit_position_probe("logistic"),
    "pair_probe": m.pair_probe,
    "probe_over_training": m.probe_over_training,
    "decompose_hidden": m.geometry("decompose_hidden"),
    "neighbour_similarity": m.geometry("neighbour_similarity"),
    "variance_by_position": m.geometry("variance_by_position"),
    "erase_position": m.erase_position,
    "steer_position": m.steer_position,
    "patch_position": m.patch_position,
    "name_mechanism": m.name_mechanism,
    "shifted_texts": m.shifted_texts,
    "perplexity": m.perplexity,
    "loss_by_position": m.loss_by_position,
}
measurements = pytest.mark.parametrize("measure", MEASURED.values(), ids=MEASURED)

# Scores.


def sharpen(decoder):
    """Scores of up to ±1e4: nearly all weights are exactly 0 or 1, in float32."""
    for layer in decoder.layers:
        layer.attention.q_proj.weight.mul_(200)


def test_sharpened_scores_are_extreme_and_weights_are_exactly_0_and_1():
    traced = m.Inputs(m.single, change=sharpen).trace()
    scores, pattern = traced.scores(0), traced.pattern(0)[:, :, 1:]
    assert scores[scores.isfinite()].abs().max() > 1e4
    assert (pattern == 0).double().mean() > 0.8 and (pattern == 1).any(-1).double().mean() > 0.5


@pytest.mark.parametrize("name", [name for name in MEASURED if name != "name_mechanism"])
def test_extreme_scores(name):
    found, wanted = (MEASURED[name](m.Inputs(cast, change=sharpen)) for cast in (m.single, m.double))
    # float32 rounds a score of 1e4 by 5e-4, so that two that are near each other share their row a little differently.
    assert m.error(found, wanted) < 1e-3


def test_a_mechanism_is_named_with_extreme_scores():
    assert not m.name_mechanism(m.Inputs(m.single, change=sharpen))["value"].isna().any()


@pytest.mark.parametrize("largest", [400, 1e3, 1e4])
@pytest.mark.parametrize("path", ["auto", "blocks"])
@pytest.mark.parametrize("biased", [False, True])
def test_streams_keep_their_promise_at_extreme_scores(path, largest, biased):
    q, k = m.queries_and_keys(m.Inputs(m.single), largest)
    bias = 1e4 - torch.arange(40.0).expand(4, -1) if biased else None
    options = {"scale": 0.25, "bias": bias, "templates": m.stream_templates()}
    found = attention.stream_attention(q, k, path=path, **options)
    exact = attention.stream_attention(q.double(), k.double(), **options)
    assert found.entropy.dtype == torch.float32
    assert m.error(found, exact) < 1e-4
    assert m.error(pooled_pattern(q, k, 0.25, bias, 7), pooled_pattern(q.double(), k.double(), 0.25, bias, 7)) < 1e-5


def test_the_fused_path_refuses_scores_that_it_would_round():
    q, k = m.queries_and_keys(m.Inputs(m.single), 1e4)
    with pytest.raises(ProbeError, match="the fused path knows no .* scores that may be above 500 nats: use 'blocks'"):
        attention.stream_attention(q, k, scale=0.25, path="fused")


def test_extreme_logits_have_a_finite_loss():
    def sure(decoder):
        decoder.head.weight.mul_(1e4)

    found, exact = (
        extrapolation.perplexity(m.Inputs(cast, change=sure).model(), m.tokens(), (8,), **FEW).set_index("metric")
        for cast in (m.single, m.double)
    )
    assert found.loc["loss", "value"] == pytest.approx(exact.loc["loss", "value"], rel=1e-5)
    assert found.loc["loss", "value"] > 1e3 and found.loc["perplexity", "value"] == math.inf  # beyond all floats


# Weights.

ONE_KEY = {
    "first_token": lambda query: 0 * query,
    "previous_token": lambda query: (query - 1).clamp(min=0),
    "diagonal": lambda query: query,
}


def on_one_key(key, n=12):
    query = torch.arange(n)
    return torch.nn.functional.one_hot(ONE_KEY[key](query), n).float().expand(4, 2, n, n)


@pytest.mark.parametrize("key", ONE_KEY)
def test_all_attention_on_one_key_has_exact_rows(key):
    rows = attention.attention_summary(make_trace(on_one_key(key)), **FEW).set_index("metric")
    query = np.tile(np.arange(12), 2)
    attended = ONE_KEY[key](torch.from_numpy(query)).numpy()
    assert (rows.loc["entropy", ["value", "low", "high"]] == 0).all(axis=None)
    assert (rows.loc["mean_distance", "value"].to_numpy() == query - attended).all()
    assert (rows.loc["self", "value"].to_numpy() == (attended == query)).all()


@pytest.mark.parametrize("key", ONE_KEY)
def test_all_attention_on_one_key_is_its_template(key):
    rows = attention.compare_templates(make_trace(on_one_key(key)), distances=[*attention.DISTANCES], **FEW)
    value = rows[rows["head"] == 0].pivot(index="template", columns="metric", values="value")
    assert (value.loc[key] == 0).all() and not value.isna().any(axis=None)
    # The fitted ones end 1e-8 or so short of a weight of 1, and give no key exactly 0.
    near = {"first_token": "first_token_sink", "previous_token": "previous_token_leaky", "diagonal": "diagonal_leaky"}
    assert (value.loc[near[key], ["jensen_shannon", "total_variation"]] < 1e-6).all()
    other = value.loc[[each for each in ONE_KEY if each != key]]
    assert (other[["symmetric_kl", "mcgill_compat"]] == math.inf).all(axis=None)
    assert (other["jensen_shannon"] <= math.log(2)).all()


def test_rows_that_share_no_key_are_as_far_as_can_be():
    a, b = on_one_key("first_token"), on_one_key("diagonal")
    wanted = {"jensen_shannon": 11 / 12 * math.log(2), "symmetric_kl": math.inf, "total_variation": 11 / 12}
    wanted |= {"hellinger": 11 / 12, "wasserstein": sum(range(12)) / 12, "mcgill_compat": math.inf}
    for name, value in wanted.items():
        torch.testing.assert_close(attention.pattern_distance(a, b, name), torch.full((4, 2), value).double())
        torch.testing.assert_close(attention.head_pair_distances(a, b, name), torch.full((4, 2, 2), value).double())


# Short and few.

# The columns that say of what a number is, and those that have none by their definition: a slope of a template that has
# none, what is explained where there is nothing to explain, an interval over one sequence, what no layer has.
WITHOUT = (
    "p",
    "slope",
    "explained",
    "null_seed",
    "null_seed_low",
    "null_seed_high",
    "low",
    "high",
    "layer",
    "shift",
    "length",
)


def missing(found):
    """Numbers that are NaN and need not be."""
    if isinstance(found, pd.DataFrame):
        values = found.drop(columns=[name for name in WITHOUT if name in found])
        if "metric" in values:
            # With two distances there is one difference of them, and of a line nothing to be told.
            values = values[~values["metric"].isin(["logarithm_r2", "alibi_r2", "t5_r2", "toeplitz_r2"])]
        return int(values.select_dtypes("float").isna().sum().sum())
    if isinstance(found, (list, tuple)):
        return sum(map(missing, found))
    if dataclasses.is_dataclass(found):
        return sum(missing(getattr(found, field.name)) for field in dataclasses.fields(found))
    return int(np.isnan(m.numbers(found)[0]).sum())


@pytest.mark.parametrize("shape", [(24, 1), (24, 2), (1, 16)], ids=str)
@measurements
def test_short_and_few(measure, shape):
    few = m.tokens()[: shape[0], : shape[1]]
    found, exact = (refused(lambda cast=cast: measure(m.Inputs(cast, few))) for cast in (m.single, m.double))
    if isinstance(exact, str):
        assert found == exact and ("got" in exact or "must" in exact)
    else:
        assert missing(found) == 0
        values, wanted = m.numbers(found)[0], m.numbers(exact)[0]
        # Of templates that are equally near within rounding another may be named.
        assert len(values) == len(wanted) and m.error(values, wanted) < 1e-3


# Padding.


PADDED = torch.full((m.N,), 12)
DECODER = m.decoder("t5")
AT = torch.arange(m.T).expand(m.N, -1)


def of_trace(measure):
    return lambda tokens, lengths, cut: measure(probe.trace(DECODER, tokens, m.SITES, lengths=lengths))


def of_model(measure):
    """What measures a model; ``cut`` takes a mask to the tokens that there are."""
    return lambda tokens, lengths, cut: measure(tokens, cut, lengths=lengths, **FEW)


WITH_LENGTHS = {
    "compare_templates": of_trace(lambda t: attention.compare_templates(t, TEMPLATES, **FEW)),
    "attention_summary": of_trace(lambda t: attention.attention_summary(t, **FEW)),
    "attention_maps": of_trace(lambda t: attention.attention_maps(t, TEMPLATES, bins=8)),
    "compare_models": of_trace(lambda t: attention.compare_models({"a": t, "b": t}, **FEW)),
    "split_scores": of_trace(lambda t: attention.split_scores(t, **FEW)),
    "decompose_hidden": of_trace(lambda t: position.decompose_hidden(t).rows),
    "neighbour_similarity": of_trace(lambda t: position.neighbour_similarity(t, max_lag=5, **FEW)),
    "position_channels": of_trace(lambda t: position.position_channels(t, **FEW)),
    "variance_by_position": of_trace(lambda t: position.variance_by_position(t, **FEW)),
    "census": of_model(lambda t, cut, **how: attention.census(DECODER, t, scored=cut(AT >= 5), **how)),
    "attention_on": of_model(
        lambda t, cut, **how: attention.attention_on(DECODER, t, cut((AT >= 2) & (AT < 4)), cut(AT >= 6), **how)
    ),
    "fit_position_probe": of_model(lambda t, cut, **how: position.fit_position_probe(DECODER, t, **how)),
    "pair_probe": of_model(
        lambda t, cut, **how: position.pair_probe(DECODER, t, ["hook_embed"], n_pairs=200, rank=4, controls=(), **how)
    ),
    "erase_position": of_model(
        lambda t, cut, **how: position.erase_position(DECODER, t, scored=cut(AT >= 5), n_random=1, **how)
    ),
    "patch_position": of_model(
        lambda t, cut, **how: position.patch_position(
            DECODER, t, "blocks.1.hook_resid_pre", (0, 2), scored=cut(AT >= 5), n_random=1, **how
        )
    ),
}


@pytest.mark.parametrize("name", WITH_LENGTHS)
def test_padding_changes_nothing(name):
    """Sequences of 12 tokens, alone and with 4 tokens of anything behind them."""
    plain = WITH_LENGTHS[name](m.tokens()[:, :12], None, lambda mask: mask[:, :12])
    padded = WITH_LENGTHS[name](m.tokens(), PADDED, lambda mask: mask)
    if isinstance(plain, pd.DataFrame) and "control" in plain:  # others are drawn for as many places as there are
        plain, padded = (each[each["control"] == "none"] for each in (plain, padded))
    assert m.error(padded, plain) < 2e-5


def test_padding_changes_no_stream():
    plain = attention.stream(DECODER, m.tokens()[:, :12], histogram=True).layers[1]
    padded = attention.stream(DECODER, m.tokens(), lengths=PADDED, histogram=True).layers[1]
    assert m.error(padded.entropy[..., :12], plain.entropy) < 1e-5 and padded.entropy[..., 12:].isnan().all()
    assert m.error(padded.histogram[..., :12], plain.histogram) < 1e-5 and (padded.histogram[..., 12:] == 0).all()


def test_answers_of_prompts_of_other_lengths_are_those_of_each_alone():
    examples, model = m.examples().test, m.decoder(d_vocab=len(m.COPY.vocabulary))
    alone = [training.predict(model, [e], m.COPY.vocabulary) for e in examples]
    pd.testing.assert_frame_equal(
        training.predict(model, examples, m.COPY.vocabulary), pd.concat(alone, ignore_index=True)
    )


@pytest.mark.parametrize("lengths", [[0, 6, 6], [7, 6, 6], [-1, 6, 6]], ids=str)
def test_lengths_that_do_not_fit_are_refused_everywhere(lengths):
    """A mean over rows that are not there would be too small by as many."""
    p, wrong = m.random_pattern(3, 2, 6), torch.tensor(lengths)
    tokens = m.tokens(3, 6).repeat(2, 1)
    twice = wrong.repeat(2)
    for found in (
        lambda: attention.pattern_distance(p, p, lengths=wrong),
        lambda: attention.head_pair_distances(p, p, lengths=wrong),
        lambda: attention.head_pair_distances(p, p, "wasserstein", lengths=wrong),
        lambda: attention.check_pattern(p, wrong),
        lambda: attention.TEMPLATES["alibi_fitted"](p, wrong),
        lambda: probe.trace(m.decoder(), tokens, lengths=twice),
        lambda: attention.stream(m.decoder(), tokens, lengths=twice),
        lambda: position.fit_position_probe(m.decoder(), tokens, lengths=twice),
        lambda: position.erase_position(m.decoder(), tokens, lengths=twice),
        lambda: position.patch_position(m.decoder("t5"), tokens, "blocks.1.hook_resid_pre", lengths=twice),
    ):
        with pytest.raises(ProbeError, match=r"^lengths must be [36] numbers in 1…6, got \["):
            found()


# The one door for tokens, and which of them count.


BY_SEQUENCE = ("stream", "distance_from_template")  # give a number for each sequence as it was given


@pytest.mark.parametrize("name", [name for name in MEASURED if name not in BY_SEQUENCE])
def test_a_sequence_that_is_given_twice_counts_once(name):
    """The same numbers, the same n; and the ids may be of any integer type."""
    twice = torch.cat((m.tokens(), m.tokens())).to(torch.int16)
    assert m.error(MEASURED[name](m.Inputs(m.single, twice)), MEASURED[name](m.Inputs(m.single))) < 1e-9


IDS = {
    "int8": lambda x: x.to(torch.int8),
    "uint8": lambda x: x.to(torch.uint8),
    "uint16": lambda x: x.to(torch.uint16),
    "numpy": lambda x: x.numpy(),
    "numpy int16": lambda x: x.numpy().astype(np.int16),
    "lists": lambda x: x.tolist(),
    "list of tensors": list,
    "examples": lambda x: training.EncodedExamples(x, torch.ones(len(x), dtype=torch.long), torch.full((len(x),), T)),
}
T = 16
NO_IDS = {
    "bool": (lambda x: x > 3, "tokens must be integers, got torch.bool"),
    "float": (lambda x: x.float(), "tokens must be integers, got torch.float32"),
    "complex": (lambda x: x.to(torch.complex64), "tokens must be integers, got torch.complex64"),
    "meta": (lambda x: x.to("meta"), "tokens must be a dense tensor with values, got a meta tensor"),
    "sparse": (lambda x: x.to_sparse(), "tokens must be a dense tensor with values, got a sparse_coo tensor"),
    "numpy float": (lambda x: x.double().numpy(), "tokens must be integers, got float64"),
    "words": (lambda x: [["a", "b"]], "tokens must be integers, got list"),
    "ragged": (lambda x: [[1, 2], [3]], "tokens must be lists of integers of equal length"),
    "a vector": (lambda x: x[0], r"tokens must hold at least one sequence of one token, got shape \(16,\)"),
    "unknown": (lambda x: x + 5, "token ids must lie in 0…10, got 5…15"),
}
# A door of each kind: hooks, edits, splits of probes, causal experiments, streaming, decoding, texts.
DOORS = {
    "trace": lambda tokens: probe.trace(m.decoder(), tokens, ["hook_embed"]).values,
    "logits_with_edits": lambda tokens: m.logits_with_edits(m.decoder(), tokens),
    "census": lambda tokens: attention.census(m.decoder(), tokens, ablate=False, **FEW),
    "fit_position_probe": lambda tokens: position.fit_position_probe(
        m.decoder(), tokens, ["hook_embed"], controls=(), **FEW
    ),
    "steer_position": lambda tokens: position.steer_position(
        m.decoder(), tokens, "blocks.1.hook_resid_pre", n_random=1, **FEW
    ),
    "split_long_context": lambda tokens: attention.split_long_context(m.decoder(), tokens, **FEW).rows,
}


@pytest.mark.parametrize("door", DOORS)
def test_tokens_may_be_integers_of_any_kind(door):
    wanted = DOORS[door](m.tokens())
    for kind in IDS if door == "trace" else ("numpy int16", "examples"):  # one door reads them all for the others
        assert m.error(DOORS[door](IDS[kind](m.tokens())), wanted) == 0, kind


@pytest.mark.parametrize("door", [*DOORS, "decoder"])
@pytest.mark.parametrize("kind", NO_IDS)
def test_what_is_no_token_is_refused_in_one_line(kind, door):
    convert, message = NO_IDS[kind]
    with pytest.raises(ProbeError, match=message) as caught:
        (DOORS | {"decoder": m.decoder()})[door](convert(m.tokens()))
    assert "\n" not in str(caught.value)


class Unknown(torch.nn.Module):
    """A module that gives logits and that nothing here can look into."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(11, 11)

    def forward(self, tokens):
        return self.table(tokens)


ANSWERS = ("perplexity", "loss_by_position")  # ask a model for its logits and nothing else


@pytest.mark.parametrize(
    "kind", [Unknown, lambda: torch.nn.Linear(2, 2), torch.nn.Module], ids=["logits", "linear", "empty"]
)
@pytest.mark.parametrize("name", [name for name in MEASURED if name != "shifted_texts"])  # whose type says as much
def test_a_module_that_cannot_be_looked_into_is_refused_in_one_line(name, kind):
    if kind is Unknown and name in ANSWERS:
        assert len(MEASURED[name](m.Inputs(lambda made: kind())))
        return
    with pytest.raises(ProbeError) as caught:
        MEASURED[name](m.Inputs(lambda made: kind()))
    assert "\n" not in str(caught.value)


OF_TRACES = {
    "compare_templates": lambda t: attention.compare_templates(t, ["uniform"], **FEW),
    "attention_maps": lambda t: attention.attention_maps(t, bins=8),
    "attention_summary": lambda t: attention.attention_summary(t, **FEW),
    "split_scores": lambda t: attention.split_scores(t, **FEW),
    "compare_models": lambda t: attention.compare_models({"a": t, "b": t}, **FEW),
    "compare_to": lambda t: attention.compare_to({"a": t, "b": t, "c": t}, "a", **FEW),
    "decompose_hidden": lambda t: position.decompose_hidden(t),
    "neighbour_similarity": lambda t: position.neighbour_similarity(t, **FEW),
    "variance_by_position": lambda t: position.variance_by_position(t, **FEW),
    "position_channels": lambda t: position.position_channels(t, **FEW),
}


def by_hand(**values):
    sites = {"pattern": "blocks.0.attn.hook_pattern", "scores": "blocks.0.attn.hook_attn_scores", "x": "hook_embed"}
    return probe.Trace(m.tokens(6, 8), torch.full((6,), 8), {sites[name]: of for name, of in values.items()}, 1)


BROKEN_TRACES = {
    "nothing held": lambda: by_hand(),
    "vectors": lambda: by_hand(pattern=torch.ones(6), scores=torch.ones(6), x=torch.ones(6)),
    "integers": lambda: by_hand(pattern=torch.ones(6, 2, 8, 8).long(), scores=torch.ones(6, 2, 8, 8).long()),
    "other lengths": lambda: by_hand(pattern=torch.eye(5).expand(6, 2, 5, 5), scores=torch.ones(6, 2, 5, 5)),
}


@pytest.mark.parametrize("kind", BROKEN_TRACES)
@pytest.mark.parametrize("name", OF_TRACES)
def test_a_trace_that_is_none_is_refused_in_one_line(name, kind):
    with pytest.raises(ProbeError) as caught:
        OF_TRACES[name](BROKEN_TRACES[kind]())
    assert "\n" not in str(caught.value)


def test_a_trace_by_hand_holds_a_tensor_for_each_sequence():
    with pytest.raises(ProbeError, match="values at 'hook_embed' must be a tensor of 6 sequences, got shape"):
        by_hand(x=torch.zeros(5, 8, 4))
    with pytest.raises(ProbeError, match="trace must be what probe.trace returns, or a Trace made by hand, got dict"):
        distinct({"hook_embed": torch.zeros(6, 8, 4)})


@pytest.mark.parametrize("lengths", [[6.7, 6.0, 6.0], [True, True, True]], ids=str)
def test_lengths_are_integers(lengths):
    for given in (lengths, torch.tensor(lengths), np.array(lengths)):
        with pytest.raises(ProbeError, match="lengths must be integers, got"):
            probe.trace(m.decoder(), m.tokens(3, 6), lengths=given)


# Half precision.

HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
halves = pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)


@measurements
def test_a_model_in_half_precision_is_measured(measure):
    found = measure(m.Inputs(m.half))
    assert missing(found) == 0 and not np.isinf(m.numbers(found)[0]).any()


def in_double(traced):
    """The very same numbers; patterns as what reads them divides them, by the sum of each row."""
    values = {}
    for site, value in traced.values.items():
        values[site] = value.double()
        if site.endswith("hook_pattern"):
            values[site] /= values[site].sum(-1, keepdim=True)
    return dataclasses.replace(traced, values=values)


@halves
def test_what_a_trace_holds_in_half_precision_is_measured_exactly(dtype):
    half = m.Inputs(lambda x: x.to(dtype)).trace("t5")
    exact, other = in_double(half), m.Inputs(m.single).trace("alibi")
    for measure in (
        lambda t: attention.attention_summary(t, **FEW),
        lambda t: attention.compare_templates(t, TEMPLATES, **FEW).drop(columns="slope"),
        lambda t: attention.attention_maps(t, bins=8),
        lambda t: attention.compare_models({"a": t, "b": other}, "symmetric_kl", **FEW),
        lambda t: attention.split_scores(t, **FEW),
        lambda t: position.decompose_hidden(t),
        lambda t: position.neighbour_similarity(t, **FEW),
        lambda t: position.variance_by_position(t, **FEW),
        lambda t: position.position_channels(t, **FEW),
    ):
        assert m.error(measure(half), measure(exact)) < 1e-8


def offset(decoder):
    """Embeddings of which half of the coordinates vary by a small part of their mean."""
    decoder.token_embedding.weight.add_(torch.linspace(0, 40, 32) * (torch.arange(32) % 2))


@halves
@pytest.mark.parametrize(
    "measure",
    [
        lambda i: position.fit_position_probe(i.model(), i.tokens, ["hook_embed"], controls=("shuffled",), **FEW),
        lambda i: position.probe_positions(
            i.model(), i.tokens, ["hook_embed"], targets=("position", "fourier"), controls=("shuffled",), **FEW
        ),
        lambda i: position.pair_probe(i.model(), i.tokens, ["hook_embed"], n_pairs=300, rank=4, controls=(), **FEW),
        lambda i: position.decompose_hidden(i.trace(sites=["hook_embed"])),
        lambda i: position.variance_by_position(i.trace(sites=["hook_embed"]), ["hook_embed"], **FEW),
    ],
    ids=["fit_position_probe", "probe_positions", "pair_probe", "decompose_hidden", "variance_by_position"],
)
def test_states_in_half_precision_are_read_as_the_numbers_that_they_are(measure, dtype):
    """At the embedding, where a model in float64 has the very same states: coordinates that vary by a hundredth of
    their mean are no constants."""
    noise = torch.randint(0, 2, (24, 16), generator=torch.Generator().manual_seed(1))
    telling = (torch.arange(16) * 10 // 16 + noise).clamp(max=10)
    half, exact = (m.Inputs(cast, telling, offset) for cast in (lambda x: x.to(dtype), lambda x: x.to(dtype).double()))
    assert m.error(measure(half), measure(exact)) < 1e-6


@halves
def test_sums_over_many_keys_are_not_made_in_half_precision(dtype):
    # In bfloat16 a sum of ones ends at 256.
    assert attention.pool(torch.eye(1000, dtype=dtype)[None], 1).item() == 1
    q, k = m.queries_and_keys(m.Inputs(lambda x: x.to(dtype)))
    exact = pooled_pattern(q.double(), k.double(), 0.25, bins=5)
    torch.testing.assert_close(pooled_pattern(q, k, 0.25, bins=5), exact, atol=1e-6, rtol=0)


@halves
def test_erased_states_are_rounded_once(dtype):
    x = torch.randn(200, 16, generator=torch.Generator().manual_seed(0)) + 3
    subspace = concept_subspace(x.to(dtype), x[:, :1] + x[:, 1:2])
    exact = subspace.erased(x.to(dtype).double())
    found = subspace.erased(x.to(dtype))
    assert found.dtype == dtype
    assert ((found.double() - exact).abs() <= exact.abs() * torch.finfo(dtype).eps / 2 + 1e-6).all()


# NaN.


WEIGHTS = {
    "logits": "head.weight",
    "states": "layers.1.mlp.down_proj.weight",
    "scores": "layers.1.attention.q_proj.weight",
}


def spoilt(what):
    def change(decoder):
        decoder.get_parameter(WEIGHTS[what])[3] = math.nan

    return change


# What reads neither logits nor states after the spoilt weights has nothing to refuse.
READS = {
    "logits": [
        *("census", "probe_over_training", "erase_position", "patch_position", "name_mechanism"),
        *("shifted_texts", "perplexity", "loss_by_position"),
    ],
    "states": [
        *("fit_position_probe", "fit_position_probe, logistic", "pair_probe", "decompose_hidden"),
        *("neighbour_similarity", "patch_position", "name_mechanism"),
    ],
    "scores": [*MEASURED],
}


@pytest.mark.parametrize(("where", "name"), [(where, name) for where, names in READS.items() for name in names])
def test_nan_in_a_model_is_refused(where, name):
    found = refused(lambda: MEASURED[name](m.Inputs(m.single, change=spoilt(where))))
    assert isinstance(found, str), "a plausible number"
    assert "finite" in found or "nan" in found


@pytest.mark.parametrize(("value", "wanted"), [(math.nan, "must be finite"), (0.5, "must differ between positions")])
def test_a_table_of_positions_that_says_nothing_is_refused(value, wanted):
    with pytest.raises(ProbeError, match=wanted):
        m.position_table(m.Inputs(m.single, change=lambda decoder: decoder.encoding.weight.fill_(value)))


def overflow(decoder):
    decoder.head.weight.mul_(1e38)


@pytest.mark.parametrize("spoil", [spoilt("logits"), overflow], ids=["nan", "infinity"])
def test_a_model_without_finite_logits_gives_no_answers(spoil):
    """Among NaN some token is the likeliest, and an exact match of 0 would look like any other."""
    model = m.Inputs(m.single, change=spoil).model(d_vocab=len(m.COPY.vocabulary))
    data = training.encode(m.examples().test, m.COPY.vocabulary)
    task = m.PASSKEY
    reader = m.Inputs(m.single, change=spoil).model(d_vocab=len(task.vocabulary), n_ctx=256)
    for found in (
        lambda: training.predict(model, m.examples().test, m.COPY.vocabulary),
        lambda: extrapolation.passkey(reader, task, (160,), n=1),
        lambda: extrapolation.sweep_scale(model, data, (1.0, 2.0)),
        lambda: extrapolation.search_scale(model, data, evaluations=3),
        lambda: training.shifted_positions(model, data, (0, 1)),
    ):
        with pytest.raises(ProbeError, match="^a model's logits must be finite, got NaN or infinity"):
            found()


@pytest.mark.parametrize("name", attention.DISTANCES)
def test_distances_of_nan_are_nan(name):
    p = m.random_pattern(2, 2, 6)
    spoilt = p.clone()
    spoilt[1, 0, 3, 2] = math.nan
    for of in (attention.pattern_distance(spoilt, p, name), attention.head_pair_distances(spoilt, p, name)):
        assert of[1, 0].isnan().all() and not of[0].isnan().any() and not of[1, 1].isnan().any()


def test_pools_of_nan_are_nan():
    pattern = m.random_pattern(1, 1, 6)[0]
    pattern[0, 3, 2] = math.nan
    assert attention.pool(pattern, 2).isnan().tolist() == [[[False, False], [True, False]]]


@pytest.mark.parametrize("accuracy", [math.nan, math.inf])
def test_accuracies_that_are_none_are_refused(accuracy):
    results = m.RESULTS.copy()
    results.loc[3, "accuracy"] = accuracy
    for measure in (training.league, training.paired_differences, training.accuracy_by_length):
        with pytest.raises(ProbeError, match="^accuracies must be finite, got "):
            measure(results)


def test_equal_accuracies_tie_in_whatever_order_they_are_summed():
    rows = [("copy", name, 0, length, a) for name in "ab" for length, a in zip((1, 2, 3), (0.1, 0.2, 0.3), strict=True)]
    results = pd.DataFrame(rows, columns=m.RESULTS.columns).astype({"length": "Int64"})
    results.loc[results["encoding"] == "b", "accuracy"] = [0.3, 0.2, 0.1]
    assert results.groupby("encoding")["accuracy"].mean().nunique() == 2  # by rounding
    assert training.league(results).query("metric == 'mean_reciprocal_rank'")["value"].tolist() == [0.75, 0.75]


# Nothing but rounding.

REPEATED = (1 + torch.arange(6))[:, None].repeat(1, 12)  # one token again and again: without positions no state moves


@pytest.mark.parametrize("cast", [m.single, m.double], ids=["float32", "float64"])
def test_what_rounding_makes_has_no_geometry(cast):
    traced = probe.trace(cast(m.decoder()), REPEATED, ["hook_resid_post", "hook_attn_out"])
    site = ["blocks.1.hook_resid_post"]
    shares = position.decompose_hidden(traced, site).rows.query("control == 'none'").set_index("metric")
    assert shares.loc["share_context", "value"] == pytest.approx(1) and shares.loc["share_position", "value"] < 1e-12
    assert shares.loc[["participation_ratio", "components_95"], ["value", "low", "high"]].isna().all(axis=None)
    falls = position.neighbour_similarity(traced, site, **FEW).query("lag.isna()")
    assert (falls[["value", "low", "high"]] == 0).all(axis=None)
    channels = position.position_channels(traced, site, **FEW).query("metric == 'spearman'")
    assert (channels[["value", "low", "high"]] == 0).all(axis=None)
    exponent = position.variance_by_position(traced, **FEW).query("metric == 'exponent'")["value"]
    assert (exponent.abs() < 1e-6).all()


def test_shares_of_rounding_are_none():
    """Scores that differ between sequences and, but for rounding, not within rows."""
    scores = torch.randn(6, 1, 1, 1, generator=torch.Generator().manual_seed(0)).expand(6, 1, 8, 8)
    scores = scores + 1e-8 * torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values = {"blocks.0.attn.hook_attn_scores": scores}
    shares = attention.split_scores(probe.Trace(m.tokens(6, 8), torch.full((6,), 8), values, 1), **FEW).rows
    value = shares.set_index(["scope", "part", "metric"])["value"]
    assert math.isnan(value["mean", "distance", "toeplitz_r2"])
    assert value[[("seen", "distance", f"{name}_r2") for name in ("alibi", "logarithm", "t5")]].isna().all()
    assert value["all", "residual", "share"] == pytest.approx(1)


@pytest.mark.parametrize("cast", [m.single, m.half], ids=["float32", "bfloat16"])
def test_nothing_is_explained_of_uniform_attention(cast):
    long = attention.compare_long_context(cast(m.decoder()), REPEATED, **FEW).rows
    dense = attention.compare_templates(probe.trace(cast(m.decoder()), REPEATED), nulls=False, **FEW)
    assert long["explained"].isna().all() and dense["explained"].isna().all()


def test_a_structural_probe_of_states_that_are_alike_says_no_distance():
    errors = [
        position.pair_probe(
            cast(m.decoder()), REPEATED, ["blocks.1.hook_resid_post"], probes=["structural"], controls=(), **FEW
        )
        for cast in (m.single, m.double)
    ]
    assert m.error(*errors) == 0
    found = errors[0].set_index("metric")["value"]
    assert found["mean_squared_error"] < 12**2


def test_a_strength_is_chosen_alike_where_tokens_are_few():
    """Two tokens a sequence, fewer than there are dimensions: float32 products moved this R² by .2."""
    found, exact = (
        position.probe_positions(m.Inputs(cast).model(), m.tokens()[:, :2], ["hook_embed"], **FEW)
        for cast in (m.single, m.double)
    )
    assert m.error(found, exact) < 1e-6 and found["alpha"].tolist() == exact["alpha"].tolist()
