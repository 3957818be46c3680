import math

import numpy as np
import pytest
import torch
from peak_memory import peak_bytes
from scipy import stats
from torch.nn import functional as F

from probe.errors import ProbeError
from probe.extrapolation import context_losses, loss_by_position, perplexity, perplexity_rows
from probe.extrapolation.losses_by_context import sliding_losses
from probe.models.lens import to_bridge

FEW = {"n_bootstrap": 20}


@pytest.fixture
def texts(random_tokens):
    return random_tokens(batch=5, length=40)


@pytest.fixture
def uniform(make_decoder):
    """A decoder to which every token is equally likely."""
    decoder = make_decoder()
    torch.nn.init.zeros_(decoder.head.weight)
    return decoder


def by_hand(model, text, context, stride, prefix):
    """Window by window, as Hugging Face's guide to the perplexity of fixed-length models has it, token by token."""
    room, n = context - len(prefix), len(text)
    losses, previous_end = {}, 0
    for begin in range(0, n, stride):
        end = min(begin + room, n)
        window = torch.cat((torch.tensor(prefix, dtype=torch.long), text[begin:end]))
        log_p = model(window[None])[0].double().log_softmax(-1)
        for j in range(previous_end, end):
            at = len(prefix) + j - begin
            if at:
                losses[j] = -float(log_p[at - 1, text[j]])
        previous_end = end
        if end == n:
            return [losses.get(j, math.nan) for j in range(n)]


@pytest.mark.parametrize("prefix", [(), (1,), (1, 2)])
@pytest.mark.parametrize(("context", "stride"), [(10, 5), (12, 2), (12, 9), (42, 40), (60, 7)])
def test_sliding_is_window_by_window(make_decoder, texts, context, stride, prefix):
    decoder = make_decoder(encoding="alibi")
    room = context - len(prefix)
    if stride > room:
        pytest.skip("a stride beyond the window")
    n = (
        40 if room >= 40 else room + (40 - room) // stride * stride
    )  # so that the last window is a whole one by hand, too
    found = sliding_losses(decoder, texts[:, :n], context, prefix=prefix, stride=stride)
    with torch.no_grad():
        expected = [by_hand(decoder, text[:n], context, stride, prefix) for text in texts]
    np.testing.assert_allclose(found.numpy(), np.array(expected), atol=1e-5)


@pytest.mark.parametrize(("context", "n"), [(16, 48), (8, 48), (10, 45)])
def test_windows_that_do_not_overlap_leave_out_their_first_token(make_decoder, random_tokens, context, n):
    """Nothing in its window stands before it: the loss and the count are of the others, and no number is missing."""
    decoder, text = make_decoder(encoding="alibi"), random_tokens(batch=3, length=n)
    rows = perplexity(decoder, text, [context], stride=context, **FEW).set_index("metric")
    pieces = [text[:, start : start + context] for start in range(0, n, context)]
    if n % context:  # the last window is a whole one: it overlaps the one before
        pieces[-1] = text[:, -context:]
    with torch.no_grad():
        losses = [F.cross_entropy(decoder(p)[:, :-1].transpose(1, 2), p[:, 1:], reduction="none") for p in pieces]
    if n % context:
        losses[-1] = losses[-1][:, -(n % context) :]
    losses = torch.cat(losses, dim=1).double()
    assert (rows["tokens"] == losses.shape[1]).all()
    assert rows.loc["loss", "value"] == pytest.approx(float(losses.mean()), abs=1e-6)
    assert rows.loc["loss", "low"] <= rows.loc["loss", "value"] <= rows.loc["loss", "high"]


@pytest.mark.parametrize("prefix", [(), (1,)])
def test_where_both_fit_it_is_the_direct_one(make_decoder, texts, prefix):
    decoder = make_decoder(encoding="rotary")
    rows = perplexity(decoder, texts, (41, 64), prefix=prefix, **FEW)
    whole = torch.cat((torch.tensor(prefix, dtype=torch.long).expand(5, -1), texts), dim=1)
    with torch.no_grad():
        logits = decoder(whole)[:, max(0, len(prefix) - 1) : -1]
    targets = texts if prefix else texts[:, 1:]
    loss = float(F.cross_entropy(logits.flatten(0, 1).double(), targets.flatten()))
    found = rows.set_index(["context", "metric"])["value"]
    for context in (41, 64):
        assert found[context, "loss"] == pytest.approx(loss, abs=1e-6)
        assert found[context, "perplexity"] == pytest.approx(math.exp(loss), rel=1e-6)
        assert found[context, "bits"] == pytest.approx(loss / math.log(2), abs=1e-6)


def test_a_uniform_model_is_as_perplexed_as_it_has_tokens(uniform, texts):
    rows = perplexity(uniform, texts, (8, 16, 64), prefix=(1,), score_from=20, **FEW)
    of = rows[rows["metric"] == "perplexity"]
    np.testing.assert_allclose(of[["value", "low", "high"]], 19, rtol=1e-6)
    assert (of["tokens"] == 20).all() and (of["n"] == 5).all()
    positions = loss_by_position(uniform, texts, prefix=(1,), n_bins=7, **FEW)
    np.testing.assert_allclose(positions[["value", "low", "high"]], math.log(19), rtol=1e-6)
    assert positions["tokens"].sum() == 40
    assert positions["position"].is_monotonic_increasing
    np.testing.assert_allclose((positions["position"] * positions["tokens"]).sum() / 40, np.mean(range(1, 41)))


