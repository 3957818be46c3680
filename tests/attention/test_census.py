import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn.functional import cross_entropy

import constructions
from probe.attention import census, census_table
from probe.attention.ablation import ABLATIONS, used_for
from probe.attention.head_census import LABELS, follows_earlier
from probe.errors import ProbeError
from probe.models.decoder import Decoder, DecoderConfig
from probe.models.lens import to_bridge
from probe.statistics import Bootstrap
from probe.tracing import PATTERN, block_site, logits_with_edits, trace

V = 24


def heads(rows, layer):
    return census_table(rows).query("layer == @layer").set_index("head")


def value(rows, metric, head=0, layer=0):
    found = rows.query("metric == @metric and head == @head and layer == @layer")
    assert len(found) == 1
    return found.iloc[0]


def random_tokens(n=24, length=32, first=1, seed=0):
    tokens = torch.randint(first, V, (n, length), generator=torch.Generator().manual_seed(seed))
    tokens[:, 0] = 0
    return tokens


def one_hot_decoder(n_layers, n_slots=2, **options):
    """Zero weights, no norm, and a token's number as a one-hot vector in the first slot of the stream."""
    sizes = {"d_model": n_slots * V, "n_heads": 1, "d_head": V, "d_mlp": 1, "score_scale": 1.0}
    config = DecoderConfig(d_vocab=V, n_ctx=64, n_layers=n_layers, normalization="none", **sizes, **options)
    decoder = Decoder(config, seed=0).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.zero_()
        decoder.token_embedding.weight[:, :V] = torch.eye(V)
    return decoder


@pytest.fixture(scope="module")
def induction():
    """Layer 0 writes the previous token's number into the second slot; layer 1 looks for keys whose previous token is
    the query's token, and writes those keys' tokens; the head predicts them. Olsson et al. 2022."""
    decoder = one_hot_decoder(2, n_slots=3, encoding="t5", position_layers=(0,))
    with torch.no_grad():
        decoder.encoding.weight[1] = 40.0
        first, second = (block.attention for block in decoder.layers)
        first.v_proj.weight[:, :V] = torch.eye(V)
        first.o_proj.weight[V : 2 * V] = torch.eye(V)
        second.q_proj.weight[:, :V] = 30 * torch.eye(V)
        second.k_proj.weight[:, V : 2 * V] = torch.eye(V)
        second.v_proj.weight[:, :V] = torch.eye(V)
        second.o_proj.weight[2 * V :] = torch.eye(V)
        decoder.head.weight[:, 2 * V :] = 8 * torch.eye(V)
    return decoder


def repeated(n=24):
    """<bos>, then tokens without doubles again and again, with another period (6…17) in each sequence: the distance at
    which an induction head looks is not the same, so position cannot stand in for it."""
    generator = torch.Generator().manual_seed(1)
    sequences = [(1 + torch.randperm(V - 1, generator=generator)[: 6 + b % 12]).repeat(4)[:24] for b in range(n)]
    return torch.cat((torch.zeros(n, 1, dtype=torch.long), torch.stack(sequences)), dim=1)


# ---- labels


