"""What the edits and the mechanism share: sequences to fit on and to measure, and runs under edits."""

import pytest
import torch

from probe.errors import ProbeError
from probe.position.edits.comparison import Comparison
from probe.position.mechanism.readout import Readout
from probe.position.probes.scores import Draws
from probe.position.setting import Part, Setting
from probe.tracing import logits_with_edits, trace

RESID = "blocks.0.hook_resid_post"


@pytest.fixture
def tokens(random_tokens):
    made = random_tokens(batch=12, length=10)
    made[:, 0] = 0
    return made


def setting_of(model, tokens, batch_size=12):
    part = Part.distinct(tokens, None, None)
    return Setting(model, part[:5], part[5:], batch_size)


def test_a_sequence_counts_once_and_its_first_token_and_padding_not_at_all(tokens):
    tokens[7] = tokens[2]
    lengths = torch.tensor([10] * 11 + [4])
    part = Part.distinct(tokens, lengths, None)
    assert torch.equal(part.tokens, tokens[[0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11]]) and len(part) == 11
    assert not part.rows[:, 0].any() and part.rows.sum(1).tolist() == [9] * 10 + [3]
    assert torch.equal(part.scored, part.rows)
    marks = torch.zeros_like(tokens, dtype=torch.bool)
    marks[:, :6] = True
    marks[7, 5] = False  # other tokens of the same sequence: another observation
    some = Part.distinct(tokens, lengths, marks)
    assert len(some) == 12 and some.scored.sum(1).tolist() == [5] * 7 + [4] + [5] * 3 + [3]
    last = some[torch.tensor([11, 0])]
    assert last.lengths.tolist() == [4, 10] and torch.equal(last.tokens, tokens[[11, 0]])
    with pytest.raises(ProbeError, match="scored must be booleans of the tokens' shape"):
        Part.distinct(tokens, None, marks[:, :3])


@pytest.mark.parametrize("batch_size", [2, 3, 5, 12])
def test_batches_give_what_all_sequences_give(make_decoder, tokens, batch_size):
    decoder, given = make_decoder(), torch.randn(12, 10, 32, generator=torch.Generator().manual_seed(0))
    setting = setting_of(decoder, tokens, batch_size)
    seen = []

    def edits(rows):
        return {RESID: lambda x: x + given[rows]}

    logits = setting.run(tokens, edits, {RESID: seen.append, "blocks.1.hook_resid_pre": seen.append})
    assert max(map(len, logits)) <= batch_size and min(map(len, logits)) >= 2
    wanted = logits_with_edits(decoder, tokens, {RESID: lambda x: x + given})
    torch.testing.assert_close(torch.cat(logits), wanted, atol=1e-5, rtol=1e-5)
    # What is watched is what stands there after the edit: the next layer begins with it.
    plain = trace(decoder, tokens, [RESID])[RESID]
    torch.testing.assert_close(torch.cat(seen[::2]), plain + given, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(seen[::2], seen[1::2], strict=True))


def test_states_are_those_of_the_tokens_that_count(make_decoder, tokens):
    decoder = make_decoder()
    part = Part.distinct(tokens, torch.arange(1, 13).clamp(max=10), None)
    states = Setting(decoder, part, part, 12).states(part, RESID)
    hidden = trace(decoder, part.tokens, [RESID])[RESID]
    assert len(states.x) == int(part.rows.sum())
    assert torch.equal(states.x, hidden[states.sequence, states.positions])
    assert torch.equal(states.tokens, part.tokens[states.sequence, states.positions]) and states.positions.min() == 1


def test_edits_and_mechanism_run_the_model_in_the_same_way(make_decoder, tokens):
    decoder = make_decoder()
    comparison = Comparison(decoder, tokens, None, None, 5, 0.95, 0)
    readout = Readout(setting_of(decoder, tokens, 3), RESID, Draws.of(7, 5, 0.95, 0), 0)
    assert type(comparison.setting) is type(readout.setting) is Setting
    half = {RESID: lambda x: x / 2}
    outcome = comparison.run(half)
    values, logits = readout.run(comparison.held_out.tokens, half, RESID)
    loss = torch.nn.functional.cross_entropy(
        torch.cat(logits)[:, :-1].flatten(0, 1), comparison.held_out.tokens[:, 1:].flatten(), reduction="none"
    )
    torch.testing.assert_close(outcome.loss, loss.view(6, 9).sum(1).double(), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(values, trace(decoder, comparison.held_out.tokens, [RESID])[RESID] / 2)
