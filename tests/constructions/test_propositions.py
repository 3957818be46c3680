"""Each proposition holds for other seeds too, and each is one that could fail."""

import dataclasses

import pytest
import torch

from constructions import CONSTRUCTIONS, PROPOSITIONS, RelativePosition
from constructions import propositions as module
from constructions.observing import observe
from constructions.propositions import least_distance
from constructions.weights import zero_weights


@pytest.mark.parametrize("proposition", PROPOSITIONS.values(), ids=PROPOSITIONS)
def test_it_holds_for_other_draws(proposition):
    assert PROPOSITIONS[proposition.name] is proposition and proposition.find.__doc__
    for seed in (0, 1, 2):
        rows = proposition.check(seed)
        assert rows.holds.all(), rows[["quantity", "largest_error", "tolerance"]]


# Tokens of the longest sequence, and the tolerance of each quantity: 0 for counts.
STATED = {
    "constant_string": (40, {"spread over positions": 1e-12, "draws alike with <bos>": 0}),
    "order_of_the_prefix": (
        30,
        {"first layer's pattern": 1e-12, "first layer's output": 1e-12, "draws whose second layer is blind": 0},
    ),
    "equal_tokens_in_layer_one": (3, {"difference of the two weights": 1e-12, "weights of half or more": 0}),
    "one_bos_logit": (64, {"nearer than the best": 1e-12, "best not reached": 1e-11, "previous": 1e-12}),
    "no_gradient": (
        20,
        {"pattern not uniform": 1e-10, "gradient to W_Q, W_K": 1e-10, "draws without one with <bos>": 0},
    ),
    "weights_depend_on_length": (2049, {"steps beyond the formula": 1e-8, "slope of the steps": -0.5}),
    "dimensions_of_a_bias": (2048, {"dimensions too few": 0, "bound below 17": 0}),
}


@pytest.mark.parametrize("name", PROPOSITIONS)
def test_rows_are_those_of_a_check(name, monkeypatch):
    proposition, (length, tolerances) = PROPOSITIONS[name], STATED[name]
    found = dict(proposition.find(0))
    assert {quantity: tolerance for quantity, (_, tolerance) in found.items()} == tolerances
    assert list(STATED) == list(PROPOSITIONS)
    rows = dataclasses.replace(proposition, find=lambda seed: {**found, "seed": (seed, seed - 1)}).check(5)
    assert list(rows.columns) == list(CONSTRUCTIONS["closed_form"].check(2).columns)
    assert rows.quantity.tolist() == [*tolerances, "seed"] and rows.holds.tolist() == [True] * len(found) + [False]
    assert rows.largest_error.tolist() == [*(error for error, _ in found.values()), 5]
    assert rows.tolerance.tolist() == [*tolerances.values(), 4]
    of_all = rows[["construction", "claim", "source", "length", "dtype", "attention", "attention_layers", "mlp_layers"]]
    stated = (name, proposition.claim, proposition.source, length, "float64", "explicit", 3, 3)
    assert set(of_all.itertuples(index=False, name=None)) == {stated}
    assert set(rows.width) == {96} and set(rows.positions_checked) == {length} and rows.first_failure.isna().all()


def test_random_decoders_are_three_with_every_parameter_drawn():
    decoders = list(module.random_decoders(3))
    assert [d.config.normalization for d in decoders] == ["layer", "rms", "none"]
    assert all(d.config.n_layers == 3 and d.config.encoding == "none" and d.dtype == torch.float64 for d in decoders)
    for decoder, again in zip(decoders, module.random_decoders(3), strict=True):
        assert decoder.config.d_mlp == 96
        for parameter, same in zip(decoder.parameters(), again.parameters(), strict=True):
            assert torch.equal(parameter, same) and parameter.std() > 0.1 and not (parameter == 0).any()


def test_a_gradient_is_that_of_its_own_tokens():
    decoder = next(module.random_decoders(0))
    one, other = torch.full((1, 20), 3), torch.tensor([[0] + 19 * [3]])
    alone = module._gradient_share(decoder, other)
    module._gradient_share(decoder, one)
    assert module._gradient_share(decoder, other) == alone > 1e-6


def blind(seed):
    """Decoders that hand their embeddings on, which are all alike, whatever stands where."""
    for decoder in module.random_decoders(seed):
        zero_weights(decoder)
        with torch.no_grad():
            decoder.token_embedding.weight.fill_(1)
            decoder.head.weight.normal_(generator=torch.Generator().manual_seed(seed))
            for layer in decoder.layers:
                layer.attention.v_proj.weight.fill_(1)
        yield decoder


def test_draws_in_which_it_cannot_be_done_after_all_are_counted(monkeypatch):
    made = list(blind(0))
    monkeypatch.setattr(module, "random_decoders", lambda seed: iter(made))
    assert PROPOSITIONS["constant_string"].find(0)["draws alike with <bos>"] == (3, 0)
    assert PROPOSITIONS["order_of_the_prefix"].find(0)["draws whose second layer is blind"] == (3, 0)


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
