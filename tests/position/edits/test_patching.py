"""Patching: its numbers against plain torch, and the verdict on rows whose answer is clear."""

import pandas as pd
import pytest
import torch
from torch.nn import functional as F

from probe.errors import ProbeError
from probe.models.decoder import Decoder, DecoderConfig
from probe.position import patch_position, patched_position_used
from probe.position.edits.subspaces import TokenMeans

V, T = 5, 12
SITE = "blocks.0.hook_resid_pre"


def shifting(late: float) -> Decoder:
    """Row V of the stream holds the position p / 10, and adds ``late`` times that to the logit of token 0; the token's
    own logit is 1, and heads and units write nothing."""
    config = DecoderConfig(
        d_vocab=V, n_ctx=T, n_layers=1, d_model=V + 1, n_heads=1, d_mlp=1, normalization="none", encoding="learned"
    )
    decoder = Decoder(config, seed=0).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.zero_()
        decoder.token_embedding.weight[:, :V] = torch.eye(V)
        decoder.encoding.weight[:, V] = torch.arange(T) / 10
        decoder.head.weight[:, :V] = torch.eye(V)
        decoder.head.weight[0, V] = late
    return decoder


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(V, (20, T), generator=torch.Generator().manual_seed(0))


def own_loss(decoder, tokens, table):
    """Nats a token, by sequence, where row p of sequence s holds the position ``table[s, p]``."""
    x = decoder.token_embedding.weight[tokens].clone()
    x[..., V] = table
    logits = x @ decoder.head.weight.T
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    return losses.sum(1).double()


def test_the_paired_loss_is_that_of_plain_torch(tokens):
    """Beyond the tokens the stream holds the position alone. So a patch of s tokens adds s to it in the rows that have
    a row s further on, position 0 left out, and the exchange alone changes nothing."""
    decoder = shifting(late=3.0)
    rows = patch_position(decoder, tokens, SITE, shifts=(0, 2, 3), n_random=1, n_bootstrap=20)
    own = rows[rows["control"] == "none"]
    measured, at = tokens[10:], torch.arange(T) / 10
    for shift in (2, 3):
        table = at.repeat(10, 1)
        table[:, 1 : T - shift] += shift / 10
        with torch.no_grad():
            by_hand = own_loss(decoder, measured, table) - own_loss(decoder, measured, at.repeat(10, 1))
        found = own[own["shift"] == shift].set_index("metric")["value"]
        assert found["loss_beyond_exchange"] == pytest.approx(float(by_hand.mean()) / (T - 1), abs=1e-5)
        assert found["loss_of_exchange"] == pytest.approx(0, abs=1e-5)
        assert found["loss"] == pytest.approx(found["loss_beyond_exchange"], abs=1e-5)
    assert "loss_beyond_exchange" not in set(own.loc[own["shift"] == 0, "metric"])
    before = own[own["metric"] == "probe_r2_before"]
    assert len(before) == 1 and before["value"].item() == pytest.approx(1, abs=1e-4)


def test_what_the_exchange_costs_is_in_the_very_same_rows(tokens):
    """A row of the stream holds another number in each sequence: exchanged at the same place it costs as much as at
    another, so that nothing is left beyond the exchange, although the loss rises."""
    decoder = shifting(late=3.0)
    with torch.no_grad():
        decoder.encoding.weight[:] = 0
        # The first token decides a number that uniform attention brings to all rows.
        attention, one = decoder.layers[0].attention, torch.linspace(-2, 2, V)
        attention.v_proj.weight[0, :V] = one
        attention.o_proj.weight[V, 0] = 1
    rows = patch_position(
        decoder, tokens, "blocks.0.hook_resid_post", shifts=(2,), concept_name="classes", n_random=1, n_bootstrap=50
    )
    own = rows[rows["control"] == "none"].set_index("metric")
    both = own.loc["loss_of_exchange", "value"] + own.loc["loss_beyond_exchange", "value"]
    assert own.loc["loss", "value"] == pytest.approx(both, abs=1e-9)
    assert own.loc["loss_of_exchange", "value"] > 3 * abs(own.loc["loss_beyond_exchange", "value"])
    assert patched_position_used(rows)["verdict"].item() == "not used"


