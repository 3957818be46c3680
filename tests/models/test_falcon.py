import pytest
import torch
from released import REFINED_WEB, RW, assert_same, configure, make, make_refined_web, observe, relative

from probe.files import read_json_object
from probe.models.families import FAMILIES, Fields
from probe.models.pretrained import load_pretrained
from probe.models.variants import variant


@pytest.mark.parametrize("n_heads", [4, 12])
def test_alibi_is_rounded_as_theirs(n_heads, random_tokens, tmp_path):
    # Of 4 heads, whose slopes are powers of two, beyond position 256; of 12 everywhere. At this length logits are those
    # of the decoder's fused path, and patterns those of its explicit one.
    tokens = random_tokens(batch=2, length=700)
    options = RW | {"num_attention_heads": n_heads, "hidden_size": 8 * n_heads}
    want = observe(make(tmp_path, "falcon", options, torch.float64), "falcon", tokens)
    decoder = load_pretrained(tmp_path)
    # In float64 there is no other rounding: biases of hundreds of nats cost float32 half of its digits.
    assert_same(decoder, tokens, want, tolerance=1e-12)
    unrounded = variant(decoder, encoding_options={"scale": 8**-0.5})
    assert relative(unrounded(tokens), want.logits) > 1e-3


@pytest.mark.parametrize("name", REFINED_WEB)
def test_older_names(name, random_tokens, tmp_path):
    tokens = random_tokens()
    want = observe(make_refined_web(tmp_path, name), "falcon", tokens)
    assert_same(load_pretrained(tmp_path), tokens, want)


def test_one_norm_is_copied_and_not_shared(tmp_path):
    make(tmp_path, "falcon")
    block = load_pretrained(tmp_path).layers[1]
    assert block.attention_norm.weight.equal(block.mlp_norm.weight)
    assert block.attention_norm.weight.data_ptr() != block.mlp_norm.weight.data_ptr()


def test_the_key_map_is_that_of_one_model(tmp_path):
    # Which norms there are is known from the config alone, here of two models at once.
    make(tmp_path, "falcon")
    one, two = FAMILIES["falcon"](), FAMILIES["falcon"]()
    path = tmp_path / "config.json"
    one.config(Fields(read_json_object(path), path))
    configure(tmp_path, new_decoder_architecture=True)
    two.config(Fields(read_json_object(path), path))
    assert "input_layernorm" in one.layer and "ln_attn" not in one.layer
    assert "input_layernorm" not in two.layer and "ln_attn" in two.layer
