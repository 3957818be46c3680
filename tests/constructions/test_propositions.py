"""Each proposition holds for other seeds too, and each is one that could fail."""

import pytest
import torch

from constructions import PROPOSITIONS, RelativePosition
from constructions import propositions as module
from constructions.observing import observe
from constructions.propositions import least_distance


@pytest.mark.parametrize("proposition", PROPOSITIONS.values(), ids=PROPOSITIONS)
def test_it_holds_for_other_draws(proposition):
    assert PROPOSITIONS[proposition.name] is proposition and proposition.find.__doc__
    for seed in (0, 1, 2):
        rows = proposition.check(seed)
        assert rows.holds.all(), rows[["quantity", "largest_error", "tolerance"]]


@pytest.mark.parametrize("name", ["constant_string", "order_of_the_prefix", "equal_tokens_in_layer_one", "no_gradient"])
def test_with_position_encodings_it_is_false(name, monkeypatch):
    learned = tuple({**options, "encoding": "learned"} for options in module.OPTIONS)
    monkeypatch.setattr(module, "OPTIONS", learned)
    assert not PROPOSITIONS[name].check().holds.all()


def test_weights_that_know_the_position_do_not_come_together(monkeypatch):
    rotary = tuple({**options, "encoding": "alibi"} for options in module.OPTIONS)
    monkeypatch.setattr(module, "OPTIONS", rotary)
    assert not PROPOSITIONS["weights_depend_on_length"].check().holds.all()


def test_the_best_bos_logit_is_the_best_of_a_fine_grid():
    for wanted in (torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.7, 0.0, 0.0, 0.3]), torch.eye(5)[3]):
        wanted = wanted.double()
        a = torch.linspace(0, 1, 100_001, dtype=torch.float64)[:, None]
        rows = torch.cat((a, ((1 - a) / (len(wanted) - 1)).expand(-1, len(wanted) - 1)), dim=1)
        best = (rows - wanted).abs().sum(-1).min().item() / 2
        assert least_distance(wanted)[0] == pytest.approx(best, abs=1e-5)
        assert least_distance(wanted)[0] <= best + 1e-12


def test_a_head_of_the_second_layer_tells_equal_tokens_apart():
    """With Theorem 2 and a slope of 1 the same tokens get weights in the ratio e : 1, and the nearer one beats 1/2."""
    decoder = RelativePosition(torch.ones(4)).build(3)
    for x in range(1, 11):
        last = observe(decoder, torch.tensor([[0, x, x]]), ["blocks.1.attn.hook_pattern"])
        last = last["blocks.1.attn.hook_pattern"][0, :, -1]
        torch.testing.assert_close(last[:, 2] / last[:, 1], torch.e * torch.ones(4, dtype=torch.float64))
        assert last[:, 2].max() > 0.5
