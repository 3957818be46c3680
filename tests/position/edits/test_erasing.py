import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
import torch

from probe.attention import distance_from_template
from probe.errors import ProbeError
from probe.models.decoder import Decoder, DecoderConfig
from probe.models.lens import to_bridge
from probe.position import attention_follows, erase_position, patch_position, position_used, steer_position

V, P = 8, 24  # tokens, positions
LAST = "blocks.0.hook_resid_pre"

TO_TEMPLATE = {"distance": distance_from_template}


def of(rows, **where):
    for column, value in where.items():
        rows = rows[rows[column] == value]
    return rows


@pytest.fixture(scope="module")
def looks_back():
    """A head that looks at the previous token and predicts it again, from a position p, p², 1 in the stream: its scores
    are -c (t - 1 - i)² but for what depends on t alone. The position is that of a learned table."""
    config = DecoderConfig(
        d_vocab=V, n_ctx=P, n_layers=1, d_model=2 * V + 3, n_heads=1, d_head=V, d_mlp=1, normalization="none",
        encoding="learned", score_scale=1.0,
    )  # fmt: skip
    decoder = Decoder(config, seed=0).eval()
    p, p2, one, c = 2 * V, 2 * V + 1, 2 * V + 2, 6.0
    at = torch.arange(P, dtype=torch.float32)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.zero_()
        decoder.token_embedding.weight[:, :V] = torch.eye(V)
        decoder.encoding.weight[:, p:] = torch.stack([at / 10, at**2 / 100, torch.ones(P)], dim=1)
        attention = decoder.layers[0].attention
        attention.q_proj.weight[0, p], attention.q_proj.weight[0, one] = 2 * c * 10, -2 * c
        attention.k_proj.weight[0, p] = 10
        attention.q_proj.weight[1, one], attention.k_proj.weight[1, p2] = -c, 100
        attention.v_proj.weight[:, :V] = torch.eye(V)
        attention.o_proj.weight[V : 2 * V] = torch.eye(V)
        decoder.head.weight[:, V : 2 * V] = 10 * torch.eye(V)
    return decoder


