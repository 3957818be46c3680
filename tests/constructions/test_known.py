"""What the suite says of mechanisms, checked by edits of the weights and literal numbers; ``probe`` is not asked."""

import math

import numpy as np
import pytest
import torch
from known_models import CARRIERS, EACH, build, loss, run, values, without, without_head
from torch.nn import functional as F

from constructions.known import HEAD_LABELS, KNOWN, MECHANISMS, VARIANTS, VERDICTS
from probe.attention import TEMPLATES
from probe.errors import ProbeError

RAISES = 0.05  # nats by which a use shows
EQUAL = 1e-4

of_each = pytest.mark.parametrize(("name", "variant"), EACH)


def last_of(seen):
    """The hidden states after the last layer."""
    return seen[max(site for site in seen if site.endswith("hook_resid_post"))]


def spread_by_token(value, known):
    """The largest difference between the values of equal tokens at different places, from position 1 on."""
    tokens, value = known.tokens[:, 1:].flatten(), value[:, 1:].flatten(0, 1)
    return max(float((value[tokens == c].amax(0) - value[tokens == c].amin(0)).max()) for c in tokens.unique())


def check_uses(name, variant, seed):
    """What is used costs loss when it is taken out, and what is not changes no logit; but it changes the states."""
    known, seen = build(name, variant, seed), values(name, variant, seed)
    assert loss(seen["logits"], known) < math.log(known.model.config.d_vocab) - 0.01  # it predicts something
    for mechanism in {"bos_counter", "variance_decay", "encoding"} & set(known.answer.mechanisms):
        verdict = known.answer.mechanisms[mechanism]
        if verdict == "nothing" and mechanism != "encoding":
            continue
        layers = known.model.config.n_layers
        sites = [f"blocks.{layer}.hook_resid_post" for layer in range(layers)]
        with without(mechanism, name, known.model):
            logits, *states = run(known.model, known.tokens, *sites)
        moved = max(float((x - seen[site]).abs().max()) for x, site in zip(states, sites, strict=True))
        if verdict == "used":
            assert loss(logits, known) - loss(seen["logits"], known) > RAISES, mechanism
        else:
            assert (logits - seen["logits"]).abs().max() < EQUAL, mechanism
        assert (moved > 1e-2) == (verdict != "nothing"), mechanism


def check_logits(name, variant, seed):
    """A variant has the tokens and the logits of the clean model."""
    known, clean = build(name, variant, seed), build(name, "clean", seed)
    assert torch.equal(known.tokens, clean.tokens) and torch.equal(known.scored, clean.scored)
    difference = values(name, variant, seed)["logits"] - values(name, "clean", seed)["logits"]
    assert difference.abs().max() < EQUAL


@of_each
def test_a_variant_has_the_same_logits_and_uses_are_uses(name, variant):
    check_logits(name, variant, 0)
    check_uses(name, variant, 0)


@pytest.mark.parametrize("name", KNOWN)
def test_another_seed_too(name):
    for variant in ("clean", KNOWN[name].variants[-1]):
        check_logits(name, variant, 1)
        check_uses(name, variant, 1)


@of_each
def test_what_is_nothing_is_not_in_the_states(name, variant):
    known, seen = build(name, variant), values(name, variant)
    mechanisms, config = known.answer.mechanisms, known.model.config
    by_token = spread_by_token(last_of(seen), known) < 1e-3
    without_bos = len(known.tokens[:, 0].unique()) > 1
    if "position" in mechanisms:
        assert by_token == (mechanisms["position"] == "nothing")
    if mechanisms.get("position") in ("used", "available"):
        assert spread_by_token(seen[known.answer.site], known) > 1e-2
    if mechanisms.get("bos_counter") == "nothing":
        assert by_token or without_bos
    if mechanisms.get("neighbour_similarity") == "nothing":
        assert by_token
    if mechanisms.get("variance_decay") == "nothing":
        for layer in range(config.n_layers):
            assert seen[f"blocks.{layer}.hook_attn_out"].std(0).max() < 1e-4  # the same in all sequences
    if mechanisms.get("attention_sink") == "nothing":
        patterns = [seen[f"blocks.{layer}.attn.hook_pattern"] for layer in range(config.n_layers)]
        assert by_token or max(float(pattern[:, :, 1:, 0].mean((0, 2)).max()) for pattern in patterns) < 0.5


