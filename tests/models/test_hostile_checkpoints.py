"""Files that are not what their config says, for every family."""

import pytest
import torch
from released import CLASSES, REFINED_WEB, configure, edit, make, make_refined_web
from safetensors.torch import load_file
from t5_decoder import t5_decoder

from probe.errors import ProbeError
from probe.models.families import FAMILIES
from probe.models.pretrained import load_pretrained
from probe.models.stored import Stored

WEIGHTS = "model.safetensors"


def release(folder, family):
    """A whole checkpoint of a family."""
    if family in CLASSES:
        make(folder, family)
    elif family in REFINED_WEB:
        make_refined_web(folder, family)
    elif family == "llama_nope":
        make(folder, "llama")
    else:
        assert family == "custom_decoder_only_t5"
        t5_decoder(folder)


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """Asserts that the folder is refused in one line that names a file and a key, with no weight having been read."""

    def read(stored):
        raise AssertionError(f"{stored.key} was read")

    def check(family, file, *words):
        with monkeypatch.context() as patched:
            patched.setattr(Stored, "read", read)
            with pytest.raises(ProbeError) as caught:
                load_pretrained(tmp_path, family=family)
        message = str(caught.value)
        assert "\n" not in message and message.startswith(str(tmp_path / file)), message
        for word in words:
            assert word in message, message

    return check


def a_matrix(state, family):
    """The key of a matrix in a layer; one that is never used would be left unread."""
    kind = FAMILIES[family]()
    used = (key for key in sorted(state) if ".0." in key and not kind.is_ignored(kind.key(key)))
    return next(key for key in used if state[key].ndim == 2)


def renamed(state, key):
    state[f"{key}_"] = state.pop(key)


def missing(state, key):
    del state[key]


def extra(state, key):
    state[f"{key}_"] = state[key].clone()


def a_row_too_many(state, key):
    state[key] = torch.cat((state[key], state[key][:1]))


def integers(state, key):
    state[key] = state[key].int()


# What is done to the key, and what a refusal says of it.
CHANGES = {
    renamed: "key {key!r} is missing in model.safetensors",
    missing: "key {key!r} is missing in model.safetensors",
    extra: "unknown key '{key}_'",
    a_row_too_many: "{key!r} must have shape ({rows}, {columns}), got ({more_rows}, {columns})",
    integers: "{key!r} must be one of F64, F32, F16, BF16, got I32",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_tensor_that_is_not_the_wanted_one(family, change, refused, tmp_path):
    release(tmp_path, family)
    whole = load_file(tmp_path / WEIGHTS)
    key = a_matrix(whole, family)
    rows, columns = whole[key].shape
    edit(tmp_path, lambda state: change(state, key))
    file = "" if "missing" in CHANGES[change] else WEIGHTS
    refused(family, file, CHANGES[change].format(key=key, rows=rows, columns=columns, more_rows=rows + 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pickle_in_place_of_safetensors(family, refused, tmp_path):
    release(tmp_path, family)
    (tmp_path / WEIGHTS).unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")
    refused(family, WEIGHTS, "no such file", "got pytorch_model.bin: a pickle can run code")
    (tmp_path / "pytorch_model.bin").rename(tmp_path / WEIGHTS)
    refused(family, WEIGHTS, "not a whole safetensors file")


# A number of heads that is not the file's, and the key of a tensor that then has another shape.
LIES = {
    "llama": ({"num_key_value_heads": 2}, "model.layers.0.self_attn.k_proj.weight"),
    "smollm3": ({"num_key_value_heads": 2}, "model.layers.0.self_attn.k_proj.weight"),
    "llama_nope": ({"num_key_value_heads": 2}, "model.layers.0.self_attn.k_proj.weight"),
    "falcon": ({"num_attention_heads": 8}, "transformer.h.0.self_attention.query_key_value.weight"),
    "RefinedWebModel": ({"n_head": 8}, "transformer.h.0.self_attention.query_key_value.weight"),
    "RefinedWeb": ({"n_head_kv": 1}, "transformer.h.0.self_attention.query_key_value.weight"),
    "custom_decoder_only_t5": ({"num_heads": 4}, "decoder.block.0.layer.0.SelfAttention.q.weight"),
}
# Queries, keys and values have d_model rows each, whatever the number of heads is: nobody can see the lie.
UNSEEN = ("gpt2", "gpt_neox", "bloom", "mpt", "opt")


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(
            name, marks=[pytest.mark.skip("any number of heads has the same shapes")] if name in UNSEEN else []
        )
        for name in FAMILIES
    ],
)
def test_a_config_that_lies_about_heads(family, refused, tmp_path):
    release(tmp_path, family)
    changes, key = LIES[family]
    configure(tmp_path, **changes)
    refused(family, WEIGHTS, f"{key!r} must have shape ")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_checkpoint_is_read(family, tmp_path):
    # So that what is refused above is refused for what was done to it.
    release(tmp_path, family)
    load_pretrained(tmp_path, family=family)


def test_the_two_unused_rows_of_opts_positions_are_counted(refused, tmp_path):
    make(tmp_path, "opt")
    key = "model.decoder.embed_positions.weight"
    for rows in (64, 65, 67):
        edit(tmp_path, lambda state, rows=rows: state.update({key: torch.zeros(rows, 32)}))
        refused("opt", WEIGHTS, f"{key!r} must have shape (66, 32), got ({rows}, 32)")
