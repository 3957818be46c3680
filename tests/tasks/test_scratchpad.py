import dataclasses
from itertools import chain, combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probe.tasks import Step, make_task
from probe.tasks.scratchpad import CLOSE, MARKERS, OPEN, PARTS, STEP, parse, render, split_completion

STEPPED = {
    "addition": {},
    "polynomial": {},
    "summation": {},
    "parity": {},
    "sorting": {},
    "sorting multi": {"variant": "multi"},
    "lego": {},
    "lego permuted": {"order": "permuted"},
}
SUBSETS = list(chain.from_iterable(combinations(PARTS, n) for n in range(1, 6)))


def stepped(name, parts, **options):
    return make_task(name.split()[0], {**STEPPED[name], "scratchpad": parts, **options})


# The format itself, with all parts, one example a task.
@pytest.mark.parametrize(
    ("name", "asked", "steps"),
    [
        (
            "addition",
            "Compute : 9 5 + 7 ?",
            [
                ">> 5 , 7 :: 5 + 7 + 0 = 1 2 == 2 @ carry = 1 => 9 +",
                ">> 9 , 0 :: 9 + 0 + 1 = 1 0 == 0 @ carry = 1 => +",
                ">> 0 , 0 :: 0 + 0 + 1 = 1 == 1 @ carry = 0 => +",
            ],
        ),
        (
            "polynomial",
            "Evaluate x = -2 in ( 3 x ** 0 + -1 x ** 3 ) % 10 ?",
            [
                ">> 3 x ** 0 :: 3 * -2 ** 0 = 3 * 1 == 3 @ sum = 3 => -1 x ** 3",
                ">> -1 x ** 3 :: -1 * -2 ** 3 = -1 * -8 == 8 @ sum = 1 =>",
            ],
        ),
        (
            "summation",
            "Compute : ( 7 + 9 ) % 10 ?",
            [">> 7 :: 0 + 7 == 7 @ sum = 7 => 9", ">> 9 :: 7 + 9 == 16 @ sum = 6 =>"],
        ),
        (
            "parity",
            "Is the number of 1's even in [ 1 1 ] ?",
            [">> 1 :: 1 xor 0 == 1 @ parity = 1 => 1", ">> 1 :: 1 xor 1 == 0 @ parity = 0 =>"],
        ),
        (
            "sorting",
            "Sort the following numbers : 3 1 2 ?",
            [
                ">> 3 :: min ( 3 , 1 ) == 1 @ sorted = 1 => 3 2",
                ">> 3 :: min ( 3 , 2 ) == 2 @ sorted = 1 2 => 3",
                ">> 3 :: min ( 3 ) == 3 @ sorted = 1 2 3 =>",
            ],
        ),
        (
            "sorting multi",
            "Sort the following numbers : 9 1 , 1 0 4 ?",
            [
                ">> 9 1 :: min ( 9 1 , 1 0 4 ) == 9 1 @ sorted = 9 1 => 1 0 4",
                ">> 1 0 4 :: min ( 1 0 4 ) == 1 0 4 @ sorted = 9 1 , 1 0 4 =>",
            ],
        ),
        (
            "lego permuted",
            "If b = -a ; c = +b ; a = -1 . Then what is b ?",
            [
                ">> a = -1 :: -1 = - +1 == -1 @ a = -1 => b = -a ; c = +b",
                ">> b = -a :: -a = - -1 == +1 @ b = +1 => c = +b",
            ],
        ),
    ],
)
def test_format(name, asked, steps):
    task, bare = stepped(name, PARTS), stepped(name, ())
    source = tuple(asked.split())
    answer = " ".join(bare.target(source))
    assert " ".join(task.target(source)) == f"<scratch> {' # '.join(steps)} </scratch> {answer}"
    without = " ".join(stepped(name, ("output", "input")).target(source))
    assert without.startswith(f"<scratch> {steps[0].split(' :: ')[0]} == ") and "@" not in without.split()


