"""Which model it is: whatever a checkpoint holds counts, and nothing else."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from probe.models import twin_seed
from probe.models.encodings import ENCODINGS
from probe.models.identity import weights_digest
from probe.models.lens import to_bridge

SMALL = {"vocab_size": 50, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": None}
EXPERTS = {
    **{"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 0},
    **{"moe_intermediate_size": 8, "intermediate_size": 16, "q_lora_rank": 8, "kv_lora_rank": 8, "v_head_dim": 8},
    **{"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "num_hidden_layers": 1},
}


def of_transformers(kind, **options):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL, **options)).eval()


def test_a_learned_buffer_counts():
    """The bias that decides which experts are chosen is no parameter: training moves it by a rule of its own."""
    model = of_transformers("deepseek_v3", **EXPERTS)
    changed = copy.deepcopy(model)
    changed.model.layers[0].mlp.gate.e_score_correction_bias[1] = 0.5
    assert weights_digest(copy.deepcopy(model)) == weights_digest(model) != weights_digest(changed)
    assert twin_seed(changed) != twin_seed(model)


def test_a_buffer_that_no_checkpoint_holds_does_not_count():
    model = of_transformers("llama", num_hidden_layers=1, intermediate_size=16)
    before = weights_digest(model)
    model.register_buffer("cache", torch.ones(3), persistent=False)
    assert weights_digest(model) == before
    model.register_buffer("kept", torch.ones(3))
    assert weights_digest(model) != before


@pytest.mark.parametrize("options", [{"encoding": name} for name in ENCODINGS] + [{"tie_embeddings": True}], ids=str)
def test_a_bridge_has_the_digest_of_its_decoder(options, make_decoder):
    model = make_decoder(**options)
    assert weights_digest(to_bridge(model)) == weights_digest(model)


def test_the_twin_of_a_model_of_transformers_is_the_same_in_every_dtype():
    model = of_transformers("gpt2", n_layer=1)
    model.config.dtype = torch.float32
    double = copy.deepcopy(model).double()
    double.config.dtype = torch.float64  # as a checkpoint that was saved in it says
    assert twin_seed(double) == twin_seed(model)
    assert weights_digest(double) != weights_digest(model)
