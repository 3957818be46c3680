import pytest

from probe.models.decoder import DecoderConfig
from probe.tasks import make_task
from probe.training import TrainingConfig, encode


@pytest.fixture(scope="session")
def task():
    return make_task("copy", {"train_length": 5, "test_length": 10, "n_symbols": 6})


@pytest.fixture(scope="session")
def splits(task):
    return task.splits(n_train=2000, n_validation=100, n_test=200)


@pytest.fixture(scope="session")
def data(task, splits):
    return encode(splits.train, task.vocabulary)


@pytest.fixture(scope="session")
def small(task):
    """The config of a decoder that learns this task in seconds."""
    return DecoderConfig(
        d_vocab=len(task.vocabulary), n_ctx=24, n_layers=2, d_model=32, n_heads=4, encoding="t5", dropout=0.1
    )


@pytest.fixture(scope="session")
def quick():
    return TrainingConfig(steps=30, batch_size=16, learning_rate=3e-3, log_every=5, checkpoint_every=10)
