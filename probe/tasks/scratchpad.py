"""Scratchpads: one format of steps for every task, written, read back and checked. Kazemnejad et al. 2023, section 6.

A step has five parts, any of which can be switched off::

    <scratch> >> input :: computation == output @ variables => remaining # >> … </scratch> The answer is …

A task says where it starts and how one step follows from what stands before it. The checker asks the same of the steps
that a completion holds, a model's too.
"""

import dataclasses
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from probe.errors import ProbeError
from probe.tasks.base import PromptedTask

Words = tuple[str, ...]
Part = Literal["input", "computation", "output", "variables", "remaining"]
MARKERS: dict[str, str] = {"input": ">>", "computation": "::", "output": "==", "variables": "@", "remaining": "=>"}
PARTS = tuple(MARKERS)
OPEN, STEP, CLOSE = "<scratch>", "#", "</scratch>"


@dataclass(frozen=True)
class Step:
    """What is looked at, how it is worked out, what comes of it, what is kept in mind, and what is left to do."""

    input: Words = ()  #: what is looked at
    computation: Words = ()  #: how it is worked out
    output: Words = ()  #: what comes of it
    variables: Words = ()  #: what is kept in mind
    remaining: Words = ()  #: what is left to do


@dataclass(frozen=True)
class Written:
    """A step as it was read: the parts that stand there, and what of it could not be read ("" where all could)."""

    parts: dict[str, Words]
    fault: str

    @property
    def step(self) -> Step:
        return Step(**self.parts)


@dataclass(frozen=True)
class Check:
    """What is to be said of a completion.

    ``answer_right``: it ends with the right answer. ``answer_follows``: with the one that its own steps lead to.
    ``wrong_steps``: those (from 0) that do not follow from what stands before them; ``n_steps`` itself where steps are
    missing. ``reason``: the first thing that is wrong, in a line, "" where nothing is.
    """

    answer_right: bool
    answer_follows: bool
    n_steps: int
    wrong_steps: tuple[int, ...]
    reason: str

    @property
    def steps_right(self) -> bool:
        """Whether every step follows, and none is missing."""
        return not self.wrong_steps

    @property
    def first_wrong_step(self) -> int | None:
        """The first step, from 0, that does not follow; None where all do."""
        return self.wrong_steps[0] if self.wrong_steps else None


def render(steps: Sequence[Step], parts: Sequence[str] = PARTS) -> Words:
    """Steps as tokens, with these parts of each."""
    kept = [part for part in PARTS if part in parts]
    written: list[str] = [OPEN]
    for step in steps:
        written.append(STEP)
        for part in kept:
            written += (MARKERS[part], *getattr(step, part))
    del written[1:2]  # steps are parted, the first has none before it
    return (*written, CLOSE)


def split_completion(tokens: Sequence[str]) -> tuple[Words, Words]:
    """The scratchpad with its brackets, and the answer behind it; a scratchpad that never closes has no answer."""
    tokens = tuple(tokens)
    if CLOSE in tokens:
        end = tokens.index(CLOSE) + 1
        return tokens[:end], tokens[end:]
    return (tokens, ()) if OPEN in tokens else ((), tokens)


def parse(scratchpad: Sequence[str], parts: Sequence[str] = PARTS) -> list[Written]:
    """The steps of a scratchpad, as far as they can be read; what cannot is said in each one's ``fault``."""
    body = list(scratchpad)
    opened, closed = body[:1] == [OPEN], body[-1:] == [CLOSE]
    body = body[opened : len(body) - closed]
    steps = [_read_step(chunk, [part for part in PARTS if part in parts]) for chunk in split_at(body, STEP)]
    if steps and not opened:
        steps[0] = Written(steps[0].parts, f"the scratchpad does not begin with {OPEN}")
    if steps and not closed:
        steps[-1] = Written(steps[-1].parts, f"the scratchpad does not end with {CLOSE}")
    return steps


def _read_step(tokens: Sequence[str], wanted: list[str]) -> Written:
    names = {MARKERS[part]: part for part in wanted}
    parts: dict[str, list[str]] = {}
    order, stray = [], []
    for token in tokens:
        if token in names:
            order.append(names[token])
            parts[names[token]] = []
        elif order:
            parts[order[-1]].append(token)
        else:
            stray.append(token)
    fault = ""
    if stray:
        fault = f"{' '.join(stray)!r} stands before the first part"
    elif order != wanted:
        fault = f"the parts {', '.join(wanted)} were wanted, got {', '.join(order) or 'none'}"
    return Written({part: tuple(words) for part, words in parts.items()}, fault)