@pytest.fixture(scope="module")
def alternating():
    """Two tokens in turn: the next token is the previous one."""
    generator = torch.Generator().manual_seed(0)
    pairs = torch.stack([torch.randperm(V, generator=generator)[:2] for _ in range(24)])
    return pairs.repeat(1, P // 2)


def after_the_first():
    """The tokens that follow from earlier ones: all from position 2 on."""
    return (torch.arange(P) >= 2).expand(24, -1)


def test_what_is_used_is_missed_when_it_is_erased(looks_back, alternating):
    rows = erase_position(
        looks_back,
        alternating,
        [LAST],
        scored=after_the_first(),
        **TO_TEMPLATE,
        n_random=3,
        n_bootstrap=50,
    )
    for name in ("position", "classes"):
        erased, random = (of(rows, concept=name, control=c).set_index("metric") for c in ("none", "random"))
        assert erased.loc["loss", "low"] > 1.0
        assert erased.loc["token_accuracy", "value"] < -0.3
        assert erased.loc["exact_match", "value"] == pytest.approx(-1.0)  # a mean of draws' shares
        assert erased.loc["template_distance", "value"] > 0.1
        assert abs(erased.loc["probe_r2", "value"]) < 1e-6
        assert erased.loc["probe_r2_before", "value"] > 0.99
        # These states hold a position, its square and nothing else: no dimension is left for a control.
        assert random.empty and erased["p"].isna().all()


def test_a_state_of_the_first_token_as_large_as_can_be_changes_nothing(make_decoder, random_tokens):
    """Behind a norm, a ``<bos>`` a hundred or ten thousand times as large as all other tokens makes the same
    predictions; nothing is fitted to it, so that the outcome is the same, too."""
    tokens = torch.cat((torch.zeros(24, 1, dtype=torch.long), random_tokens(24, 15).clamp(min=1)), dim=1)
    found = []
    for size in (1e2, 1e4):
        decoder = make_decoder(encoding="learned", normalization="rms")
        with torch.no_grad():
            decoder.token_embedding.weight[0] *= size
        rows = erase_position(decoder, tokens, ["blocks.1.hook_resid_pre"], n_random=2, n_bootstrap=10)
        assert rows["rank"].tolist() == [1] * 9 + [14] * 9
        found.append(rows.set_index(["concept", "control", "metric"])[["value", "low", "high"]])
    pd.testing.assert_frame_equal(*found, rtol=0.02, atol=1e-3)


def test_a_channel_that_nobody_reads_changes_nothing_whatever_its_size(looks_back, alternating):
    """Its values are a thousand times those of all others, and another one in each token."""
    config = dataclasses.replace(looks_back.config, d_model=looks_back.config.d_model + 1)
    wider = Decoder(config, seed=0).eval()
    with torch.no_grad():
        for name, parameter in wider.named_parameters():
            parameter.zero_()
            own = looks_back.get_parameter(name)
            parameter[tuple(slice(size) for size in own.shape)] = own
        wider.token_embedding.weight[:, -1] = 1e3 * torch.randn(V, generator=torch.Generator().manual_seed(0))
    tokens, how = (
        alternating,
        {"scored": after_the_first(), "concepts": ["position"], "n_random": 19, "n_bootstrap": 20},
    )
    plain, large = (
        of(erase_position(model, tokens, [LAST], **how), control="none").set_index("metric")
        for model in (looks_back, wider)
    )
    pd.testing.assert_frame_equal(plain[["value", "low", "high"]], large[["value", "low", "high"]], atol=0.02)


def test_what_is_not_used_is_not_missed(looks_back, alternating):
    """The same states behind the last attention: position is there as before, and nothing reads it."""
    rows = erase_position(
        looks_back,
        alternating,
        ["blocks.0.hook_resid_post"],
        concepts=["position"],
        **TO_TEMPLATE,
        n_bootstrap=50,
    )
    found = of(rows, control="none").set_index("metric")
    assert abs(found.loc["loss", "value"]) < 0.02
    assert "template_distance" not in found.index  # no attention reads that site


def test_what_a_token_tells_of_its_place_is_not_erased():
    """Tokens that are likelier at some places, and a model that says each of them again: position can be read from its
    states, and erasing it changes the loss, since it is content that is erased. Beyond the tokens there is nothing to
    erase."""
    config = DecoderConfig(
        d_vocab=V, n_ctx=P, n_layers=1, d_model=V, n_heads=1, d_mlp=1, normalization="none", encoding="none"
    )
    decoder = Decoder(config, seed=0).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.zero_()
        decoder.token_embedding.weight[:] = torch.eye(V)
        decoder.head.weight[:] = 6 * torch.eye(V)
    # Each token twice in a row or more, higher ones later.
    tokens = (
        torch.rand(40, P // 2, generator=torch.Generator().manual_seed(0)) * 3 + torch.arange(P // 2) / 2.5
    ).long()
    tokens = tokens.clamp(max=V - 1).repeat_interleave(2, dim=1)
    site, how = "blocks.0.hook_resid_pre", {"concepts": ["position"], "n_bootstrap": 50}
    beyond, whole = (erase_position(decoder, tokens, [site], beyond_tokens=b, **how) for b in (True, False))
    assert of(beyond, control="none", metric="loss")[["value", "low", "high"]].eq(0).all(axis=None)
    assert abs(of(whole, control="none", metric="loss")["value"].item()) > 0.02
    assert of(whole, control="none", metric="probe_r2_before")["value"].item() > 0.5
    assert position_used(beyond)["verdict"].tolist() == ["not used"]


def test_the_verdict_follows_from_the_numbers(looks_back, alternating):
    how = {"scored": after_the_first(), "concepts": ["position"], "n_bootstrap": 50}
    rows = pd.concat([
        erase_position(looks_back, alternating, [LAST], **how).assign(model="reads"),
        erase_position(looks_back, alternating, ["blocks.0.hook_resid_post"], **how).assign(model="reads it before"),
    ])  # fmt: skip
    found = position_used(rows).set_index("model")
    assert found["verdict"].to_dict() == {"reads": "used", "reads it before": "not used"}
    assert (found["probe_r2_before"] > 0.9).all()


def test_the_verdict_wants_more_than_rounding_and_more_than_controls():
    def said(low, p, before=0.9, controlled=True, rank=1):
        rows = [{"control": "none", "metric": "loss", "value": 2 * low, "low": low, "p": p, "rank": rank}]
        rows += [{"control": "none", "metric": "probe_r2_before", "value": before}]
        rows += [{"control": "random", "metric": "loss", "value": 0.0}] * controlled
        return position_used(pd.DataFrame(rows).assign(site=LAST, concept="position"))["verdict"].item()

    assert said(0.1, 1 / 20) == "used"
    assert said(0.1, 2 / 20) == said(1e-8, 1 / 20) == said(-0.1, 1 / 20) == said(0.1, 1 / 20, before=0.2) == "not used"
    # Fewer dimensions in controls than in the concept give no p. Where one direction leaves no other, it counts alone;
    # many fill all directions by chance.
    assert said(0.1, math.nan) == "not used" and said(0.1, math.nan, controlled=False) == "used"
    assert said(0.1, math.nan, controlled=False, rank=9) == said(0.1, 0.8, controlled=False) == "not used"


def test_exact_match_by_length(looks_back, alternating):
    lengths = torch.tensor([P, 10] * 12)
    rows = erase_position(looks_back, alternating, [LAST], lengths=lengths, scored=after_the_first(), n_bootstrap=20)
    found = of(rows, metric="exact_match", concept="position", control="none").set_index("length")["value"]
    assert set(found.index.dropna()) == {10, P} and found.to_numpy() == pytest.approx(-1.0)


def test_attention_follows_the_position_that_is_steered(looks_back, alternating):
    rows = steer_position(looks_back, alternating, LAST, n_bootstrap=20)
    moved = of(rows, metric="attention_moved").set_index("control")["value"]
    assert moved["none"] == pytest.approx(1, abs=2e-3)
    assert abs(moved["random"]) < 0.6
    attended = of(rows, metric="attended", control="none").set_index("shift")["value"]
    np.testing.assert_allclose(attended, P // 2 - 1 + attended.index.to_numpy(), atol=1e-2)
    before = of(rows, metric="probe_r2_before")
    assert before["value"].item() > 0.99 and before[["layer", "head"]].isna().all(axis=None)
    found = attention_follows(rows.assign(model="m"))
    assert found[["model", "layer", "head", "verdict"]].values.tolist() == [["m", 0, 0, "follows"]]
    assert found["attention_moved"].item() == moved["none"] and found["p"].item() == 1 / 20


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({}, "follows"),
        ({"before": 0.29}, "does not follow"),  # position cannot be read
        ({"value": 0.49}, "does not follow"),  # nearer to standing still
        ({"value": -1.0, "low": -1.1}, "does not follow"),  # backwards
        ({"low": -0.1}, "does not follow"),  # not in all sequences
        ({"p": 0.1}, "does not follow"),  # random directions move it as far
        ({"p": np.nan}, "does not follow"),  # there is none to compare with
    ],
)
def test_each_number_counts(change, verdict):
    numbers = {"value": 0.9, "low": 0.7, "p": 0.05} | change
    keys = {"site": LAST, "query": 5, "control": "none"}
    before = {"metric": "probe_r2_before", "value": numbers.pop("before", 0.9)}
    moved = {"layer": 1, "head": 2, "metric": "attention_moved", "shift": np.nan}
    rows = pd.DataFrame([keys | before, keys | moved | numbers])
    assert attention_follows(rows)["verdict"].tolist() == [verdict]


def test_rows_that_do_not_say_enough_are_refused(looks_back, alternating):
    rows = steer_position(looks_back, alternating, LAST, n_random=1, n_bootstrap=5)
    with pytest.raises(ProbeError, match="attention_follows needs all rows of steer_position"):
        attention_follows(rows[rows["metric"] != "probe_r2_before"])
    with pytest.raises(ProbeError, match="rows of several calls must be told apart by a further column"):
        attention_follows(pd.concat([rows, rows]))


def test_where_states_hold_tokens_alone_nothing_is_moved(looks_back, alternating):
    still = Decoder(looks_back.config, seed=0).eval()
    still.load_state_dict(looks_back.state_dict())
    with torch.no_grad():
        still.encoding.weight[:] = still.encoding.weight[3]
    rows = steer_position(still, alternating, LAST, n_bootstrap=5)
    assert of(rows, metric="attention_moved")["value"].abs().max() < 1e-12 and set(rows["control"]) == {"none"}
    assert attention_follows(rows)["verdict"].tolist() == ["does not follow"]


def test_a_linear_bias_does_not_move_with_the_query(make_decoder, random_tokens):
    """-m (t + k - i) is -m (t - i) to softmax: position in the bias alone cannot be steered from the stream."""
    decoder = make_decoder(encoding="alibi")
    with torch.no_grad():
        for block in decoder.layers:
            block.attention.q_proj.weight.zero_()
    rows = steer_position(decoder, random_tokens(8, 12), "blocks.1.hook_resid_pre", n_bootstrap=10)
    assert of(rows, metric="attention_moved")["value"].abs().max() < 1e-6


def test_patched_positions_are_read_further_on(looks_back, alternating):
    # The first token stays where it is, and the second, which looks for it one place further on, misses it.
    after_those = (torch.arange(P) >= 3).expand(24, -1)
    rows = patch_position(looks_back, alternating, LAST, shifts=(0, 1, 3), scored=after_those, n_bootstrap=20)
    shift = of(rows, metric="decoded_shift", control="none").set_index("shift")["value"]
    np.testing.assert_allclose(shift, shift.index.to_numpy(), atol=1e-3)
    loss = of(rows, metric="loss", control="none").set_index("shift")["value"]
    # All rows of a sequence move together, but for the last ones: the head looks at distances and minds these only.
    assert loss.abs()[[0, 1]].max() < 0.2
    # Beyond the tokens there is nothing but position here, and so no random subspace; with the tokens there is one.
    assert set(rows["control"]) == {"none"}
    rows = patch_position(looks_back, alternating, LAST, shifts=(0,), beyond_tokens=False, n_bootstrap=20)
    assert abs(of(rows, metric="decoded_shift", control="random", shift=0)["value"].item()) < 0.5


def test_a_bridge_gives_what_its_decoder_gives(make_decoder, random_tokens):
    decoder, tokens = make_decoder(encoding="rotary"), random_tokens(8, 10)
    site = "blocks.1.hook_resid_pre"
    for measure in (
        lambda m: erase_position(m, tokens, [site], **TO_TEMPLATE, n_random=1, n_bootstrap=5),
        lambda m: steer_position(m, tokens, site, n_random=1, n_bootstrap=5),
        lambda m: patch_position(m, tokens, site, n_random=1, n_bootstrap=5),
    ):
        ours, theirs = measure(decoder), measure(to_bridge(decoder))
        pd.testing.assert_frame_equal(ours, theirs, atol=1e-3, rtol=1e-2)


def test_bad_input_is_one_clear_line(make_decoder, random_tokens):
    decoder, tokens = make_decoder(), random_tokens(8, 10)
    with pytest.raises(ProbeError, match="at least 4 distinct sequences are needed"):
        erase_position(decoder, tokens[:3])
    with pytest.raises(ProbeError, match="at least one token .* must be scored"):
        erase_position(decoder, tokens, scored=torch.zeros(8, 10, dtype=torch.bool))
    with pytest.raises(ProbeError, match="unknown site"):
        erase_position(decoder, tokens, ["blocks.9.hook_resid_post"])
    with pytest.raises(ProbeError, match="no attention reads"):
        steer_position(decoder, tokens, "blocks.1.hook_resid_post")
    with pytest.raises(ProbeError, match="at least two different shifts"):
        steer_position(decoder, tokens, "hook_embed", shifts=[1])
    with pytest.raises(ProbeError, match="query must be a row 1…9, got 10"):
        steer_position(decoder, tokens, "hook_embed", query=10)
    with pytest.raises(ProbeError, match="shifts must be 0…8 tokens, got 10"):
        patch_position(decoder, tokens, "hook_embed", shifts=[10])
