"""Models with one head of a kind, whose copies are what the model predicts from."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from constructions.known.answer import Answer, Head, unused_but
from constructions.known.blueprint import (
    Blueprint,
    by_distance,
    make_decoder,
    make_layout,
    scored_from,
    weight_of,
    write_shift,
    write_switch,
)
from constructions.known.drawing import FIRST, LENGTH, Draw, switching
from constructions.known.encodings import attended, attention_answer, write_copy
from constructions.known.generator import Known
from constructions.known.splits import shares_within_rows
from constructions.layout import ONE
from constructions.weights import write_head
from probe.models.decoder import Decoder

T5: dict[str, Any] = {
    "encoding": "t5",
    "n_buckets": 64,
}  # distances 0…31 have buckets of their own, so any bias can be written
SHORTEST, LONGEST = 9, 16  # the tokens before a sequence repeats itself
Bias = Float64[Tensor, "distance"]


class Shape(NamedTuple):
    """A bias by distance, the label of the head that has it, and its template."""

    bias: Bias
    label: str
    template: str


def _at(distance: int, draw: Draw) -> Bias:
    bias = torch.zeros(LENGTH, dtype=torch.float64)
    bias[distance] = draw.number(14, 25)
    return bias


def _previous(draw: Draw) -> Shape:
    return Shape(_at(1, draw), "previous_token", "previous_token")


def _diagonal(draw: Draw) -> Shape:
    return Shape(_at(0, draw), "diagonal", "diagonal")


def _k_back(draw: Draw) -> Shape:
    return Shape(_at(draw.integer(2, 5), draw), "relative", "t5_fitted")


def _window(draw: Draw) -> Shape:
    near = torch.arange(LENGTH) < draw.integer(3, 4)
    return Shape(draw.number(14, 25) * near.double(), "window", "window")


def _power_law(draw: Draw) -> Shape:
    distance = torch.arange(LENGTH, dtype=torch.float64)
    return Shape(-draw.number(0.9, 1.4) * distance.log1p(), "decay", "power_law")


def _exponential(draw: Draw) -> Shape:
    return Shape(-draw.number(0.4, 0.6) * torch.arange(LENGTH).double(), "decay", "alibi_fitted")


def _write_bias(decoder: Decoder, head: int, bias: Bias) -> None:
    weight_of(decoder.encoding)[:LENGTH, head] = bias


def _of_distance(shape: Callable[[Draw], Shape]) -> Callable[[Draw, Draw, int], Blueprint]:
    """A head without content whose scores are T5's bias."""

    def make(draw: Draw, data: Draw, n: int) -> Blueprint:
        n_content = draw.integer(20, 28)
        n_heads, layout = draw.integer(1, 3), make_layout(n_content)
        head = draw.integer(0, n_heads - 1)
        decoder = make_decoder(draw, layout, n_heads=n_heads, d_head=n_content, **T5)
        bias, label, template = shape(draw)
        _write_bias(decoder, head, bias)
        even = {(0, h): "uniform" for h in range(n_heads) if h != head}
        why = "The head has W_Q = 0, so its scores are T5's bias by distance, and what it copies is predicted from."

        def answer(split: dict[Head, dict[str, float]]) -> Answer:
            labels, templates = even | {(0, head): label}, even | {(0, head): template}
            return attention_answer("used", why, labels, templates, split, used_for={(0, head): "position"})

        return attended(draw, data, n, (decoder, layout), head, by_distance(bias), reads=True, answer=answer)

    return make


def _repeated(data: Draw, n: int, n_content: int) -> Int[Tensor, "sequence pos"]:
    """<bos>, and 9 to 16 different tokens again and again; how many is another number in each sequence."""
    order = torch.rand(n, n_content, generator=data.generator, dtype=torch.float64).argsort(1)
    at = torch.arange(LENGTH - 1) % (SHORTEST + data.content(LONGEST + 1 - SHORTEST, n))[:, None]
    return torch.cat((torch.full((n, 1), -1), order.gather(1, at)), dim=1) + FIRST


def _induction(draw: Draw, data: Draw, n: int) -> Blueprint:
    """A previous-token head, and a head of the next layer that looks for the query's token in what it copied."""
    n_content = draw.integer(18, 28)
    layout = make_layout(n_content, previous=n_content)
    decoder = make_decoder(draw, layout, n_layers=2, n_heads=2, d_head=2 * n_content, **T5)
    bias = _at(1, draw)
    _write_bias(decoder, 0, bias)
    rows = list(zip(layout["token"], layout["previous"], layout["out"], strict=True))
    write_head(
        decoder,
        0,
        0,
        value={(token, c): 1.0 for c, (token, _, _) in enumerate(rows)},
        output={(c, previous): 1.0 for c, (_, previous, _) in enumerate(rows)},
    )
    score = draw.number(12, 25)
    write_head(
        decoder,
        1,
        1,
        query={(token, c): score for c, (token, _, _) in enumerate(rows)},
        key={(previous, c): 1.0 for c, (_, previous, _) in enumerate(rows)},
        value={(token, n_content + c): 1.0 for c, (token, _, _) in enumerate(rows)},
        output={(n_content + c, out): 1.0 for c, (_, _, out) in enumerate(rows)},
    )
    write_shift(decoder, layout["out"], 0, draw.number(5, 8))
    previous = {(layer, 0): "previous_token" for layer in (0, 1)}
    # Where <bos> stands first, no other token is marked as its own predecessor.
    answer = attention_answer(
        "used",
        "Head 0 of layer 0 copies the previous token, head 1 of layer 1 has a score where that is the query's token, "
        "and the token that stands there is predicted.",
        previous | {(0, 1): "uniform", (1, 1): "induction"},
        previous | {(0, 1): "uniform"},
        {head: shares_within_rows(by_distance(bias)) for head in previous},
        used_for={(0, 0): "position", (1, 1): "content"},
        bos=True,
    )
    tokens = _repeated(data, n, n_content)
    return Blueprint(decoder, layout, tokens, scored_from(tokens, LONGEST + 2), answer)