@dataclass(frozen=True)
class SteppedTask(PromptedTask):
    """A task that can be worked out step by step. ``scratchpad`` names the parts of the steps that stand in the target
    before the answer: any of ``input, computation, output, variables, remaining``, or none (no scratchpad)."""

    longer_only = True

    train_length: int = 8
    test_length: int = 16  #: the longest that is tested
    scratchpad: tuple[Part, ...] = ()

    @property
    @abstractmethod
    def step_words(self) -> Sequence[str]:
        """What steps say beyond ``words``."""

    @abstractmethod
    def start(self, question: Words) -> Step:
        """What stands before the first step: ``variables`` and ``remaining``."""

    @abstractmethod
    def follow(self, question: Words, before: Step) -> Step | None:
        """The step that follows from the ``variables`` and ``remaining`` of the one before it; None at the end.

        Raises:
            ProbeError: where they make no sense.
        """

    @abstractmethod
    def conclude(self, steps: Sequence[Step]) -> Words:
        """The bare answer to which steps lead."""

    @property
    def more_words(self) -> Words:
        return (*self.step_words, OPEN, CLOSE, STEP, *MARKERS.values()) if self.scratchpad else ()

    def steps(self, source: Sequence[str]) -> list[Step]:
        """The steps to a source's answer."""
        question = self.read(tuple(source))
        steps, before = [], self.start(question)
        while (step := self.follow(question, before)) is not None:
            steps.append(step)
            before = step
        return steps

    def target(self, source: tuple[str, ...]) -> tuple[str, ...]:
        told = super().target(source)
        return (*render(self.steps(source), self.scratchpad), *told) if self.scratchpad else told

    def split_completion(self, tokens: Sequence[str]) -> tuple[Words, Words]:
        return split_completion(tokens) if self.scratchpad else super().split_completion(tokens)

    def check(self, source: Sequence[str], completion: Sequence[str]) -> Check:
        """Go through a completion: its steps one by one, their number, and its answer.

        A step is right where every part that is written equals what follows from the variables and the remaining input
        that the step before it states. What is not written is taken as it would have followed, and so is what makes no
        sense. So a slip makes one step wrong, and those after it are judged by what it led to, as far as the
        scratchpad says so.
        """
        question, truth = self.read(tuple(source)), self.steps(source)
        scratchpad, said = self.split_completion(completion)
        written = parse(scratchpad, self.scratchpad) if self.scratchpad else []
        wrong: dict[int, str] = {}
        stated: list[Step] = []
        before = self.start(question)
        expected: Step | None = truth[0]
        for i, each in enumerate(written):
            fault = each.fault or _difference(each, expected)
            if fault:
                wrong[i] = f"step {i}: {fault}"
            recomputed = expected or before
            stated.append(dataclasses.replace(recomputed, **each.parts))
            states = (stated[-1], recomputed, truth[min(i, len(truth) - 1)])
            before, expected = self._first_that_leads_on(question, states)
        if self.scratchpad and expected is not None:
            wrong[len(written)] = f"the steps end after {len(written)}, something is left to do"
        right = self.tell(self.answer(question))
        follows = bool(stated) and said == self.tell(self.conclude(stated))
        if wrong:
            reason = next(iter(wrong.values()))
        else:
            reason = "" if said == right else f"the answer is {_say(said)}, {_say(right)} was wanted"
        return Check(said == right, follows, len(written), tuple(wrong), reason)

    def _first_that_leads_on(self, question: Words, states: Sequence[Step]) -> tuple[Step, Step | None]:
        """The first state that makes sense, the last of them if need be, and the step that follows from it."""
        for state in states[:-1]:
            try:
                return state, self.follow(question, state)
            except ProbeError:
                continue
        return states[-1], self.follow(question, states[-1])


def _difference(written: Written, expected: Step | None) -> str:
    if expected is None:
        return "nothing was left to do"
    for part, words in written.parts.items():
        if words != getattr(expected, part):
            return f"the {part} is {_say(words)}, {_say(getattr(expected, part))} was wanted"
    return ""


def _say(words: Sequence[str]) -> str:
    return repr(" ".join(words))


def split_at(tokens: Sequence[str], separator: str) -> list[Words]:
    """The stretches between separators; none where there is no token."""
    stretches: list[list[str]] = [[]] if tokens else []
    for token in tokens:
        if token == separator:
            stretches.append([])
        else:
            stretches[-1].append(token)
    return [tuple(stretch) for stretch in stretches]


def join_with(separator: str, stretches: Sequence[Sequence[str]]) -> Words:
    """Stretches, separated."""
    return tuple(word for stretch in stretches for word in (separator, *stretch))[1:]


def value_of(variables: Words, name: str) -> str:
    """The value in ``name = value``."""
    if len(variables) != 3 or variables[:2] != (name, "="):
        raise ProbeError(f"'{name} = …' was wanted, got {_say(variables)}")
    return variables[2]


def number(token: str, low: int = 0, high: int = 9) -> int:
    """A token as an integer in low…high."""
    try:
        value = int(token)
    except ValueError:
        value = low - 1
    if not low <= value <= high:
        raise ProbeError(f"a number in {low}…{high} was wanted, got {token!r}")
    return value
