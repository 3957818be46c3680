import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from probe.errors import ProbeError
from probe.models.checkpoint import load, save
from probe.models.encodings import ENCODINGS
from probe.models.lens import to_bridge


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("options", [{}, {"tie_embeddings": True, "bias": False, "normalization": "rms"}])
def test_what_is_saved_comes_back_to_the_last_bit(encoding, options, make_decoder, random_tokens, tmp_path):
    decoder = make_decoder(encoding=encoding, **options)
    save(decoder, tmp_path / "model")
    back = load(tmp_path / "model")
    assert back.config == decoder.config
    assert torch.equal(back(random_tokens()), decoder(random_tokens()))
    assert (back.head.weight is back.token_embedding.weight) == decoder.config.tie_embeddings
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]


def test_dtypes_are_kept_unless_another_is_asked(make_decoder, tmp_path):
    save(make_decoder(encoding="alibi").bfloat16(), tmp_path / "model")
    assert load(tmp_path / "model").dtype == torch.bfloat16
    assert load(tmp_path / "model", dtype=torch.float64).dtype == torch.float64


def test_saving_again_replaces_a_checkpoint_and_nothing_else(make_decoder, tmp_path):
    save(make_decoder(seed=1), tmp_path / "model")
    save(make_decoder(seed=2), tmp_path / "model")
    assert torch.equal(load(tmp_path / "model").head.weight, make_decoder(seed=2).head.weight)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(ProbeError, match="must be a new folder or an older one"):
        save(make_decoder(), tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"


@pytest.fixture
def saved(make_decoder, tmp_path):
    save(make_decoder(encoding="t5"), tmp_path)
    return tmp_path


def broken_config(saved, **changes):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({k: v for k, v in (config | changes).items() if v != "missing"}))


def broken_weights(saved, change):
    state = load_file(saved / "model.safetensors")
    change(state)
    save_file(state, saved / "model.safetensors")


def test_a_truncated_file_is_named(saved):
    path = saved / "model.safetensors"
    whole = path.read_bytes()
    for size in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ProbeError, match=r"model\.safetensors: not a whole safetensors file"):
            load(saved)


def test_a_pickle_is_refused_and_not_run(saved):
    class Bomb:
        def __reduce__(self):
            return (open, (str(saved / "exploded"), "w"))

    (saved / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ProbeError, match=r"model\.safetensors: not a whole safetensors file"):
        load(saved)
    torch.save({"weights": torch.zeros(2)}, saved / "model.safetensors")
    with pytest.raises(ProbeError, match=r"model\.safetensors: not a whole safetensors file"):
        load(saved)
    assert not (saved / "exploded").exists()


def test_keys_and_shapes_are_named(saved):
    broken_weights(saved, lambda state: state.update(surprise=torch.zeros(2)))
    with pytest.raises(ProbeError, match=r"model\.safetensors: unknown key 'surprise'"):
        load(saved)
    broken_weights(saved, lambda state: (state.pop("surprise"), state.pop("encoding.weight")))
    with pytest.raises(ProbeError, match=r"model\.safetensors: key 'encoding\.weight' is missing"):
        load(saved)
    broken_weights(saved, lambda state: state.update({"encoding.weight": torch.zeros(4, 32)}))
    with pytest.raises(ProbeError, match=r"'encoding\.weight' must have shape \(32, 4\), got \(4, 32\)"):
        load(saved)
    broken_weights(saved, lambda state: state.update({"encoding.weight": torch.zeros(32, 4, dtype=torch.int64)}))
    with pytest.raises(ProbeError, match=r"'encoding\.weight' must be torch\.float32, got torch\.int64"):
        load(saved)
    broken_weights(saved, lambda state: state.update({"encoding.weight": torch.zeros(32, 4, dtype=torch.float16)}))
    with pytest.raises(ProbeError, match=r"one dtype was wanted, got torch\.float16, torch\.float32"):
        load(saved)


def test_a_bad_config_is_named(saved):
    broken_config(saved, heads=3)
    with pytest.raises(ProbeError, match=r"config\.json: unknown option of a decoder's config 'heads'"):
        load(saved)
    broken_config(saved, heads="missing", n_heads=5)
    with pytest.raises(ProbeError, match=r"config\.json: n_heads \(5\) must be divisible"):
        load(saved)
    (saved / "config.json").write_text("{")
    with pytest.raises(ProbeError, match=r"config\.json: must be JSON"):
        load(saved)
    (saved / "config.json").unlink()
    with pytest.raises(ProbeError, match=r"config\.json: no such file"):
        load(saved)


def test_a_checkpoint_is_saved_and_loaded_in_the_current_folder(make_decoder, tmp_path, monkeypatch):
    decoder, other = make_decoder(), make_decoder(seed=1)
    save(decoder, tmp_path / "mine")
    monkeypatch.chdir(tmp_path / "mine")
    assert torch.equal(load(".").head.weight, decoder.head.weight)
    save(other, tmp_path / "mine")
    assert torch.equal(load(tmp_path / "mine").head.weight, other.head.weight)


def test_what_is_no_model_of_ours_replaces_no_checkpoint(make_decoder, tmp_path):
    decoder = make_decoder()
    save(decoder, tmp_path / "good")
    for other in (to_bridge(decoder), torch.nn.Linear(2, 2)):
        with pytest.raises(ProbeError, match="model must be a Decoder or a ClockworkRNN, got .*; nothing was written"):
            save.__wrapped__(other, tmp_path / "good") if hasattr(save, "__wrapped__") else save(other, tmp_path)
    assert torch.equal(load(tmp_path / "good").head.weight, decoder.head.weight)
