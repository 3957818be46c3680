"""The numbers in the prose of docs/numerics.md are computed here; ``tests/numerics`` holds those of its table."""

import math
import re

import torch
from page_numbers import Page, power, short

from probe.attention.score_split.parts import NOTHING
from probe.attention.streaming.statistics import LARGEST_IN_FLOAT32
from probe.position.probes.moments import precision

NOT_MEASURED = {
    "how bounds were chosen, which their own test holds": ["Bounds are some 3 to 10 times what was measured; 0 says"],
    "definitions": [
        *(
            "where a number is above 1",
            "rounded to 3 or 4 digits",
            "weights of exactly 0 and 1",
            "entropy 0",
            "ln 2 or",
        ),
        *("the other gives 0", "patterns are [1]", "distances 0", "1…T", ">= 0", "correlations 0"),
    ],
    "the inputs of the tests": ["scores to 30 nats", "scores of ±1e4"],
}


def highest_before(function, start):
    """The last whole number from start on for which a function is true."""
    return next(x for x in range(start, 10_000) if not function(x + 1))


def prose():
    yield f"which float32 rounds by {power(torch.finfo(torch.float32).eps / 2)} of their size"
    single, brain, half = (precision(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16))
    yield f"makes: {power(single)} of its mean in float32, {short(brain, 3)} in bfloat16, {short(half, 3)} in float16"
    spacing = math.ulp(1.0) * 2**29 * 2**13  # of float32 between 8,192 and 16,384, where 1e4 is
    assert torch.tensor(1e4) + 0.51 * spacing > 1e4 and torch.tensor(1e4) + 0.49 * spacing == 1e4
    yield f"Two scores near each other are rounded by {power(spacing / 2)}"
    yield f"makes scores that may be above {LARGEST_IN_FLOAT32:.0f} nats in float64"
    lowest = [
        highest_before(lambda x, of=of: torch.tensor([0.0, -x], dtype=of).softmax(-1)[1] > 0, 1)
        for of in (torch.float32, torch.float64)
    ]
    yield f"In float32 that is a key {lowest[0]} nats below the highest, in float64 {lowest[1]}"
    finite = highest_before(lambda x: torch.tensor(float(x), dtype=torch.float64).exp() < math.inf, 1)
    yield f"a loss above {finite} nats"
    yield f"less than {power(NOTHING)} of the scores' variance"


def test_every_number_of_the_prose_is_computed():
    page = Page("numerics.md")
    page.says(*prose())
    # The table of bounds is held by tests/numerics/test_bounds.py, line by line.
    bounds = {"the table of bounds": re.findall(r"\| \{py:[^|]*\|[^|]*\|[^|]*\d[^|]*\|", page.text)}
    assert page.rest(NOT_MEASURED | bounds) == []