#: The share of its one <bos> is another where all others stand twice; its logits are known instead.
DILUTED = "bag_of_words_behind_bos"


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_bos_that_dilutes_tells_no_position(variant):
    """Logits are the gain times the shares of the shifted tokens among all that were seen: less the share of <bos>,
    (t - 1)/t times those among the content alone, and the same whatever the tokens' order."""
    known = build(DILUTED, variant)
    logits = values(DILUTED, variant)["logits"]
    content = torch.cat((known.tokens[:, :1], known.tokens[:, 1:].flip(1)), dim=1)
    assert (run(known.model, content)[0][:, -1] - logits[:, -1]).abs().max() < EQUAL
    doubled = torch.cat((known.tokens[:, :1], known.tokens[:, 1:16].repeat_interleave(2, dim=1)), dim=1)
    twice = run(known.model, doubled)[0]
    centred, other = (x - x.mean(-1, keepdim=True) for x in (logits[:, 15], twice[:, 30]))
    torch.testing.assert_close(centred * (16 / 15), other * (31 / 30), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "variant"), [e for e in EACH if build(e[0]).answer.uses_position is False and e[0] != DILUTED]
)
def test_where_every_token_stands_twice_predictions_that_use_no_position_stay(name, variant):
    """Twice as many tokens, each position doubled, and the prediction at each is the same; <bos> stays alone."""
    known = build(name, variant)
    half = known.tokens[:, :16]
    doubled = half.repeat_interleave(2, dim=1)[:, int((half[:, 0] == 0).all()) :]
    same = run(known.model, doubled)[0].flip(1)[:, ::2].flip(1)
    assert (same - values(name, variant)["logits"][:, :16])[:, 1:].abs().max() < EQUAL


def test_a_counter_that_is_used_does_not_survive_this():
    known = build("bos_counter_used")
    doubled = known.tokens[:, :16].repeat_interleave(2, dim=1)[:, 1:]
    same = run(known.model, doubled)[0].flip(1)[:, ::2].flip(1)
    assert (same - values("bos_counter_used")["logits"][:, :16]).abs().max() > 1


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", [name for name in KNOWN if name.startswith("bos_counter")])
def test_counters_count(name, variant):
    layer, head = CARRIERS.get(name, (0, 0))
    z = values(name, variant)[f"blocks.{layer}.attn.hook_z"][:, :, head, 1].double()
    t = torch.arange(1, 33).double()
    if name == "bos_counter_behind_previous_used":
        assert (z[:, 1:] - 2 / t[1:]).abs().max() < 1e-5
        return
    sink = name == "bos_counter_sink_used"
    share = 1 - z[:, 1:] if sink else z[:, 1:] / z[:, :1]
    odds = share / (1 - share) * (t[1:] - 1)
    assert (odds / odds.mean() - 1).abs().max() < (1e-2 if sink else 1e-3)
    if not sink and "leaning" not in name:
        assert (share - 1 / t[1:]).abs().max() < 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["variance_decay_used", "variance_decay_available"])
def test_the_size_of_a_mean_falls_and_its_signs_do_not_matter(name, variant):
    known, seen = build(name, variant), values(name, variant)
    variance = seen["blocks.0.attn.hook_z"][:, :, 0].double().square().mean((0, 2)).numpy()
    slope, _ = np.polyfit(np.log(np.arange(2, 21)), np.log(variance[1:20]), 1)
    assert -1.5 < slope < -0.7
    weight = known.model.layers[0].attention.v_proj.weight.data[: known.model.config.d_head]
    weight *= -1
    (flipped,) = run(known.model, known.tokens)
    weight *= -1
    assert (flipped - seen["logits"]).abs().max() < 2 * EQUAL


