import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probe.errors import ProbeError
from probe.tasks import make_task, pcfg

S = r"[A-Z]\d+(?: [A-Z]\d+)*"


def rewritten(command):
    """A second interpreter: on the text, a function whose arguments are strings is replaced by its value."""
    unary = {
        "copy": lambda x: x,
        "reverse": lambda x: list(reversed(x)),
        "shift": lambda x: x[1:] + x[:1],
        "swap_first_last": lambda x: [x[-1 if i == 0 else 0 if i == len(x) - 1 else i] for i in range(len(x))],
        "repeat": lambda x: x * 2,
        "echo": lambda x: x + x[-1:],
    }
    binary = {"append": "{0} {1}", "prepend": "{1} {0}", "remove_first": "{1}", "remove_second": "{0}"}
    one = re.compile(rf"\b({'|'.join(unary)}) ({S})(?= ,|$)")
    two = re.compile(rf"\b({'|'.join(binary)}) ({S}) , ({S})(?= ,|$)")
    before = None
    while command != before:
        before = command
        command = one.sub(lambda m: " ".join(unary[m[1]](m[2].split())), command)
        command = two.sub(lambda m: binary[m[1]].format(m[2], m[3]), command)
    return command


def depth(words):
    """How many functions stand within each other; consumes the words."""
    head = words.pop(0)
    if head in pcfg.UNARY:
        return 1 + depth(words)
    if head in pcfg.BINARY:
        first = depth(words)
        assert words.pop(0) == ","
        return 1 + max(first, depth(words))
    while words and words[0] != ",":
        words.pop(0)
    return 0


# Hupkes et al. 2020: the functions of table 1, the examples of section 3.
@pytest.mark.parametrize(
    ("command", "string"),
    [
        ("copy A1 B1 C1", "A1 B1 C1"),
        ("reverse A1 B1 C1", "C1 B1 A1"),
        ("shift A1 B1 C1", "B1 C1 A1"),
        ("swap_first_last A1 B1 C1 D1", "D1 B1 C1 A1"),
        ("swap_first_last A1", "A1"),
        ("repeat A1 B1", "A1 B1 A1 B1"),
        ("echo A1 B1", "A1 B1 B1"),
        ("append A1 B1 , C1 D1", "A1 B1 C1 D1"),
        ("prepend A1 B1 , C1 D1", "C1 D1 A1 B1"),
        ("remove_first A1 B1 , C1 D1", "C1 D1"),
        ("remove_second A1 B1 , C1 D1", "A1 B1"),
        ("A1 B20", "A1 B20"),
        ("shift prepend K10 R1 K12 , E12 F16", "F16 K10 R1 K12 E12"),
        ("echo append append E18 C13 , L18 M17 , R1 L1 Y1", "E18 C13 L18 M17 R1 L1 Y1 Y1"),
        ("append swap_first_last F16 H3 F4 , repeat T13 B5", "F4 H3 F16 T13 B5 T13 B5"),
        ("append reverse D1 K5 , remove_first P2 Q3 , copy Z1", "K5 D1 Z1"),
        ("remove_second remove_first A1 , B1 , append C1 , D1", "B1"),
    ],
)
def test_interpretation(command, string):
    assert pcfg.interpret(command) == string == rewritten(command)


@pytest.mark.parametrize(
    ("command", "part"),
    [
        ("", ""),
        ("dance A1 B2", "dance"),
        ("copy", "copy"),
        ("copy A1 , B1", ", B1"),
        ("append A1 B1", "append A1 B1"),
        ("append A1 ,", ","),
        ("append , A1", "append , A1"),
        ("append A1 , , B1", ", , B1"),
        ("copy , A1", "copy , A1"),
        ("A1 copy B1", "copy B1"),
        ("append A1 , B1 , C1", ", C1"),
        ("copy A21", "A21"),
        ("copy A0", "A0"),
        ("copy a1", "a1"),
        (", A1", ", A1"),
    ],
)
def test_what_is_not_of_the_language_is_refused(command, part):
    with pytest.raises(ProbeError) as error:
        pcfg.interpret(command)
    assert str(error.value).startswith(f"a PCFG command was wanted, got {command!r}: ")
    assert f"{part!r} is no phrase" in str(error.value)


def test_deep_commands_are_read():
    assert pcfg.interpret("shift " * 5000 + "A1 B1") == "A1 B1"


@given(length=st.integers(1, 100), seed=st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
@pytest.mark.parametrize("split", ["productivity", "md_productivity"])
def test_drawn_commands(split, length, seed):
    task = make_task("pcfg", {"split": split})
    example = task.draw(length, np.random.default_rng(seed))
    command, words = " ".join(example.source), list(example.source)
    assert " ".join(example.target) == rewritten(command)
    assert 1 <= len(example.target) <= task.longest
    n_functions = sum(word in pcfg.UNARY or word in pcfg.BINARY for word in words)
    assert length == (n_functions if split == "productivity" else depth(words))
    assert all(2 <= len(s.split()) <= 5 for s in re.findall(S, command))
    task.vocabulary.prompt(example)


def test_all_functions_and_symbols_are_used():
    assert len(pcfg.ALPHABET) == 520
    splits = make_task("pcfg").splits(n_train=1500, n_validation=0, n_test=60)
    used = {word for e in splits.train for word in e.source}
    assert used == {*pcfg.UNARY, *pcfg.BINARY, ",", *pcfg.ALPHABET}
    assert {e.length for e in splits.train} == set(range(1, 9))
    assert {e.length for e in splits.test} == set(range(9, 17))
    assert splits.validation == []