def test_hand_built_positional_heads_get_their_names():
    decoder = constructions.CONSTRUCTIONS["positional_heads"].build(64)
    tokens = torch.randint(1, decoder.config.d_vocab, (12, 64), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = 0
    rows = census(decoder, tokens, n_bootstrap=20)
    table = heads(rows, decoder.config.n_layers - 1)
    assert table["label"].tolist() == ["diagonal", "previous_token", "relative", "sink", "window"]
    assert (table["explained_variance"] > 0.99).all()
    assert set(heads(rows, 0)["label"]) == {"uniform"}  # theorem 1's layer


def test_alibi_alone_is_decay_and_constant_scores_are_uniform(make_decoder):
    for encoding, label in (("alibi", "decay"), ("none", "uniform")):
        decoder = make_decoder(encoding=encoding)
        with torch.no_grad():
            for block in decoder.layers:
                block.attention.q_proj.weight.zero_()
        rows = census(decoder, random_tokens()[:, :24] % 19, n_bootstrap=20)
        found = heads(rows, 1)
        # The flatter slopes, 2^-6 and 2^-8 over 24 tokens, are uniform for all that can be seen.
        assert found["label"].tolist() == [label, label, "uniform", "uniform"]


def test_an_induction_head_is_found_and_is_used_for_content(induction):
    rows = census(induction, repeated())
    table = census_table(rows).set_index("layer")
    assert table["label"].tolist() == ["previous_token", "induction"]
    # In layer 0 content does nothing: its pattern is a template already; without that pattern induction is gone.
    assert table["used_for"].tolist()[0] == "position"
    change = {metric: value(rows, metric, layer=1).value for metric in ABLATIONS}
    assert change["loss_without_content"] > 5 * change["loss_without_position"]
    assert value(rows, "induction", layer=1).value > 0.9 > 0.2 > value(rows, "induction_expected", layer=1).value
    assert abs(value(rows, "loss_without_content").value) < 1e-3 < 0.5 < value(rows, "loss_without_position").value
    assert value(rows, "loss_without_content", layer=1).low > 0.5


def test_a_head_that_writes_nothing_is_used_for_nothing():
    decoder = one_hot_decoder(1, encoding="alibi")
    with torch.no_grad():
        decoder.head.weight[:, :V] = torch.eye(V)
    rows = census(decoder, random_tokens())
    assert set(rows["used_for"]) == {"nothing"}
    assert (rows[rows["metric"].isin(ABLATIONS)]["value"] == 0).all()


def test_where_an_induction_head_looks():
    # Position 3 repeats the token of 1: the key after it is 2. Position 4 repeats 2: the key after it is 3.
    follows = follows_earlier(torch.tensor([[9, 5, 6, 5, 6]]))[0]
    assert follows.nonzero().tolist() == [[3, 2], [4, 3]]


# ---- scores and losses, from outside


def test_scores_are_shares_of_attention(make_decoder):
    decoder, tokens = make_decoder(encoding="rotary"), random_tokens(6, 12) % 19
    rows = census(decoder, tokens, ablate=False, n_bootstrap=5)
    assert set(rows["used_for"]) == {"not ablated"} and set(rows["label"]) <= set(LABELS)
    pattern = trace(decoder, tokens, [PATTERN]).pattern(1)[3:].double().numpy()
    for head in range(4):
        p = pattern[:, head]
        wanted = {
            "sink": p[:, 1:, 0].mean(),
            "previous_token": np.mean([np.diagonal(one, -1) for one in p]),
            "diagonal": np.mean([np.diagonal(one)[1:] for one in p]),
            "uniform": np.mean([-(one * np.log(one + (one == 0))).sum(-1)[1:] for one in p])
            / np.mean(np.log(np.arange(2, 13))),
        }
        for metric, number in wanted.items():
            assert value(rows, metric, head, layer=1).value == pytest.approx(number, rel=1e-6)


def test_losses_are_cross_entropies_of_the_edited_model(make_decoder):
    """Uniform attention in one head, written out with torch's own functions and TransformerLens's hooks."""
    decoder, tokens = make_decoder(), random_tokens(6, 12) % 19
    lengths = torch.tensor([12, 12, 12, 12, 9, 5])
    rows = census(decoder, tokens, lengths=lengths, n_bootstrap=5)
    bridge = to_bridge(decoder)

    def uniform(pattern, hook):
        pattern = pattern.clone()
        pattern[:, 2] = torch.ones(12, 12).tril() / torch.arange(1, 13)[:, None]
        return pattern

    edited = bridge.run_with_hooks(tokens, fwd_hooks=[(block_site(1, PATTERN), uniform)])
    changes = []
    for out in (edited, decoder(tokens)):
        kept = [(out[b, :-1][: n - 1], tokens[b, 1:n]) for b, n in enumerate(lengths) if b >= 3]
        logits, targets = (torch.cat(each) for each in zip(*kept, strict=True))
        changes.append(cross_entropy(logits, targets).item())
    wanted = changes[0] - changes[1]
    assert value(rows, "loss_uniform", head=2, layer=1).value == pytest.approx(wanted, abs=1e-6)


def test_only_scored_tokens_count_in_the_loss(make_decoder):
    decoder, tokens = make_decoder(), random_tokens(6, 12) % 19
    scored = torch.zeros(6, 12, dtype=torch.bool)
    scored[:, 7] = True
    rows = census(decoder, tokens, scored=scored, n_bootstrap=5)

    def uniform(pattern):
        pattern = pattern.clone()
        pattern[:, 2] = torch.ones(12, 12).tril() / torch.arange(1, 13)[:, None]
        return pattern

    edited, plain = (
        cross_entropy(logits_with_edits(decoder, tokens, edits)[3:, 6], tokens[3:, 7]).item()
        for edits in ({block_site(1, PATTERN): uniform}, {})
    )
    assert value(rows, "loss_uniform", head=2, layer=1).value == pytest.approx(edited - plain, abs=1e-6)
    with pytest.raises(
        ProbeError, match=r"scored must be booleans of the tokens' shape \(6, 12\), got torch.bool \(6, 11\)"
    ):
        census(decoder, tokens, scored=scored[:, 1:])
    with pytest.raises(ProbeError, match="at least one token .* must be scored, got none"):
        census(decoder, tokens, scored=torch.zeros(6, 12, dtype=torch.bool))


def test_a_bridge_gives_what_its_decoder_gives(make_decoder):
    decoder, tokens = make_decoder(encoding="alibi"), random_tokens(6, 12) % 19
    ours, theirs = (census(model, tokens, n_bootstrap=10) for model in (decoder, to_bridge(decoder)))
    pd.testing.assert_frame_equal(ours.drop(columns="used_for"), theirs.drop(columns="used_for"), atol=1e-4, rtol=1e-3)


def test_transformer_lens_agrees_where_both_have_a_name(induction):
    tokens = repeated()
    rows = census(induction, tokens, ablate=False, head_detector=True, n_bootstrap=5)
    for layer in range(2):
        # The detector divides by all rows, the census leaves row 0 out, which has no previous token.
        n = tokens.shape[1]
        ours = value(rows, "previous_token", layer=layer).value * (n - 1) / n
        assert value(rows, "head_detector_previous_token", layer=layer).value == pytest.approx(ours, abs=1e-6)
    # It divides by all rows, the census by those that repeat a token: 24 less the period, in the second half of them.
    share = np.mean([24 - (6 + b % 12) for b in range(12, 24)]) / n
    theirs = value(rows, "head_detector_induction", layer=1).value
    assert theirs == pytest.approx(value(rows, "induction", layer=1).value * share, abs=1e-2)


def test_edits_are_refused_at_sites_that_are_not_there(make_decoder):
    for model in (make_decoder(), to_bridge(make_decoder())):
        with pytest.raises(ProbeError, match="unknown site"):
            logits_with_edits(model, random_tokens(2, 5) % 19, {"blocks.7.attn.hook_pattern": lambda p: p})


# ---- what is refused, what is not


def test_padding_is_not_read(make_decoder):
    decoder, lengths = make_decoder(), torch.tensor([12, 7, 9, 12, 5, 10])
    tokens = random_tokens(6, 12) % 19
    other = tokens.clone()
    for b, n in enumerate(lengths):
        other[b, n:] = 3
    a, b = (census(decoder, t, lengths=lengths, n_bootstrap=10) for t in (tokens, other))
    pd.testing.assert_frame_equal(a, b)
    assert a["value"].map(math.isfinite).all()


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (random_tokens(1, 8) % 19, "at least 2 distinct sequences"),
        (random_tokens(4, 2) % 19, "at least 3 tokens, got at most 2"),
    ],
)
def test_too_little_is_one_clear_line(make_decoder, tokens, message):
    with pytest.raises(ProbeError, match=message):
        census(make_decoder(), tokens)