@pytest.mark.parametrize("name", STEPPED)
@given(length=st.integers(1, 100), seed=st.integers(0, 10**6), parts=st.sampled_from(SUBSETS), prompt=st.booleans())
@settings(max_examples=8, deadline=None)
def test_round_trip(name, length, seed, parts, prompt):
    task = stepped(name, parts, prompt=prompt)
    example = task.draw(length, np.random.default_rng(seed))
    steps = task.steps(example.source)
    scratchpad, answer = task.split_completion(example.target)
    assert scratchpad + answer == example.target
    assert answer == stepped(name, (), prompt=prompt).target(example.source)
    assert scratchpad == render(steps, parts)
    read = parse(scratchpad, parts)
    assert all(set(each.parts) == set(parts) and not each.fault for each in read)
    kept = [Step(**{part: getattr(step, part) for part in parts}) for step in steps]
    assert [each.step for each in read] == kept
    assert task.tell(task.conclude(steps)) == answer
    task.vocabulary.completion(example)
    check = task.check(example.source, example.target)
    assert check.answer_right and check.answer_follows and check.steps_right
    assert (check.n_steps, check.first_wrong_step, check.reason) == (len(steps), None, "")
    if name != "addition" and "lego" not in name:
        assert len(steps) == length


@pytest.mark.parametrize("name", STEPPED)
def test_every_corrupted_token_is_found(name):
    """Another word, a marker or nothing in the place of any token of the scratchpad makes a step wrong. There is no
    exception: steps are judged word by word."""
    rng = np.random.default_rng(0)
    marks = [OPEN, STEP, CLOSE, *MARKERS.values()]
    for parts in SUBSETS:
        task = stepped(name, parts)
        example = task.draw(2, rng)
        scratchpad, answer = task.split_completion(example.target)
        for at, token in enumerate(scratchpad):
            others = [words[int(rng.integers(len(words)))] for words in (task.vocabulary.tokens, marks)]
            for put in [(), *((other,) for other in others if other != token)]:
                completion = (*scratchpad[:at], *put, *scratchpad[at + 1 :], *answer)
                check = task.check(example.source, completion)
                assert not check.steps_right, " ".join(completion)
                assert 0 <= check.first_wrong_step <= check.n_steps
                assert check.reason and "\n" not in check.reason


@pytest.mark.parametrize("name", STEPPED)
def test_every_corrupted_answer_is_found(name):
    task = stepped(name, PARTS)
    example = task.draw(4, np.random.default_rng(0))
    scratchpad, answer = task.split_completion(example.target)
    for at in range(len(answer)):
        check = task.check(example.source, (*scratchpad, *answer[:at], "#", *answer[at + 1 :]))
        assert check.steps_right and not check.answer_right and not check.answer_follows
        assert check.reason.startswith("the answer is ")


SLIPS = {
    "addition": {"variables": ("carry", "=", "1")},
    "polynomial": {"variables": ("sum", "=", "7")},
    "summation": {"variables": ("sum", "=", "0")},
    "parity": {"variables": ("parity", "=", "1")},
    "sorting": {"remaining": ("0", "1")},
    "lego": {"output": ("-1",), "variables": ("a", "=", "-1")},
}
ASKED = {
    "addition": "Compute : 1 2 3 + 4 5 6 ?",
    "polynomial": "Evaluate x = 1 in ( 1 x ** 0 + 2 x ** 1 + 3 x ** 1 ) % 10 ?",
    "summation": "Compute : ( 1 + 2 + 3 ) % 10 ?",
    "parity": "Is the number of 1's even in [ 0 1 1 ] ?",
    "sorting": "Sort the following numbers : 3 2 1 ?",
    "lego": "If a = +1 ; b = -a ; c = -b . Then what is c ?",
}


@pytest.mark.parametrize("name", SLIPS)
def test_an_early_slip_makes_one_step_wrong(name):
    task = stepped(name, PARTS)
    source = tuple(ASKED[name].split())
    question = task.read(source)
    first = dataclasses.replace(task.steps(source)[0], **SLIPS[name])
    steps = [first]
    while (step := task.follow(question, steps[-1])) is not None:
        steps.append(step)
    assert len(steps) == 3
    check = task.check(source, (*render(steps), *task.tell(task.conclude(steps))))
    assert check.wrong_steps == (0,) and check.first_wrong_step == 0 and not check.steps_right
    assert check.answer_follows and not check.answer_right
    assert check.reason.startswith("step 0: the ")
    right = task.check(source, (*render(steps), *stepped(name, ()).target(source)))
    assert right.answer_right and not right.answer_follows and not right.steps_right
    # Where variables and remaining input are not written, steps are judged by what they should have been.
    blind = stepped(name, ("input", "output"))
    good = blind.steps(source)
    slipped = [dataclasses.replace(good[0], output=("%",)), *good[1:]]
    assert blind.check(source, render(slipped, ("input", "output"))).wrong_steps == (0,)


