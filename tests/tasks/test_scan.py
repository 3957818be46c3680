from collections import Counter

import pytest

from probe.errors import ProbeError
from probe.tasks import make_task, scan


@pytest.fixture(scope="module")
def language():
    return {command: scan.interpret(command).split() for command in scan.commands()}


# Lake and Baroni 2018, figure 1 and table of examples, in Kazemnejad et al.'s names for the actions.
@pytest.mark.parametrize(
    ("command", "actions"),
    [
        ("jump", "JUMP"),
        ("jump left", "TURN_LEFT JUMP"),
        ("jump around right", "TURN_RIGHT JUMP TURN_RIGHT JUMP TURN_RIGHT JUMP TURN_RIGHT JUMP"),
        ("turn left twice", "TURN_LEFT TURN_LEFT"),
        ("jump thrice", "JUMP JUMP JUMP"),
        ("jump opposite left and walk thrice", "TURN_LEFT TURN_LEFT JUMP WALK WALK WALK"),
        (
            "jump opposite left after walk around left",
            "TURN_LEFT WALK TURN_LEFT WALK TURN_LEFT WALK TURN_LEFT WALK TURN_LEFT TURN_LEFT JUMP",
        ),
        ("jump twice and run left", "JUMP JUMP TURN_LEFT RUN"),
        ("turn opposite right", "TURN_RIGHT TURN_RIGHT"),
        ("turn around left", "TURN_LEFT TURN_LEFT TURN_LEFT TURN_LEFT"),
    ],
)
def test_interpretation(command, actions):
    assert scan.interpret(command) == actions


def test_the_language_is_the_published_one(language):
    assert len(language) == 20_910
    lengths = Counter(len(actions) for actions in language.values())
    assert max(lengths) == 48
    # Kazemnejad et al. 2023 split at 25 actions, Lake and Baroni 2018 at 22.
    assert (sum(n for k, n in lengths.items() if k <= 25), sum(n for k, n in lengths.items() if k > 25)) == (
        17_774,
        3_136,
    )
    assert (sum(n for k, n in lengths.items() if k <= 22), sum(n for k, n in lengths.items() if k > 22)) == (
        16_990,
        3_920,
    )


def test_a_second_interpreter_agrees(language):
    # By substitution on strings, from the inside out, as the denotation is printed in the paper.
    step = {w: w.upper() for w in ("walk", "look", "run", "jump")} | {"turn": ""}

    def meaning(text: str) -> list[str]:
        if " and " in text:
            left, right = text.split(" and ")
            return meaning(left) + meaning(right)
        if " after " in text:
            left, right = text.split(" after ")
            return meaning(right) + meaning(left)
        for word, times in ((" twice", 2), (" thrice", 3)):
            if text.endswith(word):
                return meaning(text.removesuffix(word)) * times
        for side in ("left", "right"):
            if text.endswith(side):
                turn = f"TURN_{side.upper()}"
                first, *manner = text.removesuffix(side).split()
                act = [step[first]] if step[first] else []
                return {(): [turn, *act], ("opposite",): [turn, turn, *act], ("around",): [turn, *act] * 4}[
                    tuple(manner)
                ]
        return [step[text]]

    assert all(meaning(command) == actions for command, actions in language.items())


@pytest.mark.parametrize(
    "command",
    [
        "",
        "dance",
        "turn",
        "jump and",
        "jump and walk and run",
        "jump and walk after run",
        "jump twice twice",
        "left jump",
        "jump around",
        "twice",
        "jump opposite around left",
    ],
)
def test_what_is_not_of_the_language_is_refused(command):
    with pytest.raises(ProbeError, match="a SCAN command was wanted"):
        scan.interpret(command)


def test_splits_are_disjoint_and_by_length():
    splits = make_task("scan").splits(n_train=10**6, n_validation=10**6, n_test=10**6)
    train, validation, test = (
        {" ".join(e.source) for e in part} for part in (splits.train, splits.validation, splits.test)
    )
    assert len(train) + len(validation) == 17_774
    assert len(validation) == 1_777
    assert len(test) == 3_136
    assert not (train & validation or train & test or validation & test)
    assert all(e.length == len(e.target) > 25 for e in splits.test)
    assert all(e.length == len(e.target) <= 25 for e in splits.train)


def test_a_shorter_split_and_its_seed():
    task = make_task("scan", {"train_length": 16, "test_length": 32})
    a, b, c = (task.splits(n_train=500, n_validation=50, n_test=50, seed=s) for s in (0, 0, 1))
    assert a == b != c
    assert {e.length for e in a.test} <= set(range(17, 33))
    with pytest.raises(ProbeError, match=r"test_length \(9\) must be above train_length \(16\)"):
        make_task("scan", {"train_length": 16, "test_length": 9})