def test_a_uniform_head_that_counts_is_used_for_position():
    """Its pattern is uniform, so that making it uniform changes nothing; what it puts out is 1/(t + 1), and the model
    predicts by that. A uniform head whose output is read for its content is used for content, and one that nobody reads
    for nothing."""
    d_vocab, length = 8, 12
    config = DecoderConfig(
        d_vocab=d_vocab, n_ctx=length, n_layers=1, d_model=d_vocab + 4, n_heads=3, d_head=d_vocab, d_mlp=1,
        normalization="none", encoding="none",
    )  # fmt: skip
    decoder = Decoder(config, seed=0).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.zero_()
        decoder.token_embedding.weight[:, :d_vocab] = torch.eye(d_vocab)
        attention = decoder.layers[0].attention
        # Head 0 reads the share of <bos> (token 0), 1/(t + 1), head 1 that of token 1, head 2 that of token 2.
        for head in range(3):
            attention.v_proj.weight[head * d_vocab, head] = 1.0
            attention.o_proj.weight[d_vocab + head, head * d_vocab] = 1.0
        decoder.token_embedding.weight[:, -1] = 1.0
        decoder.head.weight[:, -1] = -20.0
        # Token 5 where the share of <bos> is above .14, as it is in the first half; else 4 where more than .22 of the
        # tokens are 1, and 3 where fewer are.
        decoder.head.weight[5, [d_vocab, d_vocab + 3]] = torch.tensor([400.0, -56.0])
        decoder.head.weight[4, [d_vocab + 1, d_vocab + 3]] = torch.tensor([30.0, -6.6])
        decoder.head.weight[3, -1] = 0.0
    generator = torch.Generator().manual_seed(0)
    often = torch.rand(80, 1, generator=generator)
    tokens = 2 - (torch.rand(80, length, generator=generator) < often).long()
    tokens[:, 0] = 0
    # Every other token is what the model says there.
    asked = (torch.arange(length) % 2 == 0) & (torch.arange(length) > 1)
    for t in asked.nonzero()[:, 0].tolist():
        tokens[:, t] = 5 if t <= 6 else torch.where((tokens[:, :t] == 1).double().mean(1) > 0.22, 4, 3)
    rows = census(decoder, tokens, scored=asked.expand(80, -1), n_bootstrap=200)
    heads = rows.drop_duplicates("head").set_index("head")
    assert (heads["label"] == "uniform").all()
    assert heads.loc[0, "used_for"] == "position" and heads.loc[1, "used_for"] in ("content", "both")
    assert heads.loc[2, "used_for"] == "nothing"
    without = rows[rows["metric"] == "loss_output_without_position"].set_index("head")["value"]
    assert without[0] > 0.05 and abs(without[2]) < 1e-6


