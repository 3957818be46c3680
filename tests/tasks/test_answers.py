"""Answers of the drawn tasks, worked out another way from the text of their prompts."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probe.errors import ProbeError
from probe.tasks import make_task

drawn = given(length=st.integers(1, 100), seed=st.integers(0, 10**6))
some = settings(max_examples=30, deadline=None)


def draw(name, length, seed, **options):
    """The prompt and the answer as texts, after the checks that hold for every task."""
    task = make_task(name, options)
    example = task.draw(length, np.random.default_rng(seed))
    assert example.length == length
    vocabulary = task.vocabulary
    assert vocabulary.decode(vocabulary.prompt(example))[1:-1] == list(example.source)
    assert vocabulary.decode(vocabulary.completion(example))[:-1] == list(example.target)
    return " ".join(example.source), " ".join(example.target)


def inside(text, before, after):
    assert text.startswith(before) and text.endswith(after)
    return text[len(before) : len(text) - len(after)].strip()


@drawn
@some
@pytest.mark.parametrize("variant", ["rsc", "rsc2x", "rdc", "cmc", "cmc2x"])
def test_copy(variant, length, seed):
    asked, said = draw("copy", length, seed, variant=variant, prompt=True)
    bare = draw("copy", length, seed, variant=variant)
    assert bare[1] == said
    if variant == "rdc":
        old, new, string = re.fullmatch(r"Replace (\w) with (\w) in : (.*) \.", asked).groups()
        assert old != new and string.split() == [old] * length
        assert said == string.replace(old, new)
        assert bare[0] == f"{old} {new} {string}"
        return
    string = inside(asked, "Copy the following words : ", " .")
    assert len(string.split()) == length and bare[0] == string
    assert said == {"rsc2x": f"{string} {string}", "cmc2x": f"{string} [NEXT] {string}"}.get(variant, string)
    assert variant.startswith("cmc") or len(set(string.split())) == 1


@drawn
@some
@pytest.mark.parametrize("variant", ["mc", "mc2x", "mcrv"])
def test_reverse(variant, length, seed):
    asked, said = draw("reverse", length, seed, variant=variant, prompt=True)
    string = inside(asked, "Reverse the following words : ", " .")
    backwards = " ".join(reversed(string.split()))
    assert len(string.split()) == length
    assert (
        said
        == {"mc": backwards, "mc2x": f"{backwards} [NEXT] {backwards}", "mcrv": f"{backwards} [NEXT] {string}"}[variant]
    )


@drawn
@some
def test_addition(length, seed):
    asked, said = draw("addition", length, seed)
    numbers = [side.replace(" ", "") for side in inside(asked, "Compute : ", " ?").split("+")]
    assert max(map(len, numbers)) == length and min(map(len, numbers)) >= 1
    assert all(len(n) == 1 or n[0] != "0" for n in numbers)
    assert inside(said, "The answer is ", " .").replace(" ", "") == str(sum(map(int, numbers)))


@drawn
@some
def test_polynomial(length, seed):
    asked, said = draw("polynomial", length, seed)
    x, text = re.fullmatch(r"Evaluate x = (-?\d+) in (.*) \?", asked).groups()
    assert -2 <= int(x) <= 2
    terms = re.findall(r"(-?\d+) x \*\* (\d+)", text)
    assert len(terms) == length and all(-3 <= int(c) <= 3 and 0 <= int(d) <= 3 for c, d in terms)
    assert inside(said, "The answer is ", " .") == str(eval(text.replace(" x", " * x"), {"x": int(x)}))


@drawn
@some
@pytest.mark.parametrize("variant", ["single", "multi"])
def test_sorting(variant, length, seed):
    asked, said = draw("sorting", length, seed, variant=variant)
    asked, said = inside(asked, "Sort the following numbers : ", " ?"), inside(said, "The answer is ", " .")
    if variant == "single":
        assert said.split() == sorted(asked.split()) and len(asked.split()) == length
        return
    numbers, found = ([int(item.replace(" ", "")) for item in text.split(",")] for text in (asked, said))
    assert found == sorted(numbers) and len(numbers) == length
    assert all(10 <= n <= 9999 for n in numbers)


@drawn
@some
def test_summation(length, seed):
    asked, said = draw("summation", length, seed)
    text = inside(asked, "Compute : ", " ?")
    digits = [int(d) for d in inside(text, "( ", " ) % 10").split(" + ")]
    assert len(digits) == length and set(digits) <= set(range(1, 10))
    assert inside(said, "The answer is ", " .") == str(eval(text)) == str(sum(digits) % 10)


@drawn
@some
def test_parity(length, seed):
    asked, said = draw("parity", length, seed)
    bits = inside(asked, "Is the number of 1's even in [ ", " ] ?").split()
    assert len(bits) == length
    assert said == f"The answer is {'No' if int(''.join(bits), 2).bit_count() % 2 else 'Yes'} ."


@drawn
@some
@pytest.mark.parametrize("order", ["ordered", "permuted"])
def test_lego_is_a_linear_system(order, length, seed):
    asked, said = draw("lego", length, seed, order=order)
    text, query = re.fullmatch(r"If (.*) \. Then what is (\w+) \?", asked).groups()
    clauses = [clause.split(" = ") for clause in text.split(" ; ")]
    names = [name for name, _ in clauses]
    assert len(set(names)) == length
    matrix, constant = np.eye(length), np.zeros(length)
    for row, (_, value) in enumerate(clauses):
        sign = float(value[0] + "1")
        if value[1:] == "1":
            constant[row] = sign
        else:
            matrix[row, names.index(value[1:])] = -sign
            assert order == "permuted" or names.index(value[1:]) == row - 1
    values = np.linalg.solve(matrix, constant)
    assert said == f"The answer is {round(values[names.index(query)]):+d} ."


@drawn
@some
@pytest.mark.parametrize("name", ["addition", "polynomial", "sorting", "summation", "parity", "lego"])
def test_without_constant_words_question_and_answer_are_the_same(name, length, seed):
    asked, said = draw(name, length, seed)
    bare, answer = draw(name, length, seed, prompt=False)
    assert said == f"The answer is {answer} ."
    question = asked.replace(" Then what is", "")
    for word in ("Compute : ", "Evaluate ", "Sort the following numbers : ", "Is the number of 1's even in [ ", "If "):
        question = question.removeprefix(word)
    assert bare == question.removesuffix(" ?").removesuffix(" ]")


@pytest.mark.parametrize(
    ("name", "asked", "said"),
    [
        ("addition", "Compute : 5 3 7 2 6 + 1 9 1 7 ?", "The answer is 5 5 6 4 3 ."),
        ("polynomial", "Evaluate x = 3 in ( 3 x ** 0 + 1 x ** 1 + 1 x ** 2 ) % 10 ?", "The answer is 5 ."),
        ("sorting", "Sort the following numbers : 3 1 4 1 5 ?", "The answer is 1 1 3 4 5 ."),
        ("summation", "Compute : ( 1 + 2 + 3 + 4 + 7 ) % 10 ?", "The answer is 7 ."),
        ("parity", "Is the number of 1's even in [ 1 0 0 1 1 ] ?", "The answer is No ."),
        ("lego", "If a = -1 ; b = -a ; c = +b ; d = +c . Then what is c ?", "The answer is +1 ."),
    ],
)
def test_examples(name, asked, said):
    task = make_task(name)
    assert " ".join(task.target(tuple(asked.split()))) == said
    with pytest.raises(ProbeError, match="a question .* was wanted, got 'What is"):
        task.target(("What", "is", "this", "?"))


def test_lego_has_as_many_names_as_are_needed():
    task = make_task("lego", {"test_length": 130})
    assert task.draw(130, np.random.default_rng(0)).length == 130
    with pytest.raises(ProbeError, match="at most 104 clauses was wanted, got 105"):
        make_task("lego").draw(105, np.random.default_rng(0))
    few = make_task("lego").draw(16, np.random.default_rng(0))
    assert all(len(word) == 1 for word in few.source[1:-5:4])


def test_all_names_digits_and_terms_come_up():
    rng = np.random.default_rng(0)
    task = make_task("polynomial")
    words = {word for _ in range(200) for word in task.draw(8, rng).source}
    assert {*map(str, range(-3, 4))} <= words
    single = make_task("sorting", {"n_symbols": 12})
    assert {word for _ in range(200) for word in single.draw(8, rng).source[5:-1]} == set("0123456789AB")