def test_every_context_counts_the_same_tokens(make_decoder, texts):
    decoder = make_decoder()
    for context in (9, 17, 40):
        found = sliding_losses(decoder, texts, context, prefix=(1,), score_from=25)
        assert found[:, 25:].isfinite().all()
    rows = perplexity(decoder, texts, (9, 17, 40), prefix=(1,), score_from=25, **FEW)
    assert set(rows["tokens"]) == {15}
    assert ((rows["low"] <= rows["value"]) & (rows["value"] <= rows["high"])).all()


def test_a_change_is_paired_by_text(make_decoder, texts):
    one, other = make_decoder(), make_decoder(seed=1)
    losses = [context_losses(model, texts, (9, 17), prefix=(1,)) for model in (one, other)]
    rows = perplexity_rows(losses[0], losses[1], n_bootstrap=400).set_index(["context", "metric"])
    for context in (9, 17):
        by_text = losses[0].by_context[context] - losses[1].by_context[context]
        change = rows.loc[context, "loss_change"]
        assert change["value"] == pytest.approx(float(by_text.mean()))
        expected = perplexity(one, texts, (context,), prefix=(1,), **FEW).set_index("metric")["value"]["loss"]
        assert rows.loc[(context, "loss"), "value"] == pytest.approx(expected)
        drawn = stats.bootstrap((by_text.numpy(),), np.mean, method="percentile", n_resamples=4000, random_state=0)
        # Of few texts the percentiles that are wider: where the t interval of a mean ends.
        n, t = len(by_text), stats.t.ppf(0.975, len(by_text) - 1)
        wider = np.quantile(drawn.bootstrap_distribution, stats.norm.cdf(np.array([-t, t]) * (n / (n - 1)) ** 0.5))
        assert (change["low"], change["high"]) == pytest.approx(tuple(wider), abs=0.05)
    same = perplexity_rows(losses[0], losses[0]).query("metric == 'loss_change'")
    assert (same[["value", "low", "high"]] == 0).all().all()


def test_loss_by_position_is_that_of_the_text(make_decoder, texts):
    decoder = make_decoder(encoding="t5")
    rows = loss_by_position(decoder, texts, n_bins=100, **FEW)
    with torch.no_grad():
        loss = F.cross_entropy(decoder(texts)[:, :-1].transpose(1, 2).double(), texts[:, 1:], reduction="none").mean(0)
    assert rows["position"].tolist() == list(range(1, 40))
    np.testing.assert_allclose(rows["value"], loss, atol=1e-5)


def test_bridges_and_hugging_face_models_are_measured_too(make_decoder, texts):
    from transformers import LlamaConfig, LlamaForCausalLM

    decoder = make_decoder()
    expected, found = (perplexity(m, texts, (12,), prefix=(1,), **FEW) for m in (decoder, to_bridge(decoder)))
    np.testing.assert_allclose(found["value"], expected["value"], rtol=1e-4)
    sizes = {"vocab_size": 19, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).eval()
    rows = perplexity(llama, texts, (41,), prefix=(1,), **FEW)
    ids = torch.cat((torch.ones(5, 1, dtype=torch.long), texts), dim=1)
    assert rows["value"][1] == pytest.approx(float(llama(ids, labels=ids).loss.detach()), rel=1e-5)


@pytest.mark.slow
def test_memory_is_bounded_at_16k_of_context():
    script = """
import torch
torch.set_num_threads(1)
from probe.extrapolation import perplexity
from probe.models.decoder import Decoder, DecoderConfig
config = DecoderConfig(d_vocab=260, n_ctx=256, n_layers=1, d_model=32, n_heads=1, encoding="{encoding}")
texts = torch.randint(0, 260, (2, 16384 + 500))
rows = perplexity(Decoder(config), texts[:, :{n}], ({context},), prefix=(1,), score_from={n} - 200, n_bootstrap=2)
assert rows["value"].gt(0).all()
"""
    least = peak_bytes(script.format(encoding="none", n=600, context=256))
    # A matrix of all pairs would be 1 GiB; one window's logits are 17 MB, and as much in float64 for a while.
    for encoding in ("none", "alibi"):
        assert peak_bytes(script.format(encoding=encoding, n=16384 + 500, context=16384)) - least < 400e6


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"contexts": (2,), "prefix": (1,)}, "contexts must be an integer of at least 3, got 2"),
        ({"contexts": (8,), "score_from": 40}, "texts must have more than 40 tokens, got 40"),
        ({"contexts": (8,), "stride": 9}, "stride must be at most 8, what a window holds of a text, got 9"),
        ({"contexts": (8,), "stride": 0}, "stride must be an integer of at least 1, got 0"),
    ],
)
def test_wrong_input_is_refused(make_decoder, texts, options, said):
    with pytest.raises(ProbeError, match=said):
        perplexity(make_decoder(), texts, **options)
    with pytest.raises(ProbeError, match=r"texts must hold at least one sequence of one token, got shape \(0, 40\)"):
        loss_by_position(make_decoder(), texts[:0])
