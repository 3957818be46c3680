"""Values that no setting wants, and how many of them are tried: a few in each test, or ``PROBE_FUZZ``."""

import copy
import os
from collections.abc import Callable
from typing import Any

import hypothesis
from hypothesis import strategies as st

_FUZZ = os.environ.get("PROBE_FUZZ")
_SETTINGS = hypothesis.settings(
    max_examples=int(_FUZZ or 12),
    derandomize=_FUZZ is None,
    deadline=None,  # ``hostile.bounded`` has its own
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)


def given(*strategies: st.SearchStrategy) -> Callable:
    """Hypothesis's, with as many examples as are wanted."""
    return lambda test: _SETTINGS(hypothesis.given(*strategies)(test))


TEXTS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        [
            "",
            "..",
            "../x",
            "/etc/x",
            "a/b",
            "CON",
            "x" * 300,
            "none",
            "copy",
            "é",
            "\u202e",
            "\x1b[2J",
            "-",
            "nan",
            "\n",
        ]
    ),
    st.characters(codec="utf-8").map(lambda c: c * 40),
)
NUMBERS = st.one_of(
    st.integers(),
    st.floats(),
    st.sampled_from([0, -1, 2**31, 2**63, 2**64, 10**30, -(10**30), 10**400, 1e308, -0.0, 5e-324, True, False, None]),
)
JUNK = st.recursive(
    NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


def _places(value: Any, at: tuple = ()) -> list[tuple]:
    """Where everything in a JSON value is."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return (
        [at, *(place for key, each in inner for place in _places(each, (*at, key)))]
        if at
        else [place for key, each in inner for place in _places(each, (key,))]
    )


@st.composite
def mutated(draw, good: dict) -> dict:
    """A good JSON object in which some values, anywhere, are others, are missing, or are of another key."""
    values = copy.deepcopy(good)
    for _ in range(draw(st.integers(1, 3))):
        if not (places := _places(values)):
            break
        *way, last = draw(st.sampled_from(places))
        inner = values
        for key in way:
            inner = inner[key]
        change = draw(st.sampled_from(["value", "value", "value", "remove", "rename"]))
        if change == "value":
            inner[last] = draw(JUNK)
        else:
            value = inner.pop(last)
            if change == "rename" and isinstance(inner, dict):
                inner[draw(TEXTS)] = value
    return values
