import dataclasses
import functools

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import entropy
from sklearn.linear_model import Ridge
from sklearn.metrics import mean_absolute_error, r2_score
from torch.nn.functional import cross_entropy

import constructions
from probe.errors import ProbeError
from probe.models.decoder import Decoder, DecoderConfig
from probe.models.hidden_keys import nearest_keys
from probe.models.lens import to_bridge
from probe.position.mechanism.findings import beside_content, elsewhere
from probe.position.mechanism.interventions import INTERVENTIONS, Input
from probe.position.mechanism.naming import mechanism_table, name_mechanism
from probe.position.probes.emergence import probe_over_training
from probe.tracing import PATTERN, block_site, logits_with_edits, trace

L, BOS, END = 24, 0, 31
QUICK = {"n_bootstrap": 20}
RESID = "blocks.{}.hook_resid_post"
ALL = ("position", "bos_counter", "variance_decay", "neighbour_similarity", "attention_sink", "encoding")


def content(n=80, length=L, d_vocab=31, seed=0):
    """``<bos>``, then random tokens."""
    tokens = torch.randint(1, d_vocab, (n, length), generator=torch.Generator().manual_seed(seed))
    tokens[:, 0] = BOS
    return tokens


def ending(n=80, seed=1):
    """The same, with an end that only counting can foresee."""
    tokens = content(n, seed=seed)
    tokens[:, -1] = END
    return tokens


def verdicts(rows):
    return dict(rows.drop_duplicates("mechanism").set_index("mechanism")["verdict"])


def number(rows, mechanism, metric, intervention="normal", column="value"):
    found = rows.query("mechanism == @mechanism and metric == @metric and intervention == @intervention")
    found = found[found["site"] != "hook_embed"]
    assert len(found) == 1
    return found[column].iloc[0]


def untrained(encoding="none", seed=0, kind=Decoder, **options):
    config = {"d_vocab": 32, "n_ctx": 64, "n_layers": 2, "d_model": 48, "n_heads": 4, "encoding": encoding}
    return kind(DecoderConfig(**(config | options)), seed=seed).eval()


class Bidirectional(Decoder):
    """Every position sees every token."""

    def _mask(self, query, key, like, fused, biased, window):
        return like.new_zeros(1, 1, len(query), len(key))


@pytest.fixture(scope="module")
def stops():
    """Theorem 1 in closed form, with a head that predicts the end where the position is right: it uses its counter."""
    decoder = constructions.CONSTRUCTIONS["closed_form"].build(L)
    with torch.no_grad():
        decoder.head.weight[END, 2], decoder.head.weight[END, 0] = 8.0, -8.0 * (L - 1.5)
    return decoder


@pytest.fixture(scope="module")
def stops_rows(stops):
    return name_mechanism(stops, ending(), **QUICK)


# ---- what the verdicts must be


@pytest.mark.parametrize(
    "name", ["absolute_position", "closed_form", "counting_head", "exact_position", "odometer_two", "positional_heads"]
)
def test_constructions_count_bos_and_nothing_else(name):
    rows = name_mechanism(constructions.CONSTRUCTIONS[name].build(L), content(), **QUICK)
    found = verdicts(rows)
    assert {name for name, verdict in found.items() if verdict != "nothing"} == {"position", "bos_counter"}
    assert "used" not in found.values()  # their unembedding is 0: nothing is predicted
    assert number(rows, "position", "r2") > 0.999
    assert number(rows, "position", "r2_refitted", "drop_bos") < 0.05
    # Two <bos> are read as half the position t = 1 + p: (1 + p)/2 - 1 less p, over p = 2, 3, …
    halved = np.mean([(1 + p) / 2 - 1 - p for p in range(2, L)])
    assert number(rows, "bos_counter", "shift", "double_bos") == pytest.approx(halved, abs=0.2)
    # Moved, it is counted from the start all the same; equal content changes nothing; nor does its order.
    assert abs(number(rows, "bos_counter", "shift", "move_bos")) < 0.1
    assert number(rows, "bos_counter", "r2", "constant") > 0.999 < number(rows, "position", "r2", "permuted") + 1e-3
    assert number(rows, "bos_counter", "log_odds_slope") == pytest.approx(-1, abs=1e-6)


