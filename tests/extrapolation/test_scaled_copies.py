"""Copies of a model while a scale is on: each computes what the model computes just then, or is refused."""

import copy

import pytest
import torch

from constructions import plant, widen
from constructions.weights import perturbed
from probe.errors import ProbeError
from probe.extrapolation import HeadScale, scaled
from probe.models import checkpoint, untrained_like
from probe.models.lens import to_bridge
from probe.models.scaled import is_scaled
from probe.models.variants import variant

SCALES = torch.tensor([[0.5, 1.0, 1.5, 2.0], [1.25, 1.75, 1.0, 3.0]])
WEIGHT = "layers.1.mlp.down_proj.weight"

COPIES = {
    "widen": widen,
    "plant": lambda decoder: plant(widen(decoder), bos=18).decoder,
    "plant in a widened one": None,
    "variant": lambda decoder: variant(decoder, n_ctx=64),
    "perturbed": lambda decoder: perturbed(decoder, WEIGHT, (0, 0), 1 + 1e-7),
    "deepcopy": copy.deepcopy,
    "state_dict": lambda decoder: _with_state(decoder),
    "scaled": lambda decoder: scaled(decoder, 1.0),
}


def _with_state(decoder):
    twin = untrained_like(decoder, 3)
    twin.load_state_dict(decoder.state_dict())
    return twin


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_computes_what_the_model_computes_and_stands_alone(name, make_decoder, random_tokens):
    decoder, tokens, make = make_decoder(), random_tokens().clamp(max=17), COPIES[name]
    tokens[:, 0] = 18  # where it is planted, each sequence starts with <bos>
    if make is None:  # the scale is on the wide decoder, in which is planted
        decoder, make = widen(decoder), lambda wide: plant(wide, bos=18).decoder
    plain = decoder(tokens)
    scales = SCALES if decoder.config.n_heads == 4 else torch.cat((SCALES, SCALES[:, :1]), dim=1)
    with HeadScale(decoder, scales):
        want = decoder(tokens)
        twin = make(decoder)
        assert (twin(tokens) - want).abs().max() < 1e-4
    assert (want - plain).abs().max() > 1e-2
    assert torch.equal(decoder(tokens), plain)
    # Taken off the model, the scale stays in the copy, whose maps are ordinary ones.
    assert not is_scaled(twin) and (twin(tokens) - want).abs().max() < 1e-4
    with HeadScale(twin, 2.0):
        assert torch.equal(decoder(tokens), plain)


def test_a_copy_shares_nothing_and_keeps_what_is_trained(make_decoder):
    decoder = make_decoder()
    decoder.layers[0].attention.q_proj.weight.requires_grad_(False)
    with HeadScale(decoder, 2.0):
        twin = copy.deepcopy(decoder)
    assert list(dict(twin.named_parameters())) == list(dict(decoder.named_parameters()))
    for (name, ours), theirs in zip(decoder.named_parameters(), twin.parameters(), strict=True):
        assert ours.requires_grad == theirs.requires_grad and ours.data_ptr() != theirs.data_ptr(), name


def test_a_copy_of_a_scaled_bridge_and_of_a_model_of_hugging_faces(make_decoder, make_llama, random_tokens):
    tokens = random_tokens()
    for model, run in ((to_bridge(make_decoder()), lambda m: m(tokens)), (make_llama(), lambda m: m(tokens).logits)):
        with HeadScale(model, SCALES):
            want, twin = run(model), copy.deepcopy(model)
        assert (run(twin) - want).abs().max() < 1e-5


def test_what_would_share_the_weights_is_refused_and_a_scale_on_the_bridge_is_not(make_decoder, tmp_path):
    decoder = make_decoder()
    with HeadScale(decoder, 2.0):
        with pytest.raises(ProbeError, match="a bridge needs a model with weights of its own"):
            to_bridge(decoder)
        with pytest.raises(ProbeError, match="saving needs a model with weights of its own"):
            checkpoint.save(decoder, tmp_path / "saved")
        with pytest.raises(ProbeError, match="loading weights needs a model with weights of its own"):
            decoder.load_state_dict(decoder.state_dict())
    with HeadScale(to_bridge(decoder), 2.0):
        pass


def test_an_untrained_twin_has_no_scale(make_decoder, random_tokens):
    decoder, tokens = make_decoder(), random_tokens()
    with HeadScale(decoder, SCALES):
        twin = untrained_like(decoder, 7)
    assert not is_scaled(twin) and torch.equal(twin(tokens), make_decoder(seed=7)(tokens))
