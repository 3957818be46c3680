import dataclasses

import pytest

from probe.sweep import SweepConfig, run_sweep
from probe.sweep.local import attempt
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


def in_this_process(sweep, folder, **options):
    """A sweep whose runs are done here, one after the other: a process a run takes seconds of imports for each."""

    def run_here(sweep, runs, folder, *, device, **_):
        return ((run, attempt(sweep, run, folder, device)) for run in runs)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("probe.sweep.run.run_locally", run_here)
        return run_sweep(sweep, folder, device="cpu", **options)


@pytest.fixture(scope="session")
def swept(tiny, tmp_path_factory):
    """A sweep that nothing disturbed."""
    folder, said = tmp_path_factory.mktemp("sweep") / "run", []
    rows = in_this_process(tiny, folder, say=said.append)
    return folder, rows, said


@pytest.fixture(scope="session")
def long(tiny):
    """Two runs, long enough for something to happen to them."""
    training = dataclasses.replace(tiny.training, steps=150, checkpoint_every=15)
    two = {name: tiny.encodings[name] for name in ("none", "hybrid")}
    return dataclasses.replace(tiny, tasks={"copy": tiny.tasks["copy"]}, encodings=two, training=training)


@pytest.fixture(scope="session")
def undisturbed(long, tmp_path_factory):
    """Their rows; runs in processes of their own, local or on a cluster, must come to the same."""
    return in_this_process(long, tmp_path_factory.mktemp("long") / "run")
