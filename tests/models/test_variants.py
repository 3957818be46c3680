import dataclasses
import math

import pytest
import torch

from probe.errors import ProbeError
from probe.models.clockwork import ClockworkConfig, ClockworkRNN
from probe.models.decoder import Decoder
from probe.models.encodings import ENCODINGS
from probe.models.variants import variant


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_dropping_an_encoding_leaves_a_model_that_sees_no_position(encoding, make_decoder, random_tokens):
    decoder, tokens = make_decoder(encoding=encoding), random_tokens()
    before = {key: value.clone() for key, value in decoder.state_dict().items()}
    dropped = variant(decoder, encoding="none")
    assert dropped.config == dataclasses.replace(decoder.config, encoding="none")
    # The same weights, loaded by name into a fresh decoder without encoding.
    fresh = Decoder(dropped.config, seed=5).eval()
    fresh.load_state_dict({key: value for key, value in before.items() if not key.startswith("encoding.")})
    assert torch.equal(dropped(tokens), fresh(tokens))
    if not decoder.encoding.embeds:
        nowhere = variant(decoder, position_layers=())
        torch.testing.assert_close(dropped(tokens), nowhere(tokens), atol=1e-6, rtol=1e-6)
    with torch.no_grad():
        for parameter in dropped.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[key]) for key, value in decoder.state_dict().items())


def test_dropping_alibi_is_alibi_with_its_bias_taken_away(make_decoder, random_tokens):
    decoder, tokens = make_decoder(encoding="alibi"), random_tokens()
    slopes = torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8])  # of 4 heads
    away = torch.arange(16)[:, None] - torch.arange(16)
    take_away = {
        f"blocks.{layer}.attn.hook_attn_scores": lambda scores: scores + slopes[:, None, None] * away
        for layer in range(2)
    }
    ours = variant(decoder, encoding="none")(tokens)
    torch.testing.assert_close(ours, decoder(tokens, hooks=take_away), atol=1e-5, rtol=1e-5)
    assert (ours - decoder(tokens)).abs().max() > 1e-2


def test_an_encoding_can_be_stretched_or_exchanged(make_decoder, random_tokens):
    tokens = random_tokens()
    decoder = make_decoder(encoding="rotary", encoding_options={"fraction": 0.5})
    options = {"fraction": 0.5, "scaling": "yarn", "factor": 4}
    for stretched, want in [
        (variant(decoder, encoding_options=options), make_decoder(encoding="rotary", encoding_options=options)),
        (variant(decoder, encoding="alibi"), make_decoder(encoding="alibi")),
        (variant(decoder, position_layers=(1,)), make_decoder(**_fields(decoder), position_layers=(1,))),
        (variant(decoder, encoding="t5", seed=0), make_decoder(encoding="t5")),
        (variant(decoder), decoder),
    ]:
        # The test's decoders have the same weights, those of their seed.
        assert stretched.config == want.config
        assert torch.equal(stretched(tokens), want(tokens))


def _fields(decoder):
    return {name: getattr(decoder.config, name) for name in ("encoding", "encoding_options")}


def test_what_only_the_new_one_has_is_drawn_by_the_seed(make_decoder):
    decoder = make_decoder()
    one, two, other = (variant(decoder, encoding="t5", seed=seed) for seed in (3, 3, 4))
    assert torch.equal(one.encoding.weight, two.encoding.weight)
    assert not torch.equal(one.encoding.weight, other.encoding.weight)
    assert torch.equal(one.encoding.weight, make_decoder(encoding="t5", seed=3).encoding.weight)
    assert torch.equal(one.head.weight, decoder.head.weight)


def test_weights_of_one_encoding_are_not_taken_for_those_of_another(make_decoder):
    # Both have an "encoding.weight" of 32 rows of 4.
    small = {"d_model": 4, "n_heads": 4, "n_ctx": 32}
    learned = make_decoder(encoding="learned", **small)
    t5 = variant(learned, encoding="t5", seed=9)
    assert t5.encoding.weight.shape == learned.encoding.weight.shape
    assert torch.equal(t5.encoding.weight, make_decoder(encoding="t5", seed=9, **small).encoding.weight)