def _duplicate(draw: Draw, data: Draw, n: int) -> Blueprint:
    """A head on earlier occurrences of the query's token, or on <bos> where there are none."""
    n_content = draw.integer(10, 16)
    layout = make_layout(n_content, not_bos=1, late=1)
    decoder = make_decoder(draw, layout, n_layers=2, d_head=n_content + 2, d_mlp=n_content, **T5)
    # Scores: 2b for the same token, b for <bos>, -3b more for the query's own place. So an occurrence has b more than
    # <bos>, which has b more than all others and 2b more than the query itself.
    b = draw.number(14, 20)
    _write_bias(decoder, 0, torch.where(torch.arange(LENGTH) == 0, -3 * b, 0.0).double())
    content = {(row, c): 2 * b for c, row in enumerate(layout["token"])}
    write_head(
        decoder,
        0,
        0,
        query=content | {(ONE, n_content): b},
        key={(row, c): 1.0 for row, c in content} | {(ONE, n_content): 1.0, (layout.row("not_bos"), n_content): -1.0},
        value={(layout.row("not_bos"), n_content + 1): 1.0},
        output={(n_content + 1, layout["late"][0]): 1.0},
    )
    shifts, gain = draw.distinct(2, 1, n_content - 1), draw.number(4, 7)
    write_switch(decoder, 1, layout, shifts, gain)
    answer = Answer(
        mechanisms={"encoding": "used"},
        unused=unused_but("encoding", "position"),
        uses_position=True,
        heads={(0, 0): "duplicate"},
        used_for={(0, 0): "both"},
        why="The score is largest on earlier occurrences of the query's token and then on <bos>, T5's bias at distance "
        "0 excludes the query's own place, and whether the head finds one decides which shift is predicted.",
    )

    def seen(past: Int[Tensor, "sequence past"]) -> Int[Tensor, "sequence"]:
        return (past[:, :-1] == past[:, -1:]).any(1).long()

    tokens = switching(data, n, n_content, shifts, seen, noise=draw.number(0.2, 0.4), bos=True)
    return Blueprint(decoder, layout, tokens, scored_from(tokens, 2), answer)


def _content(draw: Draw, data: Draw, n: int) -> Blueprint:
    """A head on the tokens of one class, wherever they stand."""
    n_content, shift = [17, 19, 23, 29][draw.integer(0, 3)], draw.integer(1, 16)
    # Each token of the class is the one before plus the shift, so that what follows is mostly of the class too.
    start, size = draw.integer(0, n_content - 1), draw.integer(3, 5)
    of_class = [(start + i * shift) % n_content for i in range(size)]
    layout = make_layout(n_content)
    decoder = make_decoder(draw, layout, n_layers=1, d_head=n_content + 1)
    score, gain = draw.number(14, 20), draw.number(6, 10)
    write_copy(decoder, 0, 0, layout)
    write_head(
        decoder,
        0,
        0,
        query={(ONE, n_content): score},
        key={(layout["token"][c], n_content): 1.0 for c in of_class},
    )
    write_shift(decoder, layout["out"], shift, gain)
    answer = Answer(
        mechanisms={"encoding": "nothing", "bos_counter": "nothing"},
        unused=unused_but(),
        uses_position=False,
        heads={(0, 0): "content"},
        used_for={(0, 0): "content"},
        why="The score of a key depends on its token alone, so the prediction is a function of which tokens of the "
        "class stand before it and how often, and not of where.",
    )
    tokens = _following_class(data, n, n_content, of_class, shift)
    return Blueprint(decoder, layout, tokens, scored_from(tokens, 2), answer)


def _following_class(
    data: Draw, n: int, n_content: int, of_class: list[int], shift: int
) -> Int[Tensor, "sequence pos"]:
    """The second token is of the class. Three quarters of the later ones are a random earlier token of the class plus
    the shift, and the others are random."""
    tokens, members = data.content(n_content, n, LENGTH), torch.tensor(of_class)
    tokens[:, 1] = members[data.content(len(of_class), n)]
    is_member = torch.isin(torch.arange(n_content), members).double()
    for p in range(2, LENGTH):
        key = torch.multinomial(is_member[tokens[:, :p]], 1, generator=data.generator)
        follows = (tokens.gather(1, key)[:, 0] + shift) % n_content
        tokens[:, p] = torch.where(data.chance(0.25, n), tokens[:, p], follows)
    return tokens + FIRST


GENERATORS = {
    name: Known(name, make)
    for name, make in {
        "head_previous_token": _of_distance(_previous),
        "head_diagonal": _of_distance(_diagonal),
        "head_k_back": _of_distance(_k_back),
        "head_window": _of_distance(_window),
        "head_power_law": _of_distance(_power_law),
        "head_exponential": _of_distance(_exponential),
        "head_induction": _induction,
        "head_duplicate": _duplicate,
        "head_content": _content,
    }.items()
}