@pytest.mark.parametrize("variant", VARIANTS)
def test_nearer_states_are_more_alike(variant):
    x = values("variance_decay_available", variant)["blocks.0.hook_resid_post"][:, 4:].double()
    x = F.normalize(x - x.mean((0, 1)), dim=-1)
    cosine = (x @ x.mT).mean(0)
    by_distance = torch.stack([cosine.diagonal(-d).mean() for d in range(1, 16)])
    assert (by_distance.diff() < 0).double().mean() > 0.85
    assert by_distance[0] - by_distance[-1] > 0.15


@of_each
def test_answers_are_made_of_known_names_and_agree_with_themselves(name, variant):
    known = build(name, variant)
    answer, config = known.answer, known.model.config
    assert set(answer.mechanisms) <= set(MECHANISMS) and set(answer.mechanisms.values()) <= set(VERDICTS)
    used = {mechanism for mechanism, verdict in answer.mechanisms.items() if verdict == "used"}
    assert not used & answer.unused and answer.unused <= set(MECHANISMS)
    assert set(answer.mechanisms) - used <= answer.unused
    assert answer.uses_position is (answer.unused != set(MECHANISMS)) is bool(used)
    assert set(answer.heads.values()) <= set(HEAD_LABELS) and set(answer.templates.values()) <= set(TEMPLATES)
    assert all(i < config.n_layers and h < config.n_heads for i, h in {**answer.heads, **answer.templates})
    assert answer.site in (None, *config.sites()) and answer.why.endswith(".")
    assert known.model.dtype == torch.float32 and not known.model.training
    assert config.normalization == {"layernorm": "layer", "rmsnorm": "rms"}.get(variant, "none")
    assert known.tokens.shape == known.scored.shape == (24, 32) and not known.scored[:, 0].any()


@pytest.mark.parametrize("name", KNOWN)
def test_a_seed_is_one_model_and_another_seed_is_another(name):
    first, again = build(name, seed=1), KNOWN[name].build(1)
    assert again.tokens.shape == (64, 32) and len(again.tokens.unique(dim=0)) > 50
    weights = [torch.cat([p.flatten() for p in each.model.parameters()]) for each in (first, again, build(name))]
    assert torch.equal(weights[0], weights[1])
    assert len(weights[2]) != len(weights[0]) or not torch.equal(weights[0], weights[2])


def test_variants_are_really_others():
    for name in ("bos_counter_used", "head_induction"):
        clean, heads, turned = (build(name, each).model for each in ("clean", "distracting", "distracting_rotated"))
        assert heads.config.n_heads == turned.config.n_heads == clean.config.n_heads + 2
        assert (clean.token_embedding.weight == 0).double().mean() > 0.5
        assert (turned.token_embedding.weight == 0).double().mean() < 0.01
        with without_head(heads, 0, clean.config.n_heads):
            (_, silent) = run(heads, build(name).tokens, "blocks.0.hook_resid_post")
        assert (silent - values(name, "distracting")["blocks.0.hook_resid_post"]).abs().max() > 0.1


def test_bad_input_is_one_clear_line():
    known = KNOWN["sinusoidal_used"]
    with pytest.raises(ProbeError, match="unknown generator 'bos_counter'; known: .* did you mean 'bos_counter_used'"):
        KNOWN["bos_counter"]
    with pytest.raises(ProbeError, match="unknown variant 'rotate'; known: clean, .* did you mean 'rotated'"):
        known.build(0, "rotate")
    with pytest.raises(ProbeError, match="sinusoidal_used must be built in one of clean, distracting, got .*'rotated'"):
        known.build(0, "rotated")
    with pytest.raises(ProbeError, match="seed must be an integer of at least 0, got -1"):
        known.build(-1)
    with pytest.raises(ProbeError, match="n_sequences must be an integer of at least 1, got 0"):
        known.build(n_sequences=0)
