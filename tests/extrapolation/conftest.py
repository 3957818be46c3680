import pytest

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
