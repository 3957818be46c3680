"""Eval mode for a while: each module gets its own mode back, and threads do not disturb each other."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from probe.models.lens import to_bridge
from probe.models.mode import evaluating
from probe.tracing import logits_with_edits, trace


def modes(model):
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("frozen", [[], ["layers.0"], ["layers.0", "token_embedding"], [""]], ids=str)
def test_every_module_gets_its_own_mode_back(make_decoder, random_tokens, frozen):
    decoder = make_decoder(dropout=0.5).train()
    for name in frozen:
        decoder.get_submodule(name).eval()
    before = modes(decoder)
    trace(decoder, random_tokens(), ["hook_embed"])
    assert modes(decoder) == before
    with pytest.raises(KeyError), evaluating(decoder):
        assert not any(modes(decoder))
        raise KeyError
    assert modes(decoder) == before


def test_the_last_one_to_leave_puts_the_mode_back(make_decoder):
    decoder = make_decoder(dropout=0.5).train()
    decoder.layers[1].eval()
    before, inside, done = modes(decoder), threading.Event(), threading.Event()

    def stay():
        with evaluating(decoder.layers[0]):  # a part of the same tree
            inside.set()
            done.wait(10)

    other = threading.Thread(target=stay)
    with evaluating(decoder):
        other.start()
        assert inside.wait(10)
    assert not decoder.layers[0].training and decoder.training
    done.set()
    other.join(10)
    assert modes(decoder) == before


@pytest.mark.parametrize("bridged", [False, True], ids=["decoder", "bridge"])
def test_threads_that_trace_one_model_see_what_one_sees(make_decoder, random_tokens, bridged):
    """With dropout, one trace of ten was wrong, and in a bridge one thread's hooks saw another's values."""
    decoder = make_decoder(dropout=0.5)
    model = to_bridge(decoder) if bridged else decoder
    tokens = [random_tokens(batch=2, seed=seed) for seed in range(4)]
    wanted = [trace(model, each, ["hook_resid_post", "attn.hook_pattern"]).values for each in tokens]
    edits = {"blocks.0.hook_resid_post": lambda x: x * 0}
    wanted_logits = [logits_with_edits(model, each, edits) for each in tokens]
    model.train()
    before = modes(model)

    def look(i):
        found = trace(model, tokens[i % 4], ["hook_resid_post", "attn.hook_pattern"]).values
        same = all(torch.equal(found[site], value) for site, value in wanted[i % 4].items())
        return same and torch.equal(logits_with_edits(model, tokens[i % 4], edits), wanted_logits[i % 4])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(look, range(40 if bridged else 120)))
    assert modes(model) == before
