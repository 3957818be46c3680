"""One run of a sweep, wherever it is executed: train or go on training, evaluate, hand the rows back."""

import shutil
from pathlib import Path

import pandas as pd

from probe.sweep.config import Run, SweepConfig
from probe.training import encode, exact_match, predict, train
from probe.training.evaluation import context_length


def work(sweep: SweepConfig, run: Run, folder: str | Path, device: str | None = None) -> pd.DataFrame:
    """The rows of a run: exact match by length of both held-out splits (split, length, metric, value, low, high, n).

    Its checkpoints are in the sweep's folder, so a run that was broken off goes on wherever the next try is made, if it
    sees that folder.
    """
    task = run.make_task(sweep)
    splits = task.splits(n_train=sweep.n_train, n_validation=sweep.n_validation, n_test=sweep.n_test, seed=run.seed)
    held_out = {"validation": splits.validation, "test": splits.test}
    data = encode(splits.train, task.vocabulary)
    n_ctx = context_length(data, (*splits.validation, *splits.test), task)
    place = Path(folder) / "models" / run.name
    model = train(run.model(sweep, task, n_ctx), data, run.training(sweep), place, device=device)
    parts = [
        exact_match(predict(model, examples, task.vocabulary, task=task)).assign(split=split)
        for split, examples in held_out.items()
        if examples
    ]
    return pd.concat(parts, ignore_index=True)


def clear(sweep: SweepConfig, run: Run, folder: str | Path) -> None:
    """What a finished run need not keep."""
    if not sweep.keep_models:
        shutil.rmtree(Path(folder) / "models" / run.name, ignore_errors=True)
