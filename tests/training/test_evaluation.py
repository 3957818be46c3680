"""Predictions with scratchpads, from completions that are written here."""

import dataclasses

import pandas as pd
import pytest
from scipy.stats import binomtest

from probe.tasks import make_task
from probe.tasks.scratchpad import render
from probe.training import evaluation
from probe.training.evaluation import exact_match, predict

PARTS = ("input", "output", "variables")
task = make_task("summation", {"scratchpad": PARTS, "train_length": 3, "test_length": 6})
examples = [e for e in task.splits(n_train=40, n_validation=1, n_test=1).train if e.length > 1][:4]


@pytest.fixture
def said(monkeypatch):
    """Lets a decoder say what it is told to; returns what it was asked for."""
    asked = {}

    def say(completions):
        def greedy_in_groups(decoder, prompts, **options):
            asked.update(options, prompts=prompts)
            return [task.vocabulary.encode(tokens) for tokens in completions]

        monkeypatch.setattr(evaluation, "greedy_in_groups", greedy_in_groups)
        return asked

    return say


def completions():
    """Right in all; a wrong step, the right answer; right steps, a wrong answer; nothing but the answer."""
    slip, wrong = examples[1], examples[2]
    steps = task.steps(slip.source)
    steps[1] = dataclasses.replace(steps[1], output=("+",))
    answer = task.split_completion(slip.target)[1]
    return [
        examples[0].target,
        (*render(steps, PARTS), *answer),
        (*wrong.target[:-2], "+", "."),
        task.split_completion(examples[3].target)[1],
    ]


def test_answers_and_steps_are_told_apart(said, make_decoder):
    asked = said(completions())
    rows = predict(make_decoder(d_vocab=len(task.vocabulary)), examples, task.vocabulary, task=task)
    assert rows["correct"].tolist() == [True, True, False, True]
    assert rows["steps_correct"].tolist() == [True, False, True, False]
    assert rows["first_wrong_step"].tolist() == [pd.NA, 1, pd.NA, 0]
    assert asked["max_new"] == [int(1.25 * len(e.target)) + 8 for e in examples]
    assert rows["prediction"][0] == " ".join(examples[0].target)


def test_without_the_task_all_is_as_it_was(said, make_decoder):
    asked = said(completions())
    decoder = make_decoder(d_vocab=len(task.vocabulary))
    rows = predict(decoder, examples, task.vocabulary)
    assert list(rows) == ["source", "target", "prediction", "length", "correct"]
    assert rows["correct"].tolist() == [True, False, False, False]
    assert asked["max_new"] == [len(e.target) + 1 for e in examples]
    pd.testing.assert_frame_equal(rows, predict(decoder, examples, task.vocabulary, task=make_task("summation")))
    assert set(exact_match(rows)["metric"]) == {"exact_match"}


def test_metrics_of_steps_by_length():
    predictions = pd.DataFrame(
        {
            "length": [3, 3, 3, 5],
            "correct": [True, True, False, True],
            "steps_correct": [True, False, True, False],
        }
    )
    rows = exact_match(predictions)
    assert rows["metric"].unique().tolist() == ["exact_match", "steps_exact", "right_answer_wrong_steps"]
    value = rows.set_index(["metric", "length"])["value"]
    assert value["steps_exact"].tolist() == [0.5, 2 / 3, 0.0]
    assert value["right_answer_wrong_steps"].tolist() == [0.5, 1 / 3, 1.0]
    last = rows[rows["metric"] == "right_answer_wrong_steps"].iloc[1]
    interval = binomtest(1, 3).proportion_ci(0.95, method="wilson")
    assert (last["low"], last["high"], last["n"]) == (interval.low, interval.high, 3)
    assert rows.loc[:2].equals(exact_match(predictions[["length", "correct"]]))


def test_a_real_decoder_is_checked(make_decoder):
    decoder = make_decoder(d_vocab=len(task.vocabulary), n_ctx=200, encoding="alibi")
    rows = predict(decoder, examples, task.vocabulary, task=task)
    assert not rows["correct"].any() and not rows["steps_correct"].any()
    assert (rows["first_wrong_step"] >= 0).all()


@pytest.mark.parametrize("name", ["addition", "lego", "summation"])
def test_what_is_said_does_not_depend_on_who_shares_the_batch(name, make_decoder):
    """Each example ends after its own limit: one that is decoded with longer ones is not heard out for longer."""
    stepped = make_task(name, {"scratchpad": PARTS, "train_length": 3, "test_length": 6})
    mixed = stepped.splits(n_train=60, n_validation=1, n_test=1).train[:16]
    decoder = make_decoder(d_vocab=len(stepped.vocabulary), n_ctx=512, encoding="alibi")
    together = predict(decoder, mixed, stepped.vocabulary, task=stepped)
    alone = predict(decoder, mixed[::-1], stepped.vocabulary, task=stepped, batch_size=1)[::-1]
    pd.testing.assert_frame_equal(together, alone.reset_index(drop=True))
    # A decoder that nobody trained stops by itself now and then, and else at its limit: several limits are seen.
    lengths = together["prediction"].str.split().str.len()
    limits = pd.Series([int(1.25 * len(e.target)) + 8 for e in mixed])
    assert (lengths <= limits).all() and limits[lengths == limits].nunique() > 1