def test_attention_functions_are_exchanged_and_their_weights_kept(make_decoder, random_tokens):
    decoder, tokens = make_decoder(attention_function="ssmax"), random_tokens()
    with torch.no_grad():
        for block in decoder.layers:
            block.attention.function.s.fill_(0.7)
    dropped = variant(decoder, encoding="rotary")
    assert all((block.attention.function.s == 0.7).all() for block in dropped.layers)
    assert torch.equal(variant(decoder, attention_function="softmax")(tokens), make_decoder()(tokens))
    longer = variant(decoder, attention_function="log_length", attention_options={"trained_length": 4})
    # A literal: queries that see n > 4 keys times 1 + 0.3973 ln(n / 4).
    scale = torch.tensor([1 + 0.3973 * max(0.0, math.log(n / 4)) for n in range(1, 17)])[:, None, None]
    hooks = {f"blocks.{layer}.attn.hook_rot_q": lambda q: q * scale for layer in range(2)}
    torch.testing.assert_close(longer(tokens), make_decoder()(tokens, hooks=hooks), atol=1e-5, rtol=1e-5)
    assert variant(longer, attention_function="entmax15").config.attention_options == {}
    assert variant(longer, encoding="alibi").config.attention_options == {"trained_length": 4}


def test_a_longer_context_keeps_the_length_of_training(make_decoder):
    yarn = make_decoder(encoding="rotary", encoding_options={"scaling": "yarn", "factor": 4.0}, n_ctx=512, d_model=256)
    longer = variant(yarn, n_ctx=2048)
    assert longer.config.encoding_options["trained_length"] == 512
    assert torch.equal(longer.encoding.frequencies, yarn.encoding.frequencies)
    named = variant(yarn, n_ctx=2048, encoding_options={"scaling": "yarn", "factor": 4.0, "trained_length": 64})
    assert named.config.encoding_options["trained_length"] == 64
    scaled = variant(make_decoder(), n_ctx=64, attention_function="log_length")
    assert scaled.layers[0].attention.function.trained_length == 32
    assert variant(scaled, n_ctx=128).layers[0].attention.function.trained_length == 32
    assert variant(make_decoder(encoding="alibi"), n_ctx=64).config.encoding_options == {}
    learned = make_decoder(encoding="learned")
    assert variant(learned, n_ctx=64).encoding.weight.shape == (64, 32)
    assert torch.equal(variant(learned, n_ctx=32).encoding.weight, learned.encoding.weight)


@pytest.mark.parametrize("tied", [False, True])
def test_device_dtype_and_mode_are_kept(tied, make_decoder, random_tokens):
    decoder = make_decoder(encoding="t5", tie_embeddings=tied).double().train()
    copy = variant(decoder)
    assert (copy.dtype, copy.device, copy.training) == (torch.float64, decoder.device, True)
    assert not variant(decoder.eval()).training
    assert (copy.head.weight is copy.token_embedding.weight) == tied
    shared = {p.data_ptr() for p in decoder.parameters()} & {p.data_ptr() for p in copy.parameters()}
    assert not shared
    assert torch.equal(copy.eval()(random_tokens()), decoder.eval()(random_tokens()))
    with torch.no_grad():
        copy.head.weight.add_(1)
    assert not torch.equal(copy.head.weight, decoder.head.weight)


def test_other_changes_are_refused(make_decoder):
    decoder = make_decoder()

    def bad(message, **changes):
        with pytest.raises(ProbeError, match=message):
            variant(decoder, **changes)

    bad(r"token_embedding\.weight would have shape \(19, 64\), got \(19, 32\)", d_model=64)
    bad(r"layers\.1\.\S+ would have shape none, got \(32,\)", n_layers=1)
    bad(r"layers\.0\.attention_norm\.bias would have shape none", bias=False)
    bad(r"head\.weight would have shape none, got \(19, 32\)", tie_embeddings=True)
    bad("unknown field of a decoder's config 'heads'; known: activation", heads=2)
    bad("unknown encoding 'rope'", encoding="rope")
    bad("unknown attention function 'relu'", attention_function="relu", n_ctx=64)
    bad("encoding 'none' has no option 'base'", encoding_options={"base": 3})
    with pytest.raises(ProbeError, match="a variant wants a Decoder, got ClockworkRNN"):
        variant(ClockworkRNN(ClockworkConfig(d_vocab=19, n_layers=1, d_model=16, n_modules=4)), n_ctx=64)
