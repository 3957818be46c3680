"""Arrays of another tool: what a decoder did, written out and read back, gives the numbers of the decoder itself."""

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

import probe
from probe.attention import attention_maps, attention_summary, census, compare_templates, split_scores, stream
from probe.errors import ProbeError
from probe.models import untrained_twin, weights_digest
from probe.position import erase_position, fit_position_probe, neighbour_similarity

SITES = ["hook_embed", "hook_resid_post", "attn.hook_pattern", "attn.hook_attn_scores"]


@pytest.fixture(scope="module")
def done():
    """A decoder, its tokens, what it did, and that as numpy's arrays by layer."""
    config = probe.DecoderConfig(d_vocab=19, n_ctx=16, n_layers=2, d_model=16, n_heads=2, encoding="alibi")
    decoder = probe.Decoder(config, seed=0).eval()
    tokens = torch.randint(0, 19, (24, 12), generator=torch.Generator().manual_seed(0))
    traced = probe.trace(decoder, tokens, SITES)
    arrays = {
        "patterns": np.stack([traced.pattern(layer).numpy() for layer in (0, 1)]),
        "scores": [traced.scores(layer) for layer in (0, 1)],
        "hidden": {layer: traced[f"blocks.{layer}.hook_resid_post"].tolist() for layer in (0, 1)},
        "values": {"hook_embed": traced["hook_embed"]},
    }
    return decoder, tokens, traced, arrays


def test_measurements_of_a_trace_take_arrays(done):
    _, tokens, traced, arrays = done
    given = probe.Trace.from_arrays(tokens.numpy(), **arrays)
    assert given.n_layers == 2 and set(given.values) == set(traced.values)
    measurements = (
        lambda t: compare_templates(t, ["uniform", "alibi_fitted"], n_bootstrap=20),
        lambda t: attention_summary(t, n_bootstrap=20),
        attention_maps,
        lambda t: split_scores(t, n_bootstrap=20).rows,
        lambda t: neighbour_similarity(t, n_bootstrap=20),
    )
    for measure in measurements:
        pd.testing.assert_frame_equal(measure(given), measure(traced))


def test_measurements_of_a_model_take_what_arrays_can_tell(done):
    decoder, tokens, _, arrays = done
    model = probe.wrap(probe.Trace.from_arrays(tokens, **arrays))
    quick = {"probes": ["ridge"], "controls": ["shuffled"], "n_bootstrap": 20}
    pd.testing.assert_frame_equal(
        fit_position_probe(model, tokens, **quick).drop(columns="layer_encoding"),
        fit_position_probe(decoder, tokens, **quick).drop(columns="layer_encoding"),
    )
    rows = census(model, tokens, ablate=False, n_bootstrap=20)
    wanted = census(decoder, tokens, ablate=False, n_bootstrap=20)
    assert rows["value"].tolist() == wanted["value"].tolist() and set(rows["layer_encoding"]) == {"unknown"}
    same = weights_digest(probe.wrap(probe.Trace.from_arrays(tokens, **arrays)))
    other = weights_digest(probe.wrap(probe.Trace.from_arrays(tokens, patterns=arrays["patterns"])))
    assert weights_digest(model) == same != other


def test_what_needs_the_model_says_so(done):
    _, tokens, _, arrays = done
    model = probe.wrap(probe.Trace.from_arrays(tokens, **arrays))
    for call, message in [
        (lambda: census(model, tokens), "needs the model, or its recorded logits"),
        (lambda: erase_position(model, tokens), "needs the model"),
        (lambda: untrained_twin(model), "an untrained twin needs the model"),
        (lambda: stream(model, tokens), "streaming needs the model"),
        (lambda: probe.trace(model, tokens.flip(1)), "sequence 0 is none of the 24 that were recorded"),
        (lambda: probe.trace(model, tokens, ["hook_resid_mid"]), "unknown site 'hook_resid_mid'"),
    ]:
        with pytest.raises(ProbeError, match=message):
            call()


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_a_file_gives_the_same_trace(kind, done, tmp_path):
    _, tokens, traced, arrays = done
    path = tmp_path / f"a.{kind}"
    whole = {
        "tokens": tokens.numpy(),
        "patterns": arrays["patterns"],
        "hidden.1": np.array(arrays["hidden"][1], np.float32),
    }
    if kind == "npz":
        np.savez(path, **whole)
    else:
        save_file({name: torch.as_tensor(value) for name, value in whole.items()}, path)
    given = probe.Trace.from_file(path)
    assert torch.equal(given.pattern(1), traced.pattern(1)) and torch.equal(given.tokens, tokens)
    assert torch.equal(given["blocks.1.hook_resid_post"], traced["blocks.1.hook_resid_post"])


def test_bad_arrays_are_one_clear_line(done, tmp_path):
    _, tokens, _, arrays = done
    patterns = arrays["patterns"]
    np.savez(tmp_path / "none.npz", patterns=patterns)
    (tmp_path / "bad.npz").write_text("no archive")
    for call, message in [
        (lambda: probe.Trace.from_arrays(tokens), "at least one of patterns, scores, hidden and values, got none"),
        (
            lambda: probe.Trace.from_arrays(tokens[:3], patterns=patterns),
            r"must be floats of shape \(3, head, 12, 12\)",
        ),
        (lambda: probe.Trace.from_arrays(tokens, hidden=[tokens]), r"hidden of layer 0 must be floats of shape"),
        (lambda: probe.Trace.from_arrays(tokens, values={"x": torch.ones(24, 12, 3)}), "named as sites, .* got 'x'"),
        (lambda: probe.Trace.from_arrays(tokens, patterns={"a": patterns[0]}), "need numbers of layers as keys"),
        (lambda: probe.Trace.from_arrays(tokens, patterns=patterns, n_layers=1), "n_layers must be at least 2"),
        (lambda: probe.Trace.from_file(tmp_path / "none.npz"), "none.npz: an array 'tokens' is needed, got patterns"),
        (lambda: probe.Trace.from_file(tmp_path / "bad.npz"), "bad.npz: arrays in the format of .npz or .safetensors"),
    ]:
        with pytest.raises(ProbeError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
