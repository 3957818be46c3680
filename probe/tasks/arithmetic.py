"""Addition, polynomials, sums and parity: Kazemnejad et al. 2023, appendix D. Trained to length 8, tested to 16.

Scratchpads go through the input once, digit by digit or term by term, and keep a carry, a sum or a parity in mind.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from probe.errors import ProbeError
from probe.tasks.base import Task
from probe.tasks.scratchpad import Step, SteppedTask, Words, join_with, number, split_at, value_of

DIGITS = tuple("0123456789")


@dataclass(frozen=True)
class Addition(SteppedTask):
    """Add two numbers, the longer of ``length`` digits, the other of as many or fewer; digits are separated.

    ``Compute : 5 3 7 2 6 + 1 9 1 7 ?`` -> ``The answer is 5 5 6 4 3 .``
    A step adds a column, from the right: ``>> 6 , 7 :: 6 + 7 + 0 = 1 3 == 3 @ carry = 1 => 5 3 7 2 + 1 9 1``; a last
    one writes the carry, if there is one.
    """

    asked = ("Compute :", "?")
    words = (*DIGITS, "+")
    step_words = (",", "=", "carry")

    def question(self, length: int, rng: np.random.Generator) -> Words:
        shorter = int(rng.integers(1, length + 1))
        numbers = [_number(length, rng), _number(shorter, rng)]
        if rng.integers(2):
            numbers.reverse()
        return (*numbers[0], "+", *numbers[1])

    def answer(self, question: Words) -> Words:
        first, second = split_at(question, "+")
        return tuple(str(int("".join(first)) + int("".join(second))))

    def start(self, question: Words) -> Step:
        return Step(variables=("carry", "=", "0"), remaining=question)

    def follow(self, question: Words, before: Step) -> Step | None:
        numbers = split_at(before.remaining, "+")
        if len(numbers) != 2:
            raise ProbeError(f"two numbers were wanted, got {' '.join(before.remaining)!r}")
        first, second = numbers
        carry = value_of(before.variables, "carry")
        if not first and not second and number(carry) == 0:
            return None
        a, b = ((digits or ("0",))[-1] for digits in numbers)
        total = tuple(str(number(a) + number(b) + number(carry)))
        return Step(
            input=(a, ",", b),
            computation=(a, "+", b, "+", carry, "=", *total),
            output=total[-1:],
            variables=("carry", "=", "0" if len(total) == 1 else total[0]),
            remaining=(*first[:-1], "+", *second[:-1]),
        )

    def conclude(self, steps: Sequence[Step]) -> Words:
        return tuple(digit for step in reversed(steps) for digit in step.output)


def _number(n_digits: int, rng: np.random.Generator) -> tuple[str, ...]:
    digits = rng.integers(10, size=n_digits)
    if n_digits > 1:
        digits[0] = rng.integers(1, 10)
    return tuple(DIGITS[digit] for digit in digits.tolist())


@dataclass(frozen=True)
class Polynomial(SteppedTask):
    """The value, modulo 10, of a polynomial of ``length`` terms, coefficients −3…3, degrees 0…3, at x in −2…2.

    ``Evaluate x = 2 in ( 3 x ** 0 + -1 x ** 3 ) % 10 ?`` -> ``The answer is 5 .``
    A step adds a term: ``>> -1 x ** 3 :: -1 * 2 ** 3 = -1 * 8 == -8 @ sum = 5 =>``. Every integer is one token.
    """

    asked = ("Evaluate", "?")
    words = (*map(str, range(-3, 11)), "x", "=", "in", "(", ")", "+", "**", "%")
    step_words = ("*", "sum", *map(str, range(-24, 25)))

    def question(self, length: int, rng: np.random.Generator) -> Words:
        x = int(rng.integers(-2, 3))
        coefficients, degrees = rng.integers(-3, 4, size=length).tolist(), rng.integers(4, size=length).tolist()
        terms = [(str(c), "x", "**", str(d)) for c, d in zip(coefficients, degrees, strict=True)]
        return ("x", "=", str(x), "in", "(", *join_with("+", terms), ")", "%", "10")

    def answer(self, question: Words) -> Words:
        x = int(question[2])
        terms = split_at(question[5:-3], "+")
        return (str(sum(int(c) * x ** int(d) for c, _, _, d in terms) % 10),)

    def start(self, question: Words) -> Step:
        return Step(variables=("sum", "=", "0"), remaining=question[5:-3])

    def follow(self, question: Words, before: Step) -> Step | None:
        if not before.remaining:
            return None
        term, *rest = split_at(before.remaining, "+")
        if len(term) != 4 or term[1:3] != ("x", "**"):
            raise ProbeError(f"a term 'c x ** d' was wanted, got {' '.join(term)!r}")
        c, d, x = term[0], term[3], question[2]
        power = int(x) ** number(d)
        value = number(c, -9) * power
        return Step(
            input=term,
            computation=(c, "*", x, "**", d, "=", c, "*", str(power)),
            output=(str(value),),
            variables=("sum", "=", str((number(value_of(before.variables, "sum")) + value) % 10)),
            remaining=join_with("+", rest),
        )

    def conclude(self, steps: Sequence[Step]) -> Words:
        return steps[-1].variables[2:]


@dataclass(frozen=True)
class Summation(SteppedTask):
    """The sum, modulo 10, of ``length`` digits 1…9.

    ``Compute : ( 1 + 2 + 3 + 4 + 7 ) % 10 ?`` -> ``The answer is 7 .``
    A step adds a digit: ``>> 7 :: 0 + 7 == 7 @ sum = 7 =>``; its output, up to 18 and one token, is not yet modulo 10.
    """

    asked = ("Compute :", "?")
    words = (*DIGITS, "+", "(", ")", "%", "10")
    step_words = ("=", "sum", *map(str, range(19)))

    def question(self, length: int, rng: np.random.Generator) -> Words:
        digits = [(DIGITS[i],) for i in rng.integers(1, 10, size=length).tolist()]
        return ("(", *join_with("+", digits), ")", "%", "10")

    def answer(self, question: Words) -> Words:
        return (str(sum(map(int, question[1:-3:2])) % 10),)

    def start(self, question: Words) -> Step:
        return Step(variables=("sum", "=", "0"), remaining=question[1:-3])

    def follow(self, question: Words, before: Step) -> Step | None:
        if not before.remaining:
            return None
        digit, *rest = split_at(before.remaining, "+")
        if len(digit) != 1:
            raise ProbeError(f"a digit was wanted, got {' '.join(digit)!r}")
        carried = value_of(before.variables, "sum")
        total = number(carried) + number(digit[0])
        return Step(
            input=digit,
            computation=(carried, "+", *digit),
            output=(str(total),),
            variables=("sum", "=", str(total % 10)),
            remaining=join_with("+", rest),
        )

    def conclude(self, steps: Sequence[Step]) -> Words:
        return steps[-1].variables[2:]


@dataclass(frozen=True)
class Parity(SteppedTask):
    """Whether the number of ones among ``length`` bits is even. There are 2, 4, 8, … sources: 510 to length 8.

    ``Is the number of 1's even in [ 1 0 0 1 1 ] ?`` -> ``The answer is No .``
    A step takes a bit: ``>> 1 :: 1 xor 0 == 1 @ parity = 1 => 0 0 1 1``.
    """

    asked = ("Is the number of 1's even in [", "] ?")
    words = ("0", "1", "Yes", "No")
    step_words = ("xor", "=", "parity")

    def question(self, length: int, rng: np.random.Generator) -> Words:
        return tuple("01"[bit] for bit in rng.integers(2, size=length).tolist())

    def answer(self, question: Words) -> Words:
        return ("No" if question.count("1") % 2 else "Yes",)

    def start(self, question: Words) -> Step:
        return Step(variables=("parity", "=", "0"), remaining=question)

    def follow(self, question: Words, before: Step) -> Step | None:
        if not before.remaining:
            return None
        bit, *rest = before.remaining
        carried = value_of(before.variables, "parity")
        parity = str(number(bit, high=1) ^ number(carried, high=1))
        return Step(
            input=(bit,),
            computation=(bit, "xor", carried),
            output=(parity,),
            variables=("parity", "=", parity),
            remaining=tuple(rest),
        )

    def conclude(self, steps: Sequence[Step]) -> Words:
        return ("No" if steps[-1].variables[2:] == ("1",) else "Yes",)


TASKS: dict[str, type[Task]] = {
    "addition": Addition,
    "polynomial": Polynomial,
    "summation": Summation,
    "parity": Parity,
}
