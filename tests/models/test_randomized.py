import pytest
import torch

from probe.errors import ProbeError
from probe.models.decoder import KVCache
from probe.models.encodings import make_encoding
from probe.models.encodings.randomized import POSITIONAL

DIMS = {"d_model": 16, "n_heads": 4, "d_head": 8, "n_ctx": 10, "n_layers": 2}


def test_training_draws_sorted_subsets_from_torchs_generator():
    encoding = make_encoding("randomized", {"max_position": 30}, **DIMS)
    torch.manual_seed(3)
    seen = torch.stack([encoding.positions(8, random=True) for _ in range(4000)])
    assert (seen.diff() > 0).all() and seen.min() == 0 and seen.max() == 29
    # A uniform subset of m of L: the k-th smallest, counted from 1, has mean k (L + 1)/(m + 1) - 1.
    wanted = torch.arange(1, 9) * 31 / 9 - 1
    torch.testing.assert_close(seen.double().mean(0), wanted.double(), atol=0.25, rtol=0)
    torch.manual_seed(3)
    assert torch.equal(encoding.positions(8, random=True), seen[0])


def test_otherwise_they_are_one_fixed_sequence_and_its_beginnings():
    a, b = (make_encoding("randomized", {"base": base}, **DIMS) for base in ("sinusoidal", "alibi"))
    state = torch.get_rng_state()
    whole = a.positions(10, random=False)
    assert (whole.diff() > 0).all() and whole.min() >= 0 and whole.max() < 2048 == a.max_position
    # The same in every model that was ever saved.
    assert whole.tolist() == [327, 684, 913, 1241, 1316, 1425, 1649, 1939, 2011, 2013]
    assert torch.equal(a.positions(4, random=False), whole[:4])
    assert torch.equal(b.positions(10, random=False), whole)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("base", POSITIONAL)
def test_a_decoder_sees_the_drawn_positions(base, make_decoder, random_tokens):
    decoder, plain = (
        make_decoder(encoding="randomized", encoding_options={"base": base, "max_position": 99}),
        make_decoder(encoding=base, n_ctx=99),
    )
    weights = {name.replace("encoding.base.", "encoding."): w for name, w in decoder.state_dict().items()}
    plain.load_state_dict(weights)
    tokens, fixed = random_tokens(), decoder.encoding.positions(16, random=False)
    for path in ("explicit", "fused"):
        drawn = decoder(tokens, attention=path)
        torch.testing.assert_close(drawn, plain(tokens, positions=fixed, attention=path), atol=1e-5, rtol=1e-5)
        named = decoder(tokens, positions=torch.arange(16), attention=path)
        torch.testing.assert_close(named, plain(tokens, attention=path), atol=1e-5, rtol=1e-5)
    cache = KVCache()
    pieces = [decoder(tokens[:, p : p + 1], cache=cache) for p in range(16)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), drawn, atol=1e-5, rtol=1e-5)
    decoder.train()
    torch.manual_seed(5)
    trained = decoder(tokens)
    torch.manual_seed(5)
    positions = decoder.encoding.positions(16, random=True)
    torch.testing.assert_close(trained, plain(tokens, positions=positions), atol=1e-5, rtol=1e-5)
    assert (trained - drawn).abs().max() > 1e-3
    torch.testing.assert_close(decoder(tokens, cache=KVCache()), drawn, atol=1e-5, rtol=1e-5)


def test_longer_sequences_are_refused(make_decoder, random_tokens):
    decoder = make_decoder(encoding="randomized", n_ctx=12)
    for mode in (True, False):
        with pytest.raises(ProbeError, match=r"drawn for at most 12 tokens \(n_ctx\), got 16"):
            decoder.train(mode)(random_tokens())


@pytest.mark.parametrize("base", ["learned", "rotary"])
def test_hybrids_want_a_base_that_acts_in_attention(base, make_decoder):
    options = {"encoding": "randomized", "encoding_options": {"base": base}, "position_layers": (1,)}
    if base == "rotary":
        assert make_decoder(**options).config.sees_position(1)
    else:
        with pytest.raises(ProbeError, match="wants an encoding that acts in attention, got 'randomized'"):
            make_decoder(**options)


def test_bad_options_are_one_clear_line(make_decoder):
    def refused(message, **options):
        with pytest.raises(ProbeError, match=message):
            make_decoder(encoding="randomized", encoding_options=options)

    refused(r"max_position \(31\) must be at least n_ctx \(32\)", max_position=31)
    refused("max_position must be an integer of at least 1, got 0", max_position=0)
    refused("max_position must be an integer of at most 16777216, got 16777217", max_position=2**24 + 1)
    make_decoder(encoding="randomized", encoding_options={"max_position": 32})
    for base in ("none", "cope", "randomized", "rope"):
        refused(f"unknown base of randomized positions '{base}'; known: alibi, alibi_learned, fire", base=base)
    refused(
        "positions 'rotary' has no option 'slopes'; it has: base, fraction",
        base="rotary",
        base_options={"slopes": 1},
    )
    refused("even d_head · fraction, got 8 · 0.3", base="rotary", base_options={"fraction": 0.3})
