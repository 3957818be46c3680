"""What is true of trained models, by edits that their training did not make: another attention to <bos>, and positions
that are given."""

import functools
import math
import re

import pytest
import torch
from known_models import loss, run
from sklearn.linear_model import Ridge

from constructions.known import KNOWN, TRAINED
from constructions.known.drawing import FIRST, LENGTH, Draw
from constructions.known.interchange import SITE, OfStream, train_enforced
from constructions.known.plan import Plan
from probe.benchmark.verdicts import VERDICTS, Asked
from probe.errors import ProbeError
from probe.models.config import DecoderConfig

#: A kind of each way to train, read and unread; the benchmark trains all.
NAMES = ("trained_counter_used", "trained_counter_unread", "trained_table_used", "trained_rotary_used")


@functools.cache
def build(name):
    return TRAINED[name].build(0, "rmsnorm")


def plan_of(name):
    return Plan.draw(Draw(f"{name} rmsnorm", 0))


def random_tokens(name, plan, n=32):
    """Independent and uniform, as none of the model's own sequences are."""
    known = build(name)
    ids = torch.randint(plan.n_content, (n, LENGTH), generator=torch.Generator().manual_seed(7)) + FIRST
    if (known.tokens[:, 0] == 0).all():
        ids[:, 0] = 0
    return ids


def answers(plan, tokens, segment):
    return (tokens - FIRST + torch.tensor(plan.shifts)[segment]) % plan.n_content + FIRST


def segments(plan, positions):
    return sum((positions + 1 > at).long() for at in plan.after)


def with_doubled_odds(model, tokens):
    """Logits where all heads of layer 0 have doubled odds for <bos>, as they have at half the position."""

    def double(scores):
        scores = scores.clone()
        scores[:, :, 1:, 0] += math.log(2)
        return scores

    with torch.no_grad():
        return model(tokens, hooks={"blocks.0.attn.hook_attn_scores": double})


@pytest.mark.parametrize("name", NAMES)
def test_all_verdicts_of_it_are_true(name):
    asked = Asked(build(name))
    said = [each for verdict in VERDICTS.values() for each in verdict.ask(asked)]
    assert len(said) >= 5
    assert [each for each in said if each[1] != each[2]] == []


def test_a_counter_answers_for_the_position_that_its_attention_to_bos_has():
    name = "trained_counter_used"
    known, plan = build(name), plan_of(name)
    tokens, position = random_tokens(name, plan), torch.arange(LENGTH)
    own, halved = (answers(plan, tokens, segments(plan, at)) for at in (position, position // 2))
    with torch.no_grad():
        assert (known.model(tokens).argmax(-1) == own)[:, 1:].float().mean() > 0.97
    said, differ = with_doubled_odds(known.model, tokens).argmax(-1), own != halved
    assert (said == halved)[differ].float().mean() > 0.7 and (said == own)[differ].float().mean() < 0.3


def test_a_counter_that_is_not_read_can_be_read():
    known = build("trained_counter_unread")
    logits, states = run(known.model, known.tokens, SITE)
    assert abs(loss(with_doubled_odds(known.model, known.tokens), known) - loss(logits, known)) < 0.01
    x, y = states[:, 1:].flatten(0, 1).numpy(), torch.arange(1, LENGTH).repeat(len(states)).numpy()
    half = len(y) // 2
    assert Ridge().fit(x[:half], y[:half]).score(x[half:], y[half:]) > 0.9


def test_a_table_answers_for_the_positions_that_are_given():
    name = "trained_table_used"
    known, plan = build(name), plan_of(name)
    tokens = random_tokens(name, plan)
    given = torch.randperm(LENGTH, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        said = known.model(tokens, positions=given).argmax(-1)
    assert (said == answers(plan, tokens, segments(plan, given))).float().mean() > 0.97


def test_a_rotary_model_looks_as_far_back_as_positions_say():
    name = "trained_rotary_used"
    draw = Draw(f"{name} rmsnorm", 0)
    plan, back = Plan.draw(draw, segments=1), draw.integer(1, 4)
    known, tokens = build(name), random_tokens(name, plan)
    with torch.no_grad():
        said = known.model(tokens).argmax(-1)[:, back:]
        standing = known.model(tokens, positions=torch.zeros(LENGTH, dtype=torch.long)).argmax(-1)[:, back:]
    right = answers(plan, tokens[:, :-back], torch.tensor(0))
    assert (said == right).float().mean() > 0.97
    assert (standing == right).float().mean() < 0.5


def test_a_training_that_enforces_nothing_is_refused(monkeypatch):
    monkeypatch.setattr("constructions.known.interchange.ROUNDS", 1)
    monkeypatch.setattr("constructions.known.interchange.STEPS", 3)
    plan = Plan.draw(Draw("untrained", 0))
    config = DecoderConfig(d_vocab=plan.n_content + FIRST, n_ctx=LENGTH, n_layers=2, d_model=16, n_heads=2)
    with pytest.raises(ProbeError, match=re.escape("must be right after 3 steps, got 0.")):
        train_enforced(config, OfStream(plan, bos=True, reads=True), Draw("untrained", 1))


def test_names_are_not_shared_and_bad_ones_are_refused():
    assert not set(KNOWN) & set(TRAINED) and all(name == kind.name for name, kind in TRAINED.items())
    with pytest.raises(ProbeError, match="unknown generator 'trained_counter'"):
        TRAINED["trained_counter"]
    with pytest.raises(ProbeError, match="variant 'clean'"):
        TRAINED["trained_counter_used"].build(0, "clean")
    with pytest.raises(ProbeError, match="seed must be"):
        TRAINED["trained_counter_used"].build(-1)
