import pytest
import torch

from probe.models.decoder import DecoderConfig
from probe.tasks import make_task
from probe.training import TrainingConfig, encode, train


@pytest.fixture(scope="session")
def task():
    return make_task("copy", {"train_length": 6, "test_length": 24, "n_symbols": 6})


@pytest.fixture(scope="session")
def splits(task):
    return task.splits(n_train=3000, n_validation=60, n_test=300)


@pytest.fixture(scope="session")
def trained(task, splits):
    """A decoder without position encoding that has learned to copy short strings."""
    config = DecoderConfig(d_vocab=len(task.vocabulary), n_ctx=64, n_layers=2, d_model=64, n_heads=4)
    training = TrainingConfig(steps=400, batch_size=64, learning_rate=3e-3)
    return train(config, encode(splits.train, task.vocabulary), training)


@pytest.fixture(scope="session")
def longer(task, splits):
    """Strings of two to four times the trained length."""
    return encode([e for e in splits.test if e.length > 12], task.vocabulary)


@pytest.fixture
def make_llama():
    """Makes small models of Hugging Face's Llama, with grouped heads and biases."""

    def make(**options):
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = {"vocab_size": 19, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True}
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, "attn_implementation": "eager", **options})).eval()

    return make
