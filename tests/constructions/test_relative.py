import dataclasses
import math

import pytest
import torch

from constructions import RelativePosition, perturbed
from constructions.layout import IS_BOS, ONE, POSITION
from constructions.observing import observe
from constructions.relative import D_HEAD, HERE, THERE
from constructions.weights import head_weights, zero_weights
from probe.errors import ProbeError
from probe.models.decoder import Decoder
from probe.models.encodings import alibi_slopes

CONSTRUCTION = RelativePosition()
DTYPES = [torch.float64, torch.float32]
SCORES, PATTERN = "blocks.1.attn.hook_attn_scores", "blocks.1.attn.hook_pattern"


@pytest.mark.parametrize("length", [1, 2, 64, 1024])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_claim_holds(dtype, length):
    rows = CONSTRUCTION.check(length, dtype)
    assert rows.quantity.tolist() == ["scores", "pattern"]
    assert rows.holds.all(), rows[["quantity", "largest_error"]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_slope_will_do_up_to_the_claimed_length(dtype):
    """The steepest slopes allowed, upwards too, and slopes that no float holds exactly; 0 is no position at all."""
    steepest = RelativePosition(torch.tensor([1.0, -1.0], dtype=torch.float64))
    assert steepest.check(CONSTRUCTION.max_length[dtype], dtype).holds.all()
    others = RelativePosition(torch.tensor([2**-0.5, -1 / 3, 0.0], dtype=torch.float64))
    assert others.check(128, dtype).holds.all()


def alibi_decoder(construction: RelativePosition, length: int, dtype: torch.dtype) -> Decoder:
    """A decoder that is given the bias by its encoding: the same embeddings and content weights, no positions."""
    built = construction.build(length, dtype)
    decoder = Decoder(dataclasses.replace(built.config, encoding="alibi")).to(dtype)
    zero_weights(decoder)
    with torch.no_grad():
        decoder.token_embedding.weight.copy_(built.token_embedding.weight)
        for head in range(built.config.n_heads):
            ours, theirs = head_weights(built, 1, head), head_weights(decoder, 1, head)
            for mine, its in ((ours.W_Q, theirs.W_Q), (ours.W_K, theirs.W_K)):
                its[:, :HERE] = mine[:, :HERE]
    return decoder


@pytest.mark.parametrize("n_heads", [8, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_alibi_decoder_attends_in_the_same_way(dtype, n_heads):
    length = 256
    construction = RelativePosition(alibi_slopes(n_heads))
    tokens = construction.tokens(length, seed=5)
    ours = observe(construction.build(length, dtype), tokens, (SCORES, PATTERN))
    alibi = observe(alibi_decoder(construction, length, dtype), tokens, (SCORES, PATTERN))
    tolerance = construction.tolerance[dtype]
    visible = torch.ones(length, length, dtype=torch.bool).tril()
    assert (ours[SCORES] - alibi[SCORES])[..., visible].abs().max() <= tolerance["scores"]
    assert (ours[PATTERN] - alibi[PATTERN]).abs().sum(-1).max() / 2 <= tolerance["pattern"]
    # The test can fail: the content counts, and so does the position.
    bias = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    position_alone = (-construction.slopes[:, None, None] * bias).masked_fill(~visible, -math.inf).softmax(-1)
    assert (ours[PATTERN][0] - position_alone).abs().sum(-1).max() / 2 > 0.1
    blind = RelativePosition(torch.zeros(n_heads)).build(length, dtype)
    assert (ours[PATTERN] - observe(blind, tokens, (PATTERN,))[PATTERN]).abs().sum(-1).max() / 2 > 0.1


def test_the_scores_are_the_literal_formula():
    length = 48
    decoder, tokens = CONSTRUCTION.build(length), CONSTRUCTION.tokens(length)
    seen = observe(decoder, tokens, (SCORES, PATTERN))
    content = decoder.token_embedding.weight.detach()[tokens[0], 3:]
    for head, slope in enumerate([2.0**-k for k in range(1, 9)]):
        W = head_weights(decoder, 1, head)
        q, k = content @ W.W_Q[3:], content @ W.W_K[3:]
        for t in range(length):
            row = [float(q[t] @ k[i]) / math.sqrt(D_HEAD) - slope * (t - i) for i in range(t + 1)]
            row = torch.tensor(row, dtype=torch.float64)
            torch.testing.assert_close(seen[SCORES][0, head, t, : t + 1], row, rtol=0, atol=1e-11)
            torch.testing.assert_close(seen[PATTERN][0, head, t, : t + 1], row.softmax(-1), rtol=0, atol=1e-11)


def essential_weights() -> list[tuple[str, tuple[int, ...]]]:
    """One weight of each kind: Theorem 1's, the four of each head's bias, and row ONE, which is read here.

    Not the bias by which Theorem 1's positions begin at 1: relative position is blind to it.
    """
    layer0 = [
        ("layers.0.attention.v_proj.weight", (0, IS_BOS)),
        ("layers.0.attention.o_proj.weight", (POSITION, 0)),
        ("layers.0.mlp.up_proj.weight", (10, POSITION)),
        ("layers.0.mlp.up_proj.bias", (10,)),
        ("layers.0.mlp.down_proj.weight", (POSITION, 10)),
    ]
    layer1 = [
        (f"layers.1.attention.{projection}.weight", (head * D_HEAD + dimension, row))
        for head in range(8)
        for projection, dimension, row in (
            ("q_proj", HERE, ONE),
            ("q_proj", THERE, POSITION),
            ("k_proj", HERE, POSITION),
            ("k_proj", THERE, ONE),
        )
    ]
    tokens = [("token_embedding.weight", (token, ONE)) for token in CONSTRUCTION.tokens(32)[0].unique().tolist()]
    return [*layer0, *layer1, *tokens, ("token_embedding.weight", (0, IS_BOS))]


@pytest.mark.parametrize(("weight", "index"), essential_weights(), ids=lambda part: str(part))
def test_every_essential_weight_is_needed(weight, index):
    decoder = CONSTRUCTION.build(32)
    for factor in (0.99, 1.01):
        rows = CONSTRUCTION.check(32, decoder=perturbed(decoder, weight, index, factor))
        assert not rows.holds.all()


def test_only_differences_of_positions_count():
    decoder = perturbed(CONSTRUCTION.build(32), "layers.0.mlp.down_proj.bias", (POSITION,), factor=2.0)
    resid = observe(decoder, CONSTRUCTION.tokens(32), ("blocks.0.hook_resid_post",))["blocks.0.hook_resid_post"]
    torch.testing.assert_close(resid[0, :, POSITION], torch.arange(33, 65, dtype=torch.float64))
    assert CONSTRUCTION.check(32, decoder=decoder).holds.all()


@pytest.mark.parametrize("weight", ["q_proj", "k_proj"])
def test_content_weights_are_arbitrary(weight):
    decoder = perturbed(CONSTRUCTION.build(32), f"layers.1.attention.{weight}.weight", (0, 3), factor=5.0)
    assert CONSTRUCTION.check(32, decoder=decoder).holds.all()


def test_position_that_leaks_into_the_content_is_noticed():
    decoder = CONSTRUCTION.build(32)
    head_weights(decoder, 1, 2).W_K[POSITION, 0] = 1e-4
    assert not CONSTRUCTION.check(32, decoder=decoder).holds.any()


def test_an_error_of_the_querys_position_is_in_the_scores_and_not_in_the_pattern():
    """-m t is the same for every key: the softmax does not see it."""
    weight, index = "layers.1.attention.q_proj.weight", (THERE, POSITION)
    rows = CONSTRUCTION.check(32, decoder=perturbed(CONSTRUCTION.build(32), weight, index)).set_index("quantity")
    assert rows.largest_error["scores"] == pytest.approx(0.01 * 0.5 * 32, rel=1e-6)
    assert not rows.holds["scores"] and rows.holds["pattern"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("at", [(0, 20), (), (9,)], ids=["doubled", "dropped", "moved"])
def test_the_claim_wants_one_bos_at_the_first_place(at, dtype):
    tokens = CONSTRUCTION.tokens(64)
    tokens[:, 0] = 7
    tokens[:, list(at)] = 0
    assert not CONSTRUCTION.check(64, dtype, tokens=tokens).holds.any()


def test_without_bos_there_is_no_bias_at_all():
    """Row POSITION is then T everywhere, and (1, -T) · (T, 1) = 0: the pattern is that of the content alone."""
    tokens = CONSTRUCTION.tokens(64)
    tokens[:, 0] = 7
    ours = observe(CONSTRUCTION.build(64), tokens, (PATTERN,))
    blind = observe(RelativePosition(torch.zeros(8)).build(64), tokens, (PATTERN,))
    torch.testing.assert_close(ours[PATTERN], blind[PATTERN], rtol=0, atol=1e-12)


def test_wrong_inputs_are_refused():
    for slopes in (torch.tensor([]), torch.tensor([0.5, 1.5]), torch.tensor([torch.nan]), torch.tensor([-torch.inf])):
        with pytest.raises(ProbeError, match=r"slopes must be one number or more in \[-1, 1\], got"):
            RelativePosition(slopes)
    for dtype in DTYPES:
        longest = CONSTRUCTION.max_length[dtype]
        with pytest.raises(ProbeError, match=rf"relative_position is claimed for lengths 1…{longest} in"):
            CONSTRUCTION.check(longest + 1, dtype)
    with pytest.raises(ProbeError, match=r"relative_position is made for float64, float32; got float16$"):
        CONSTRUCTION.check(8, torch.float16)
    with pytest.raises(ProbeError, match=r"fused attention holds no scores"):
        CONSTRUCTION.check(8, attention="fused")
