"""Exact match by length, from greedy decoding; with scratchpads, whether their steps are right too."""

from collections.abc import Iterable, Sequence
from typing import TypeGuard

import pandas as pd
from torch import nn

from probe.deprecation import old_arguments
from probe.errors import ProbeError
from probe.models.mode import evaluating
from probe.statistics import wilson
from probe.tasks.base import Example, Task, Vocabulary
from probe.tasks.scratchpad import SteppedTask
from probe.training.data import EncodedExamples
from probe.training.decoding import greedy_in_groups


@old_arguments(decoder="model")
def predict(
    model: nn.Module,
    examples: Sequence[Example],
    vocabulary: Vocabulary,
    *,
    task: Task | None = None,
    batch_size: int = 256,
) -> pd.DataFrame:
    """One row an example: source, target, prediction (strings), length, correct.

    Decoding ends after ``new_tokens``. Where ``task`` has a scratchpad, ``correct`` is the answer's, whatever the
    steps, and ``steps_correct`` and ``first_wrong_step`` (from 0, missing where all are right) say what
    ``SteppedTask.check`` finds of these.

    Args:
        model: a ``Decoder``, a ``ClockworkRNN`` or a bridge.
        examples: at least one.
        vocabulary: the one of the task that the examples come from.
        task: that task, where it has a scratchpad.
        batch_size: how many examples are decoded at once.

    Raises:
        ProbeError: for no examples.
    """
    if not examples:
        raise ProbeError("at least one example was wanted, got none")
    said = completions(model, examples, vocabulary, task=task, batch_size=batch_size)
    rows = pd.DataFrame(
        {
            "source": [" ".join(e.source) for e in examples],
            "target": [" ".join(e.target) for e in examples],
            "prediction": [" ".join(tokens) for tokens in said],
            "length": [e.length for e in examples],
            "correct": [tokens == list(e.target) for tokens, e in zip(said, examples, strict=True)],
        }
    )
    if not _has_scratchpad(task):
        return rows
    checks = [task.check(e.source, tokens) for tokens, e in zip(said, examples, strict=True)]
    return rows.assign(
        correct=[check.answer_right for check in checks],
        steps_correct=[check.steps_right for check in checks],
        first_wrong_step=pd.array([check.first_wrong_step for check in checks], dtype="Int64"),
    )


def completions(
    model: nn.Module,
    examples: Sequence[Example],
    vocabulary: Vocabulary,
    *,
    task: Task | None = None,
    batch_size: int = 256,
) -> list[list[str]]:
    """What a model says of each example, greedily, to the end or for ``new_tokens``."""
    with evaluating(model):
        said = greedy_in_groups(
            model,
            [vocabulary.prompt(e) for e in examples],
            stop=vocabulary.stop,
            max_new=[new_tokens(e, task) for e in examples],
            batch_size=batch_size,
        )
    return [vocabulary.decode(tokens) for tokens in said]


def new_tokens(example: Example, task: Task | None = None) -> int:
    """How far an example is decoded: one token beyond the target, which is enough to tell a prediction that is right
    from one that goes on (where the target does not end, as far as it); with a scratchpad to 1.25 times the target and
    8 tokens more, so that an answer after a longer one is seen."""
    n = len(example.target)
    return int(1.25 * n) + 8 if _has_scratchpad(task) else n + example.ends


def context_length(train: EncodedExamples, held_out: Iterable[Example], task: Task) -> int:
    """The longest sequence of all, what evaluation may decode included: a learned table ends there."""
    decoded = (len(task.vocabulary.prompt(example)) + new_tokens(example, task) for example in held_out)
    return max((train.tokens.shape[1], *decoded))


def _has_scratchpad(task: Task | None) -> TypeGuard[SteppedTask]:
    return isinstance(task, SteppedTask) and bool(task.scratchpad)


def exact_match(predictions: pd.DataFrame, confidence: float = 0.95) -> pd.DataFrame:
    """Exact match in [0, 1] by length, and over all lengths (``length`` missing), with Wilson intervals.

    With scratchpads (a column ``steps_correct``) two more metrics: "steps_exact", all steps right, and
    "right_answer_wrong_steps". Columns: length, metric, value, low, high, n.
    """
    metrics = {"exact_match": predictions["correct"]}
    if "steps_correct" in predictions:
        metrics["steps_exact"] = predictions["steps_correct"]
        metrics["right_answer_wrong_steps"] = predictions["correct"] & ~predictions["steps_correct"]
    rows = []
    for metric, holds in metrics.items():
        for length, group in [(pd.NA, holds), *holds.groupby(predictions["length"])]:
            right, n = int(group.sum()), len(group)
            rows.append((length, metric, right / n, *wilson(right, n, confidence), n))
    rows = pd.DataFrame(rows, columns=["length", "metric", "value", "low", "high", "n"])
    return rows.astype({"length": "Int64"})
