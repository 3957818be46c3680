"""Models with a head that looks at a place, by a position that stands in the stream as a number."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float64
from torch import Tensor

from constructions.known.answer import Answer, unused_but
from constructions.known.blueprint import (
    Blueprint,
    causal_softmax,
    make_decoder,
    make_layout,
    scored_from,
    weight_of,
)
from constructions.known.drawing import LENGTH, Draw, copying
from constructions.known.encodings import write_copy, write_prediction
from constructions.known.generator import Known
from constructions.known.splits import shares_within_rows
from constructions.layout import ONE, POSITION
from constructions.weights import write_head


class Place(NamedTuple):
    """Where a query t looks: the score of key i is -``sharpness`` (``slope`` t + ``offset`` - i)²."""

    slope: int
    offset: int
    sharpness: float
    label: str | None  #: of ``HEAD_LABELS``, where the weights decide it
    by_distance: bool  #: whether the pattern is a function of the distance alone


def _back(draw: Draw) -> Place:
    k = draw.integer(1, 4)
    return Place(1, -k, draw.number(5, 8), "previous_token" if k == 1 else "relative", True)


def _wide_back(draw: Draw) -> Place:
    # A bell of a width of 0.7 to 0.9 tokens. It stands so far back that next to nothing of it is ahead of the query.
    return Place(1, -draw.integer(5, 7), draw.number(0.6, 1), None, True)


def _fixed(draw: Draw) -> Place:
    return Place(0, draw.integer(3, 8), draw.number(5, 8), None, False)


def _mirrored(draw: Draw) -> Place:
    # The middle query looks at 4 to 10 and, as far as it is moved by steering, at places before itself.
    return Place(-1, draw.integer(20, 26), draw.number(5, 8), None, False)


def _scores(place: Place) -> Float64[Tensor, "query key"]:
    t = torch.arange(1, LENGTH + 1, dtype=torch.float64)
    return place.sharpness * (2 * (place.slope * t[:, None] + place.offset) * t - t**2)


def _looking(draw_place: Callable[[Draw], Place], why: str) -> Callable[[Draw, Draw, int], Blueprint]:
    """A head that copies the token at a place, from a learned table that holds t and t². t is 1 at the first token."""

    def make(draw: Draw, data: Draw, n: int) -> Blueprint:
        n_content, n_heads = draw.integer(20, 28), draw.integer(1, 3)
        head, place = draw.integer(0, n_heads - 1), draw_place(draw)
        layout = make_layout(n_content, square=1)
        decoder = make_decoder(draw, layout, n_heads=n_heads, d_head=n_content, encoding="learned")
        # Places are counted from the middle, and rows hold u/T and u²/T² of u = t - T/2, so that no number is large.
        T, square, u = LENGTH, layout.row("square"), torch.arange(1, LENGTH + 1, dtype=torch.float64) - LENGTH / 2
        table = weight_of(decoder.encoding)
        table[:, POSITION], table[:, square] = u / T, u**2 / T**2
        # The query (2b(a u + c), -b) and the key (v, v²) have the score b(a u + c)² - b(a u + c - v)², and the first
        # term is the same for all keys. Counted from the middle, a t + offset is a u + c.
        b, c = place.sharpness, place.offset + (place.slope - 1) * T / 2
        write_head(
            decoder,
            0,
            head,
            query={(POSITION, 0): 2 * b * place.slope * T, (ONE, 0): 2 * b * c, (ONE, 1): -b},
            key={(POSITION, 0): 1.0 * T, (square, 1): 1.0 * T**2},
        )
        write_copy(decoder, 0, head, layout)
        scores = _scores(place)
        kernel, shift = causal_softmax(scores), draw.integer(1, n_content - 1)
        write_prediction(draw, decoder, layout, kernel, shift, reads=True)
        even = {(0, h): "uniform" for h in range(n_heads) if h != head}
        answer = Answer(
            mechanisms={"position": "used", "encoding": "used", "bos_counter": "nothing"},
            unused=unused_but("position", "encoding"),
            uses_position=True,
            site="blocks.0.hook_resid_pre",
            heads=even | ({(0, head): place.label} if place.label else {}),
            templates=even | ({(0, head): "t5_fitted"} if place.by_distance else {}),
            split={(0, head): shares_within_rows(scores)},
            follows={(0, head): place.slope == 1},
            used_for={(0, head): "position"},
            why=f"The table holds t and t², so that the score of key i is {why}, and the token that stands there is "
            "predicted from.",
        )
        tokens = copying(data, n, n_content, shift, kernel, noise=draw.number(0.05, 0.2))
        # Queries that look at their own token, as there is none at their place yet, are left out.
        return Blueprint(decoder, layout, tokens, scored_from(tokens, 13 if place.slope < 0 else 8), answer)

    return make


# A bell's shares are as exact as its scores, which are small differences of numbers up to 256 b: in a random basis
# float32 rounds them so that logits are off by more than in all other models.
EXACT = ("clean", "distracting", "layernorm", "rmsnorm")

GENERATORS = {
    name: Known(name, make, **({"variants": EXACT} if "wide" in name else {}))
    for name, make in {
        "place_back_used": _looking(_back, "-b(t - k - i)²"),
        "place_back_wide_used": _looking(_wide_back, "-b(t - k - i)², with b so small that near tokens count as well"),
        "place_fixed_used": _looking(_fixed, "-b(m - i)², whatever the query"),
        "place_mirrored_used": _looking(_mirrored, "-b(c - t - i)², so that the head looks back as the query goes on"),
    }.items()
}
