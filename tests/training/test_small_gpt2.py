import pytest
import torch
from tokenized import write_texts

import probe
from probe.errors import ProbeError
from probe.tasks import read_tokenizer
from probe.training.small_gpt2 import make_small_gpt2

SMALL = {"n_layers": 1, "d_model": 16, "n_heads": 2, "n_positions": 32, "vocab_size": 300}


def test_it_is_a_released_model_like_any_other_and_learns(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = write_texts(tmp_path / "texts")
    folders = [make_small_gpt2(tmp_path / str(n), text=text, steps=n, **SMALL) for n in (1, 40)]
    drawn, trained = (AutoModelForCausalLM.from_pretrained(folder) for folder in folders)
    theirs, words = AutoTokenizer.from_pretrained(folders[1]), read_tokenizer(str(folders[1]))
    ids = torch.tensor([[words.bos, *words.ids_of("the pass key is green and the sky is blue, remember it")]])
    assert ids[0, 1:].tolist() == theirs("the pass key is green and the sky is blue, remember it").input_ids
    losses = [float(model(ids, labels=ids).loss.detach()) for model in (drawn, trained)]
    assert losses[1] < losses[0] - 0.5
    ours = probe.load_pretrained(folders[1])
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), trained(ids).logits, atol=1e-5, rtol=1e-5)
    # The same again, and a finished one is left as it is.
    again = make_small_gpt2(tmp_path / "again", text=text, steps=40, **SMALL)
    assert all(
        torch.equal(a, b) for a, b in zip(ours.parameters(), probe.load_pretrained(again).parameters(), strict=True)
    )
    written = (again / "model.safetensors").stat().st_mtime_ns
    assert make_small_gpt2(again, text=text, steps=1) == again
    assert (again / "model.safetensors").stat().st_mtime_ns == written


def test_bad_input_is_one_clear_line(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ProbeError, match="a new folder or a model was wanted, got a folder with other files"):
        make_small_gpt2(tmp_path)
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text("short")
    with pytest.raises(ProbeError, match="texts of at least 3200 tokens were wanted"):
        make_small_gpt2(tmp_path / "out", text=str(tmp_path), **SMALL)
    assert not (tmp_path / "out").exists()