def test_a_slip_that_makes_no_sense_is_passed_over():
    task, source = stepped("addition", PARTS), tuple(ASKED["addition"].split())
    steps = task.steps(source)
    for nonsense in ({"variables": ("carry",)}, {"remaining": ("1", "2")}, {"remaining": ("+", "%")}):
        slipped = [dataclasses.replace(steps[0], **nonsense), *steps[1:]]
        check = task.check(source, (*render(slipped), *["The", "answer", "is", "5", "7", "9", "."]))
        assert check.wrong_steps == (0,) and check.answer_right


def test_too_few_and_too_many_steps():
    task, source = stepped("parity", ("input", "output")), tuple(ASKED["parity"].split())
    steps, answer = task.steps(source), ["The", "answer", "is", "Yes", "."]
    few = task.check(source, (*render(steps[:2], task.scratchpad), *answer))
    assert (few.n_steps, few.wrong_steps, few.answer_right) == (2, (2,), True)
    assert few.reason == "the steps end after 2, something is left to do"
    many = task.check(source, (*render([*steps, steps[-1]], task.scratchpad), *answer))
    assert (many.n_steps, many.wrong_steps) == (4, (3,))
    assert many.reason == "step 3: nothing was left to do"


@pytest.mark.parametrize(
    ("completion", "n_steps", "first", "reason"),
    [
        ("", 0, 0, "the steps end after 0, something is left to do"),
        ("The answer is Yes .", 0, 0, "the steps end after 0"),
        ("<scratch> </scratch> The answer is Yes .", 0, 0, "the steps end after 0"),
        (">> 0 == 0 </scratch>", 1, 0, "step 0: the scratchpad does not begin with <scratch>"),
        ("<scratch> >> 0 == 0 # >> 1", 2, 1, "step 1: the scratchpad does not end with </scratch>"),
        ("<scratch> >> 0 == 0 # >> 1 </scratch>", 2, 1, "step 1: the parts input, output were wanted, got input"),
        ("<scratch> # >> 0 == 0 </scratch>", 2, 0, "step 0: the parts input, output were wanted, got none"),
        ("<scratch> 7 >> 0 == 0 </scratch>", 1, 0, "step 0: '7' stands before the first part"),
        ("<scratch> >> 0 == 1 </scratch>", 1, 0, "step 0: the output is '1', '0' was wanted"),
    ],
)
def test_what_cannot_be_parsed_is_said(completion, n_steps, first, reason):
    task = stepped("parity", ("input", "output"))
    check = task.check(ASKED["parity"].split(), completion.split())
    assert (check.n_steps, check.first_wrong_step) == (n_steps, first)
    assert check.reason.startswith(reason)


@given(st.lists(st.sampled_from(stepped("addition", PARTS).vocabulary.tokens), max_size=60))
@settings(max_examples=40, deadline=None)
def test_any_completion_can_be_checked(tokens):
    for name in STEPPED:
        task = stepped(name, PARTS)
        source = task.draw(3, np.random.default_rng(0)).source
        assert not task.check(source, tokens).steps_right
        assert not task.check(source, ("<scratch>", *tokens, "</scratch>")).steps_right


def test_tasks_without_scratchpad_have_only_an_answer():
    for task in (make_task("copy"), make_task("parity")):
        assert task.split_completion(["a", "</scratch>", "b"]) == ((), ("a", "</scratch>", "b"))
    assert split_completion(["<scratch>", "1", "</scratch>", "2", "</scratch>"])[1] == ("2", "</scratch>")
    check = make_task("parity").check(ASKED["parity"].split(), ["The", "answer", "is", "No", "."])
    assert (check.answer_right, check.steps_right, check.n_steps) == (False, True, 0)


def test_splits_with_scratchpads_are_those_without():
    counts = {"n_train": 200, "n_validation": 20, "n_test": 20}
    bare, whole = (stepped("lego", parts).splits(**counts) for parts in ((), PARTS))
    assert [e.source for e in bare.train] == [e.source for e in whole.train]
    assert all(w.target[-len(b.target) :] == b.target for b, w in zip(bare.test, whole.test, strict=True))