def test_a_model_that_stops_by_counting_uses_its_counter(stops_rows):
    assert verdicts(stops_rows) | {"bos_counter": "used", "position": "used"} == verdicts(stops_rows)
    assert {v for m, v in verdicts(stops_rows).items() if m not in ("bos_counter", "position")} == {"nothing"}
    change = number(stops_rows, "bos_counter", "loss_change", "disturbed")
    assert change > 100 * number(stops_rows, "bos_counter", "loss_change_control", "disturbed")


@pytest.mark.parametrize("seed", [0, 1])
def test_an_untrained_model_has_what_the_papers_say_and_uses_nothing(seed):
    found = verdicts(name_mechanism(untrained(seed=seed), content(120), **QUICK))
    assert found["variance_decay"] == "available"
    assert found["encoding"] == found["attention_sink"] == "nothing"
    assert set(found) == set(ALL) and "used" not in found.values()


@pytest.mark.parametrize("n_layers", [1, 2])
def test_a_bidirectional_model_has_nothing(n_layers):
    """It is permutation equivariant: a state is a function of its token and the bag of all tokens."""
    decoder = untrained(kind=Bidirectional, n_layers=n_layers)
    tokens = content(120)
    pattern = trace(decoder, tokens, [PATTERN]).pattern(0)
    assert (pattern > 0).all()
    rows = name_mechanism(decoder, tokens, **QUICK)
    assert set(verdicts(rows).values()) == {"nothing"}
    assert number(rows, "position", "r2") < 0.05


def test_a_learned_table_is_an_encoding():
    decoder = untrained("learned")
    with torch.no_grad():
        decoder.encoding.weight.mul_(50)
    found = verdicts(name_mechanism(decoder, content(), **QUICK))
    assert found["encoding"] == found["position"] == "available" and found["bos_counter"] == "nothing"


def test_a_sink_that_keeps_content_away_is_named():
    """Layer 1's head would flood the position with content; a score on <bos> that grows with t keeps it on <bos>."""
    counter = constructions.CONSTRUCTIONS["closed_form"].build(L)
    config = DecoderConfig(**(vars(counter.config) | {"n_layers": 2}))
    decoder = Decoder(config, seed=None).double()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.zero_()
        decoder.load_state_dict(counter.state_dict(), strict=False)
        attention = decoder.layers[1].attention
        attention.q_proj.weight[0, 2] = attention.k_proj.weight[0, 1] = 4.0  # position × is <bos>
        attention.v_proj.weight[1, 4:] = torch.randn(13, generator=torch.Generator().manual_seed(0)).double()
        attention.o_proj.weight[2, 1] = 100.0
        decoder.token_embedding.weight[BOS, 4:] = 0
    rows = name_mechanism(decoder.eval(), content(), **QUICK)
    assert verdicts(rows)["attention_sink"] == "available"
    assert number(rows, "attention_sink", "attention_on_first") > 0.9
    assert number(rows, "attention_sink", "r2", "cut_sinks") < 0 < 0.9 < number(rows, "attention_sink", "r2")
    # The counter's own head, uniform, is no sink; the counting head is one that counts.
    assert verdicts(rows)["bos_counter"] == "available"


class CountsItsLikes(torch.nn.Module):
    """In place of attention: how many states up to here have a cosine above 0.6 with the query's, into row 0."""

    def forward(self, hidden_states, hooks, **_):
        unit = torch.nn.functional.normalize(hidden_states[..., 1:], dim=-1)
        alike = ((unit @ unit.transpose(1, 2)) > 0.6).tril().to(hidden_states)
        hooks("hook_pattern", (alike / alike.sum(-1, keepdim=True))[:, None])
        out = torch.zeros_like(hidden_states)
        out[..., 0] = alike.sum(-1)
        return out, None


