"""Torch's default dtype is the caller's: what is built, proved and measured does not depend on it."""

from contextlib import contextmanager

import measured as m
import pytest
import torch

import probe
from constructions import CONSTRUCTIONS, verify
from probe.models.attention_functions import ATTENTION_FUNCTIONS
from probe.models.clockwork import ClockworkConfig, ClockworkRNN
from probe.models.encodings import ENCODINGS

OPTIONS = [{"encoding": name} for name in ENCODINGS]
OPTIONS += [{"attention_function": name} for name in ATTENTION_FUNCTIONS]
OPTIONS += [
    {"encoding": "rotary", "encoding_options": {"scaling": name, "factor": 2.0}}
    for name in ("linear", "ntk", "yarn", "llama3")
]


@contextmanager
def default_dtype(dtype):
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(usual)


def test_every_construction_holds_under_bfloat16():
    with default_dtype(torch.bfloat16):
        rows = verify(CONSTRUCTIONS, lengths=(64,), dtypes=(torch.float64,))
    assert rows.holds.all(), rows[~rows.holds]


def built(options):
    """The weights of a decoder, its scores and its logits."""
    sizes = {"d_vocab": m.D_VOCAB, "n_ctx": 32, "n_layers": 1, "d_model": 16, "n_heads": 2}
    decoder = probe.Decoder(probe.DecoderConfig(**sizes, **options), seed=1).eval()
    found = probe.trace(decoder, m.tokens(2), ["attn.hook_attn_scores", "hook_resid_post"])
    return [*decoder.state_dict().values(), *found.values.values(), decoder(m.tokens(2))]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_decoder_is_a_function_of_its_config_and_seed(options):
    want = built(options)
    for dtype in (torch.bfloat16, torch.float64):
        with default_dtype(dtype):
            found = built(options)
        assert all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(found, want, strict=True))


def test_a_clockwork_rnn_is_a_function_of_its_config_and_seed():
    config = ClockworkConfig(d_vocab=5, d_model=8, n_layers=1, n_modules=2)
    want = ClockworkRNN(config, seed=3).state_dict()
    with default_dtype(torch.bfloat16):
        found = ClockworkRNN(config, seed=3).state_dict()
    assert all(found[name].dtype == torch.float32 and torch.equal(found[name], want[name]) for name in want)


@pytest.mark.parametrize("measure", [m.census, m.compare_models, m.pair_probe], ids=lambda f: f.__name__)
def test_a_measurement_finds_the_same(measure):
    want = measure(m.Inputs(m.single))
    with default_dtype(torch.bfloat16):
        found = measure(m.Inputs(m.single))
    assert m.error(found, want) == 0