def test_the_verdict_follows_from_the_numbers(tokens):
    """Used where a wrong position costs: tokens are 0 the likelier, the later they are."""
    late = torch.rand(20, T, generator=torch.Generator().manual_seed(1)) < torch.arange(T) / T
    tokens = torch.where(late, 0, tokens)
    rows = pd.concat([
        patch_position(shifting(late=4.0), tokens, SITE, n_bootstrap=100).assign(model="reads"),
        patch_position(shifting(late=0.0), tokens, SITE, n_bootstrap=100).assign(model="reads nothing"),
    ])  # fmt: skip
    found = patched_position_used(rows).set_index("model")
    assert found["verdict"].to_dict() == {"reads": "used", "reads nothing": "not used"}
    assert (found["shift"] == 4).all() and (found["probe_r2_before"] > 0.9).all()
    at = rows[(rows["shift"] == 4) & (rows["control"] == "none") & (rows["metric"] == "loss_beyond_exchange")]
    assert found["loss_beyond_exchange"].to_dict() == at.set_index("model")["value"].to_dict()


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({}, "used"),
        ({"before": 0.29}, "not used"),  # position cannot be read
        ({"low": -0.01}, "not used"),  # no cost is shown
        ({"price": 0.6}, "not used"),  # it is mostly content that is exchanged
    ],
)
def test_each_number_counts(change, verdict):
    numbers = {"before": 0.9, "beyond": 0.5, "low": 0.3, "price": 0.1} | change
    keys = {"site": SITE, "concept": "classes", "rank": 2, "control": "none"}
    rows = pd.DataFrame([
        keys | {"metric": "probe_r2_before", "value": numbers["before"]},
        keys | {"metric": "loss_beyond_exchange", "shift": 1, "value": 9.0, "low": 9.0},  # the greatest shift decides
        keys | {"metric": "loss_of_exchange", "shift": 1, "value": 0.0},
        keys | {"metric": "loss_beyond_exchange", "shift": 4, "value": numbers["beyond"], "low": numbers["low"]},
        keys | {"metric": "loss_of_exchange", "shift": 4, "value": numbers["price"]},
    ])  # fmt: skip
    assert patched_position_used(rows)["verdict"].tolist() == [verdict]


def test_rows_that_say_nothing_are_refused(tokens):
    rows = patch_position(shifting(late=3.0), tokens, SITE, shifts=(0,), n_random=1, n_bootstrap=5)
    with pytest.raises(ProbeError, match="patched_position_used needs patches with a shift above 0, got none"):
        patched_position_used(rows)
    with pytest.raises(ProbeError, match="rows of several calls must be told apart by a further column"):
        patched_position_used(pd.concat([rows, rows]))


def test_states_without_anything_but_tokens_have_nothing_to_exchange(tokens):
    decoder = shifting(late=3.0)
    with torch.no_grad():
        decoder.encoding.weight[:] = 1.0
    rows = patch_position(decoder, tokens, SITE, shifts=(0, 2), n_random=1, n_bootstrap=5)
    assert (rows["control"] == "none").all() and (rows["rank"] == 0).all()
    assert rows.loc[rows["metric"].str.startswith("loss"), "value"].eq(0).all()
    assert patched_position_used(rows)["verdict"].item() == "not used"


def test_what_tokens_add_beside_positions_is_least_squares(tokens):
    generator = torch.Generator().manual_seed(2)
    positions = torch.arange(T).repeat(20)
    of_token, of_position = torch.randn(V, 3, generator=generator), torch.randn(T, 3, generator=generator)
    x = of_token[tokens.flatten()] + of_position[positions]
    means = TokenMeans.beside_positions(x, tokens.flatten(), positions)
    # Additive, so exact: what is left is the position's, but for one constant.
    left = x.double() - means(tokens.flatten())
    wanted = of_position.double()[positions]
    torch.testing.assert_close(left - left.mean(0), wanted - wanted.mean(0), atol=1e-6, rtol=0)
    noisy = x + torch.randn(x.shape, generator=generator)
    means = TokenMeans.beside_positions(noisy, tokens.flatten(), positions)
    one_hot = torch.cat((F.one_hot(tokens.flatten()), F.one_hot(positions)), 1).double()
    fit = torch.linalg.lstsq(one_hot, noisy.double(), driver="gelsd").solution[:V]
    own = means.table - means.table.mean(0)
    torch.testing.assert_close(own, fit - fit.mean(0), atol=1e-6, rtol=0)
    # A token that was not seen has the mean of all, and one with a place of its own keeps what is there.
    assert torch.equal(means(torch.tensor([99]))[0], noisy.double().mean(0))
    alone = TokenMeans.beside_positions(x, positions, positions)
    torch.testing.assert_close(alone(positions), TokenMeans.of(x, positions)(positions))