def test_a_model_that_counts_like_neighbours_is_told_by_strangers():
    """Layer 0 takes running means, cos(m_s, m_t) = √(s/t): more and more are alike, unless they are of others."""
    config = DecoderConfig(d_vocab=32, n_ctx=64, n_layers=2, d_model=129, n_heads=1, d_mlp=1, normalization="none")
    decoder = Decoder(config, seed=0)
    with torch.no_grad():
        for parameter in decoder.layers.parameters():
            parameter.zero_()
        decoder.layers[0].attention.v_proj.weight.copy_(torch.eye(129))
        decoder.layers[0].attention.o_proj.weight.copy_(100 * torch.eye(129))
        decoder.token_embedding.weight[:, 0] = 0
    decoder.layers[1].attention = CountsItsLikes()
    rows = name_mechanism(decoder.eval(), content(), **QUICK)
    found = verdicts(rows)
    assert found["neighbour_similarity"] == found["variance_decay"] == "available" and found["bos_counter"] == "nothing"
    r2 = [number(rows, "neighbour_similarity", "r2_refitted", f"{w}_without_bos") for w in ("permuted", "strangers")]
    assert r2[0] > 0.85 and r2[1] < 0.2


def test_a_model_that_predicts_without_position_uses_none():
    """Trained on random tokens each of which its last one tells: position is there, predictions don't need it."""
    generator = torch.Generator().manual_seed(0)
    follower = 1 + torch.randperm(30, generator=generator)
    tokens = content(1000, seed=2)
    for t in range(2, L):
        told = torch.rand(1000, generator=generator) < 0.7
        tokens[told, t] = follower[tokens[told, t - 1] - 1]
    decoder = untrained(n_heads=2).train()
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=3e-3)
    for _ in range(200):
        batch = tokens[torch.randint(len(tokens), (64,), generator=generator)]
        cross_entropy(decoder(batch[:, :-1]).transpose(1, 2), batch[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    rows = name_mechanism(decoder.eval(), tokens[:200], **QUICK)
    assert "used" not in verdicts(rows).values()
    assert number(rows, "variance_decay", "loss_gain") > 0.5 and verdicts(rows)["variance_decay"] == "available"


def test_a_model_trained_to_stop_uses_a_counter():
    generator = torch.Generator().manual_seed(0)
    decoder, tokens = untrained(d_model=32, n_heads=2).train(), ending(2000, seed=3)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=3e-3)
    checkpoints = []
    for step in range(301):
        if step in (0, 300):
            copy = untrained(d_model=32, n_heads=2)
            copy.load_state_dict(decoder.state_dict())
            checkpoints.append((step, copy))
        batch = tokens[torch.randint(len(tokens), (64,), generator=generator)]
        cross_entropy(decoder(batch[:, :-1]).transpose(1, 2), batch[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    rows = name_mechanism(checkpoints[1][1], ending(200), **QUICK)
    assert verdicts(rows)["bos_counter"] == "used" and verdicts(rows)["variance_decay"] == "available"
    # And it came with training: the loss fell while position became easier to read.
    course = probe_over_training(reversed(checkpoints), ending(200), n_bootstrap=20)
    assert course["step"].tolist() == [0] * 3 + [300] * 3
    r2, loss = (course[course["metric"] == metric].groupby("step")["value"].mean() for metric in ("r2", "loss"))
    assert r2[300] > r2[0] + 0.1 and loss[300] < loss[0] - 0.5


# ---- the numbers, from outside


def test_position_is_decoded_where_it_can_be_read():
    """The last layer covers position with 300 times as much of what its MLP makes of content; without that, position
    is decoded behind it, as ever."""
    decoder, tokens = untrained(n_layers=3, d_mlp=256), content()
    assert set(name_mechanism(decoder, tokens, **QUICK).query("metric == 'slope'")["site"]) == {RESID.format(2)}
    decoder.layers[2].mlp.up_proj.weight.data *= 10
    decoder.layers[2].mlp.down_proj.weight.data *= 30
    rows = name_mechanism(decoder, tokens, **QUICK)
    assert set(rows.query("metric == 'slope'")["site"]) == {RESID.format(1)}
    last = name_mechanism(decoder, tokens, site=RESID.format(2), **QUICK)
    assert number(rows, "position", "r2") > number(last, "position", "r2") + 0.1


def test_a_coordinate_that_is_constant_to_rounding_is_not_read():
    """A coordinate of 300 that layers change by less than float32 rounds it: the numbers are those of a model whose
    layers do not change it. At unit variance its rounding would be as large as any other coordinate."""
    found = []
    for write in (1e-3, 0.0):
        model = untrained(d_mlp=256)
        model.token_embedding.weight.data[:, 5] = 300.0
        for layer in model.layers:
            layer.attention.o_proj.weight.data[5] *= write
            layer.mlp.down_proj.weight.data[5] *= write
        rows = name_mechanism(model, content(), site=RESID.format(1), **QUICK)
        found.append([number(rows, "position", "r2", each) for each in ("normal", "constant", "strangers")])
    assert found[0] == pytest.approx(found[1], abs=2e-3)


def test_readouts_are_scikit_learns(stops):
    """The same probe by hand, on tokens that an intervention made."""
    tokens = ending()
    rows = name_mechanism(stops, tokens, **QUICK)
    order = torch.from_numpy(np.sort(np.unique(tokens.numpy(), axis=0, return_index=True)[1]))
    order = order[torch.randperm(80, generator=torch.Generator().manual_seed(0))]
    train, test = tokens[order[:-32]], tokens[order[-32:]]
    test[:, 1] = BOS

    def states(tokens, first):
        x = trace(stops, tokens, ["blocks.0.hook_resid_post"])["blocks.0.hook_resid_post"][:, first:]
        return x.flatten(0, 1).numpy(), np.tile(np.arange(first, L), len(tokens))

    x, y = states(train, 1)
    varies = x.std(0) > 1e-9
    mean, std = x[:, varies].mean(0), x[:, varies].std(0)
    ridge = Ridge(alpha=1.0).fit((x[:, varies] - mean) / std, y)
    x, y = states(test, 2)
    decoded = ridge.predict((x[:, varies] - mean) / std)
    wanted = {
        "r2": r2_score(y, decoded),
        "mean_absolute_error": mean_absolute_error(y, decoded),
        "shift": (decoded - y).mean(),
        "slope": np.polyfit(y, decoded, 1)[0],
    }
    for metric, value in wanted.items():
        assert number(rows, "position", metric, "double_bos") == pytest.approx(value, rel=1e-6)
    assert (rows["n"] == 32).all()


def test_the_loss_is_a_cross_entropy_and_the_gain_is_over_frequencies(stops, stops_rows):
    """In closed form: the model's logits are known, and frequencies predict with their entropy."""
    # At t = 1, 2, … all 32 logits are 0 but that of the end.
    end = 8 * (np.arange(1, L) - (L - 1.5))
    model = (np.log(31 + np.exp(end)).sum() - end[-1]) / (L - 1)
    order = torch.randperm(80, generator=torch.Generator().manual_seed(0))
    tokens = np.unique(ending().numpy(), axis=0, return_index=True)[1]
    tokens = ending()[torch.from_numpy(np.sort(tokens))][order[-32:], 1:]
    frequencies = entropy(np.unique(tokens.numpy(), return_counts=True)[1])
    assert number(stops_rows, "bos_counter", "loss_gain") == pytest.approx(frequencies - model, abs=1e-6)


def test_only_scored_tokens_count(stops):
    tokens = ending()
    scored = torch.zeros_like(tokens, dtype=torch.bool)
    scored[:, 5] = True  # a random token, on which nothing is gained
    rows = name_mechanism(stops, tokens, scored=scored, **QUICK)
    assert verdicts(rows)["bos_counter"] == "available" and number(rows, "bos_counter", "loss_gain") < 0


def test_controls_are_as_far_among_the_states_and_elsewhere():
    """States with a standard deviation of 10 in one direction, 1 in others, 0 in the last: a change along the first is
    turned into one that is as many standard deviations long."""
    deviations = torch.tensor([10.0] + [1.0] * 14 + [0.0])
    states = deviations * torch.randn(4000, 16, generator=torch.Generator().manual_seed(0))
    delta = torch.zeros(6, 5, 16)
    delta[..., 0] = torch.arange(5) * 4.0
    control = elsewhere(0, delta, states).control(torch.Generator().manual_seed(1))
    assert control[..., 0].abs().max() < 0.2 * delta[..., 0].max() / 10 and control[..., -1].abs().max() == 0
    whitened = control[0, :, :-1] / deviations[:-1]
    torch.testing.assert_close(whitened.norm(dim=-1), torch.arange(5) * 0.4, atol=0.05, rtol=0.05)
    assert torch.equal(control[0], control[3])  # the same in every sequence, as the change is
    # States that take no other direction have no control.
    alone = elsewhere(0, delta, states * (torch.arange(16) == 0)).control(torch.Generator())
    assert not alone.any()


def test_controls_are_as_large_and_change_content_alone():
    """Content in orthogonal directions, of size 2: another sequence's is exactly as far as it is large. The change has
    the size of the disturbance, or of a whole exchange where that is smaller, and the content stays as large as it was.
    """
    content = 2 * torch.eye(6, 16, dtype=torch.float64)[:, None].repeat(1, 5, 1)
    delta = torch.zeros(6, 5, 16, dtype=torch.float64)
    delta[..., -1] = torch.tensor([0.0, 0.5, 1.0, 2.0, 9.0], dtype=torch.float64)
    control = beside_content(0, delta, content).control(torch.Generator().manual_seed(0))
    moved = control.norm(dim=-1).amax(0)  # those that were not dealt themselves
    torch.testing.assert_close(moved, torch.tensor([0, 0.5, 1, 2, 2 * 2**0.5], dtype=torch.float64))
    other = (control + content).norm(dim=-1).amin(0)
    torch.testing.assert_close(other, torch.full((5,), 2.0, dtype=torch.float64))
    assert control[..., -1].abs().max() == 0  # nothing of the disturbance


def test_a_bridge_is_told_apart_as_its_decoder(stops, stops_rows):
    rows = name_mechanism(to_bridge(stops), ending(), **QUICK)
    pd.testing.assert_frame_equal(rows, stops_rows, atol=1e-4, rtol=1e-3)


def test_the_table_has_a_line_a_mechanism(stops_rows):
    table = mechanism_table(stops_rows)
    assert table["mechanism"].tolist() == [m for m in ALL if m != "neighbour_similarity"]
    assert "shift (double_bos) -6.7" in table.set_index("mechanism").loc["bos_counter", "evidence"]


# ---- interventions


def given(tokens, n_layers=2):
    visible = torch.ones(1, 1, *2 * tokens.shape[1:], dtype=torch.bool).tril()
    return Input(tokens, BOS, n_layers, torch.Generator().manual_seed(0), visible)


def test_interventions_on_tokens():
    tokens = content(6, 12)
    made = {name: each.tokens(given(tokens)) for name, each in INTERVENTIONS.items()}
    assert (made["drop_bos"] != BOS).all() and (made["drop_bos"][:, 1:] == tokens[:, 1:]).all()
    assert (made["double_bos"] == BOS).sum(1).tolist() == [2] * 6
    assert ((made["move_bos"] == BOS).nonzero()[:, 1] == 3).all()
    assert made["constant"][:, 1:].unique(dim=1).shape[1] == 1 and (made["constant"][:, 0] == BOS).all()
    assert made["constant_without_bos"].unique(dim=1).shape[1] == 1
    torch.testing.assert_close(made["permuted"].sort(1).values, tokens.sort(1).values)
    assert (made["permuted_without_bos"] != BOS).all()
    for name, each in made.items():
        assert each.shape == tokens.shape, name


def test_interventions_on_patterns():
    decoder, tokens = untrained(n_layers=3), content(6, 12)
    pattern = trace(decoder, tokens, [PATTERN]).pattern(0)
    (uniform,) = INTERVENTIONS["uniform_first_layer"].edits(given(tokens, 3)).values()
    torch.testing.assert_close(uniform(pattern)[0, 0], torch.ones(12, 12).tril() / torch.arange(1, 13.0)[:, None])
    torch.testing.assert_close(uniform(torch.full((1, 1, 12, 12), 1 / 12)), torch.full((1, 1, 12, 12), 1 / 12))
    near = nearest_keys(torch.arange(1, 13).clamp(max=4))  # under a sliding window
    windowed = dataclasses.replace(given(tokens, 3), visible=near[None, None])
    (uniform,) = INTERVENTIONS["uniform_first_layer"].edits(windowed).values()
    torch.testing.assert_close(uniform(pattern)[0, 0], near / near.sum(-1, keepdim=True))
    window = INTERVENTIONS["window"].edits(given(tokens, 3))
    assert [*window] == [block_site(layer, PATTERN) for layer in range(3)]
    cropped = window[block_site(0, PATTERN)](pattern)
    torch.testing.assert_close(cropped.sum(-1), torch.ones(6, 4, 12))
    assert (cropped.nonzero()[:, 2] - cropped.nonzero()[:, 3]).max() == 2  # three keys: 1 + 12 // (2 · 3)
    doubled = INTERVENTIONS["double_odds"].edits(given(tokens, 3))[block_site(1, PATTERN)](pattern)
    odds = [p[..., 1:, 0] / p[..., 1:, 1:].sum(-1) for p in (pattern, doubled)]
    torch.testing.assert_close(odds[1], 2 * odds[0])
    torch.testing.assert_close(doubled.sum(-1), torch.ones(6, 4, 12))


def test_strangers_leave_each_position_its_states():
    (mix,) = INTERVENTIONS["strangers"].edits(given(content(6, 12))).values()
    x = torch.randn(6, 12, 5, generator=torch.Generator().manual_seed(0))
    mixed = mix(x)
    for t in range(12):
        assert sorted(mixed[:, t].tolist()) == sorted(x[:, t].tolist())
    assert not torch.equal(mixed, x)


def test_beyond_the_reach_of_a_window_nothing_is_counted(stops):
    """What the first look at: past n_layers · (width - 1) no token of the start is seen."""
    tokens = content(4)
    window = INTERVENTIONS["window"]
    first = window.first(given(tokens, 1))
    other = tokens.clone()
    other[:, 0] = 5
    edited = functools.partial(logits_with_edits, stops, edits=window.edits(given(tokens, 1)))
    torch.testing.assert_close(edited(tokens)[:, first:], edited(other)[:, first:])


# ---- refusals


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (content(5), {}, "at least 10 distinct sequences, got 5"),
        (content(80, 7), {}, r"at least 8 tokens, got shape \(80, 7\)"),
        (
            content(),
            {"scored": torch.ones(80, 3, dtype=torch.bool)},
            r"scored must be booleans of the tokens' shape \(80, 24\)",
        ),
        (content(), {"site": "blocks.9.hook_resid_post"}, "unknown site"),
        (content(), {"site": "blocks.0.attn.hook_z"}, "must hold hidden states"),
        (content(), {"test_share": 1.5}, "test_share"),
    ],
)
def test_bad_input_is_one_clear_line(tokens, options, message):
    with pytest.raises(ProbeError, match=message):
        name_mechanism(untrained(), tokens, **QUICK, **options)


def test_a_run_wants_checkpoints_of_different_steps():
    for checkpoints, message in (([], "at least one checkpoint"), ([(0, untrained())] * 2, "got step 0 twice")):
        with pytest.raises(ProbeError, match=message):
            probe_over_training(checkpoints, content(), n_bootstrap=5)
    with pytest.raises(ProbeError, match="at least one token after the first must be scored"):
        probe_over_training([(0, untrained())], content(), scored=torch.zeros(80, L, dtype=torch.bool))
