import pytest
import torch

from probe.errors import ProbeError
from probe.models.lens import to_bridge
from probe.tracing import PATTERN, SCORES, Trace, trace


def test_a_trace_is_what_the_model_computed(make_decoder, random_tokens):
    decoder, tokens = make_decoder(encoding="alibi"), random_tokens(batch=5)
    traced = trace(decoder, tokens, ["hook_embed", PATTERN, SCORES, "blocks.1.hook_resid_post"], batch_size=2)
    assert torch.equal(traced["hook_embed"], decoder.token_embedding.weight[tokens].detach())
    torch.testing.assert_close(traced.pattern(0).sum(-1), torch.ones(5, 4, 16))
    torch.testing.assert_close(traced.scores(1).softmax(-1), traced.pattern(1))
    logits = decoder.head(decoder.final_norm(traced.hidden("blocks.1.hook_resid_post")))
    torch.testing.assert_close(logits, decoder(tokens))


def test_batches_and_training_mode_change_nothing(make_decoder, random_tokens):
    decoder, tokens = make_decoder(dropout=0.5), random_tokens(batch=5)
    decoder.train()
    a, b = trace(decoder, tokens, batch_size=1), trace(decoder, tokens, batch_size=5)
    assert decoder.training
    for site in a.values:
        torch.testing.assert_close(a[site], b[site])
    assert not a["blocks.1.hook_resid_post"].requires_grad


def test_a_bridge_and_its_decoder_have_the_same_trace(make_decoder, random_tokens):
    decoder = make_decoder(encoding="rotary")
    ours, theirs = trace(decoder, random_tokens()), trace(to_bridge(decoder), random_tokens())
    assert list(ours.values) == list(theirs.values)
    for site in ours.values:
        torch.testing.assert_close(ours[site], theirs[site], atol=1e-5, rtol=1e-5)


def test_bad_input_is_one_clear_line(make_decoder, random_tokens):
    decoder, tokens = make_decoder(), random_tokens()
    with pytest.raises(ProbeError, match=r"at least one sequence of one token, got shape \(0, 16\)"):
        trace(decoder, tokens[:0])
    with pytest.raises(ProbeError, match="unknown site 'resid_post'; known: hook_embed"):
        trace(decoder, tokens, ["resid_post"])
    with pytest.raises(ProbeError, match="lengths must be 3 numbers in 1…16"):
        trace(decoder, tokens, lengths=torch.tensor([1, 2, 17]))
    with pytest.raises(ProbeError, match="batch_size must be at least 1, got 0"):
        trace(decoder, tokens, batch_size=0)
    with pytest.raises(ProbeError, match="model must be a Decoder, a ClockworkRNN, .* got Linear"):
        trace(torch.nn.Linear(2, 2), tokens)
    traced = trace(decoder, tokens, ["hook_embed"])
    with pytest.raises(ProbeError, match=r"holds no 'blocks.0.attn.hook_pattern'; it was taken at: hook_embed"):
        traced.pattern(0)
    broken = Trace(tokens, traced.lengths, {"hook_embed": traced["hook_embed"] * torch.nan}, 2)
    with pytest.raises(ProbeError, match="hidden states at 'hook_embed' must be finite"):
        broken.hidden("hook_embed")