@pytest.mark.parametrize(
    ("costs", "use"),
    [
        ((1.0, 0.0, 1.0), "content"),
        ((0.0, 1.0, 1.0), "position"),
        ((1.0, 0.5, 1.2), "both"),
        ((1.0, 0.04, 1.0), "content"),  # less than a twentieth: what means of a few sequences cost
        ((0.06, 0.0, 1.0), "content"),
        ((0.04, 0.04, 1.0), "either"),  # nearly all of it is lost only where both are
        ((0.0, 0.0, 1.0), "either"),
        ((0.0, 0.0, 0.0), "nothing"),
        ((-1.0, -1.0, -1.0), "nothing"),
        ((1e-7, 0.0, 1e-7), "nothing"),  # rounding
    ],
)
def test_what_a_head_is_used_for_follows_from_what_costs(costs, use):
    bootstrap = Bootstrap.draw(8, 20, 0.95, 0)
    changes = {
        metric: bootstrap.value_and_draws @ torch.full((8, 1), cost, dtype=torch.float64)
        for metric, cost in zip(ABLATIONS, costs, strict=True)
    }
    assert used_for(changes, bootstrap) == [use]


def test_a_cost_that_is_not_in_all_draws_is_none():
    bootstrap = Bootstrap.draw(8, 200, 0.95, 0)
    noisy = torch.tensor([4.0, -3, 4, -3, 4, -3, 4, -3], dtype=torch.float64)[:, None]
    changes = {m: bootstrap.value_and_draws @ (noisy if m == ABLATIONS[1] else noisy.abs()) for m in ABLATIONS}
    assert used_for(changes, bootstrap) == ["content"]
