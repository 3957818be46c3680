"""What can't be looked at is refused in one line, with nothing half-loaded."""

import pytest
import torch
import transformers
from decoder_classes import build
from released import configure, edit

import probe
from probe.errors import ProbeError
from probe.models.open.wrapping import wrap
from probe.models.pretrained import load_pretrained

TINY = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def in_one_line(refused, message, call):
    with pytest.raises(ProbeError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(refused))


def test_what_is_no_decoder_with_attention_in_memory():
    bert = transformers.BertModel(transformers.BertConfig(**TINY))
    masked = transformers.BertForMaskedLM(transformers.BertConfig(**TINY))
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    )
    body = build("qwen2").model
    in_one_line("a BertModel", "a causal language model is needed", lambda: wrap(bert.eval()))
    in_one_line(
        "a BertForMaskedLM",
        "a causal language model is needed, but layer 0 attends to later tokens",
        lambda: wrap(masked.eval()),
    )
    in_one_line("a T5For", "a causal language model is needed", lambda: wrap(t5.eval()))
    in_one_line("a Qwen2Model", "a causal language model is needed", lambda: wrap(body))


def test_what_is_no_decoder_with_attention_in_a_folder(tmp_path):
    bert, t5, mamba = (tmp_path / name for name in ("bert", "t5", "mamba"))
    transformers.BertForMaskedLM(transformers.BertConfig(**TINY)).save_pretrained(bert)
    transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    ).save_pretrained(t5)
    build("mamba").save_pretrained(mamba)
    for folder, message in {
        bert: "a causal language model is needed, but layer 0 attends to later tokens",
        t5: "'is_encoder_decoder' must be false",
        mamba: "a MambaForCausalLM never asks it for attention",
    }.items():
        in_one_line(folder, message, lambda folder=folder: load_pretrained(folder, device="cpu"))


@pytest.fixture
def folder(tmp_path):
    build("qwen2").save_pretrained(tmp_path)
    return tmp_path


def test_quantised_weights_and_code_of_the_checkpoints_own(folder):
    configure(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    in_one_line(folder, "'quantization_config' must be absent", lambda: load_pretrained(folder, device="cpu"))
    configure(folder, quantization_config="missing", auto_map={"AutoModelForCausalLM": "modeling.Model"})
    in_one_line(folder, "'auto_map' must be absent, got code of", lambda: load_pretrained(folder, device="cpu"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(folder, bad):
    name = "model.layers.1.mlp.up_proj.weight"
    edit(folder, lambda state: state[name].view(-1)[3:4].fill_(bad))
    message = f"weights must be finite, got NaN or infinity in '{name}'"
    in_one_line(folder, message, lambda: load_pretrained(folder, device="cpu"))


def test_an_error_inside_transformers_is_one_line(folder, monkeypatch):
    from transformers.models.qwen2 import modeling_qwen2

    def broken(*args, **kwargs):
        raise RuntimeError("sizes\ndo not fit")

    monkeypatch.setattr(modeling_qwen2.Qwen2MLP, "forward", broken)
    message = "transformers cannot run it: RuntimeError: sizes do not fit"
    in_one_line(folder, message, lambda: load_pretrained(folder, device="cpu"))
    monkeypatch.setattr(modeling_qwen2.Qwen2Model, "__init__", broken)
    message = "transformers cannot load it: RuntimeError: sizes do not fit"
    in_one_line(folder, message, lambda: load_pretrained(folder, device="cpu"))


def test_transformers_attentions_that_disagree(monkeypatch):
    """Its fused and its eager attention computing different things."""
    from transformers.models.qwen2 import modeling_qwen2

    right = modeling_qwen2.eager_attention_forward
    monkeypatch.setattr(
        modeling_qwen2,
        "eager_attention_forward",
        lambda module, query, *args, **kw: right(module, 2 * query, *args, **kw),
    )
    in_one_line("a Qwen2ForCausalLM", "must agree to 0.0001", lambda: wrap(build("qwen2")))


def test_tokens_and_sites_that_do_not_exist():
    model = wrap(build("qwen2"))
    with pytest.raises(ProbeError, match="128"):
        model(torch.tensor([[1, 128]]))
    with pytest.raises(ProbeError, match="unknown site 'blocks.9.hook_resid_pre'; a Qwen2ForCausalLM has hook_embed"):
        model(torch.tensor([[1, 2]]), hooks={"blocks.9.hook_resid_pre": lambda x: x})
    with pytest.raises(ProbeError, match="hooks and a cache can't be given together"):
        model(torch.tensor([[1, 2]]), hooks={"hook_embed": lambda x: x}, cache=model.new_cache())
    with pytest.raises(ProbeError, match="unknown site"):
        probe.trace(model, torch.tensor([[1, 2]]), ["hook_nothing"])
