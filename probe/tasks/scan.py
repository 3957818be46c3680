"""SCAN: commands in a small phrase language, to be interpreted as actions. Lake and Baroni 2018, figures 6 and 7.

The whole language is here, its grammar and its meaning side by side::

    command  = phrase | phrase "and" phrase | phrase "after" phrase
    phrase   = verb | verb "twice" | verb "thrice"
    verb     = action | turned | turned with "opposite" or "around" before the direction
    turned   = (action | "turn") ("left" | "right")
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from probe.errors import ProbeError
from probe.tasks.base import Example, Splits, Task, Vocabulary

ACTIONS = {"walk": "WALK", "look": "LOOK", "run": "RUN", "jump": "JUMP"}
TURNS = {"left": "TURN_LEFT", "right": "TURN_RIGHT"}
TIMES = {"twice": 2, "thrice": 3}
# How often a turn comes before the action, and how often the two together are done.
MANNERS = {"opposite": (2, 1), "around": (1, 4)}
CONJUNCTIONS = ("and", "after")


def commands() -> Iterator[str]:
    """All 20,910 commands of the language."""
    verbs = list(ACTIONS)
    for action in (*ACTIONS, "turn"):
        for direction in TURNS:
            verbs += [f"{action} {direction}", *(f"{action} {manner} {direction}" for manner in MANNERS)]
    phrases = [f"{verb}{times}" for verb in verbs for times in ("", *(f" {word}" for word in TIMES))]
    yield from phrases
    for conjunction in CONJUNCTIONS:
        for first in phrases:
            for second in phrases:
                yield f"{first} {conjunction} {second}"


def interpret(command: str) -> str:
    """The actions of a command: ``"jump twice and run left"`` -> ``"JUMP JUMP TURN_LEFT RUN"``.

    Raises:
        ProbeError: where the command is not of the language.
    """
    words = command.split()
    for conjunction in CONJUNCTIONS:
        if words.count(conjunction) == 1 and not any(words.count(c) for c in CONJUNCTIONS if c != conjunction):
            at = words.index(conjunction)
            first, second = _phrase(words[:at], command), _phrase(words[at + 1 :], command)
            return " ".join(first + second if conjunction == "and" else second + first)
    return " ".join(_phrase(words, command))


def _phrase(words: list[str], command: str) -> list[str]:
    match words:
        case [*verb, times] if times in TIMES:
            return _verb(verb, command) * TIMES[times]
        case _:
            return _verb(words, command)


def _verb(words: list[str], command: str) -> list[str]:
    match words:
        case [action] if action in ACTIONS:
            return [ACTIONS[action]]
        case [action, direction] if direction in TURNS and action in (*ACTIONS, "turn"):
            return [TURNS[direction], *_act(action)]
        case [action, manner, direction] if manner in MANNERS and direction in TURNS and action in (*ACTIONS, "turn"):
            turns, times = MANNERS[manner]
            return ([TURNS[direction]] * turns + _act(action)) * times
    raise ProbeError(f"a SCAN command was wanted, got {command!r}: {' '.join(words)!r} is no phrase of the language")


def _act(action: str) -> list[str]:
    return [ACTIONS[action]] if action in ACTIONS else []


@dataclass(frozen=True)
class Scan(Task):
    """SCAN split by the number of actions: trained on commands of at most ``train_length``, tested on the longer ones.

    The published language gives 17,774 / 3,136 commands at 25 actions (Kazemnejad et al. 2023) and 16,990 / 3,920 at
    22 (Lake and Baroni 2018). ``test_length`` leaves out commands beyond it.
    """

    train_length: int = 25
    test_length: int = 48

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.test_length <= self.train_length:
            raise ProbeError(f"test_length ({self.test_length}) must be above train_length ({self.train_length})")

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(
            (*ACTIONS, "turn", *TURNS, *TIMES, *MANNERS, *CONJUNCTIONS, *ACTIONS.values(), *TURNS.values())
        )

    def examples(self) -> list[Example]:
        """The whole language, length = number of actions."""
        pairs = ((tuple(c.split()), tuple(interpret(c).split())) for c in commands())
        return [Example(source, target, len(target)) for source, target in pairs]

    def splits(self, *, n_train: int, n_validation: int, n_test: int, seed: int = 0) -> Splits:
        """Validation is a tenth of the short commands, drawn by ``seed``; what is asked for beyond the finite
        language is not there, so fewer examples may come back."""
        rng = np.random.default_rng(seed)
        everything = self.examples()
        short = [e for e in everything if e.length <= self.train_length]
        long = [e for e in everything if self.train_length < e.length <= self.test_length]
        short = [short[i] for i in rng.permutation(len(short))]
        long = [long[i] for i in rng.permutation(len(long))]
        tenth = len(short) // 10
        return Splits(train=short[tenth:][:n_train], validation=short[:tenth][:n_validation], test=long[:n_test])


TASKS: dict[str, type[Task]] = {"scan": Scan}
