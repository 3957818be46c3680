import pytest

from probe.sweep import SweepConfig, run_sweep
from probe.training import TrainingConfig

TINY = {
    "tasks": {
        "copy": {"train_length": 4, "test_length": 8, "n_symbols": 5},
        "sums": {"task": "summation", "train_length": 3, "test_length": 6, "prompt": False},
    },
    "encodings": {
        "none": {},
        "hybrid": {"encoding": "rotary", "position_layers": [1]},
        "clock": {"model": "clockwork", "n_modules": 2},
    },
    "scratchpads": {"none": [], "steps": ["computation", "output"]},
    "seeds": (3,),
    "n_train": 300,
    "n_validation": 20,
    "n_test": 60,
    "model": {"n_layers": 2, "d_model": 16, "n_heads": 2},
    "training": TrainingConfig(steps=12, batch_size=16, learning_rate=3e-3, checkpoint_every=4, log_every=4),
}


@pytest.fixture(scope="session")
def tiny():
    return SweepConfig.from_dict(TINY)


@pytest.fixture(scope="session")
def swept(tiny, tmp_path_factory):
    """A sweep that nothing disturbed."""
    folder, said = tmp_path_factory.mktemp("sweep") / "run", []
    rows = run_sweep(tiny, folder, device="cpu", jobs=2, say=said.append)
    return folder, rows, said
