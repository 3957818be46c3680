"""Models that do not use position, although something about them looks as if they did."""

from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor

from constructions.known.answer import Answer, unused_but
from constructions.known.blueprint import (
    Blueprint,
    all_heads,
    make_decoder,
    make_layout,
    scored_from,
    weight_of,
    write_shift,
    write_switch,
)
from constructions.known.drawing import FIRST, LENGTH, Draw, switching
from constructions.known.encodings import write_copy
from constructions.known.generator import Known
from constructions.known.plan import Plan
from constructions.layout import IS_BOS, ONE
from constructions.weights import write_head

# Every state is a function of its own token alone, so no mechanism is there.
NOTHING = dict.fromkeys(
    ("position", "bos_counter", "variance_decay", "neighbour_similarity", "attention_sink", "encoding"), "nothing"
)


def _bag(low: float, high: float, encoding: str = "none") -> Callable[[Draw, Draw, int], Blueprint]:
    """A uniform head, and a prediction from the mean of the tokens so far, at a scale in low…high."""

    def make(draw: Draw, data: Draw, n: int) -> Blueprint:
        n_content, scale = draw.integer(12, 24), draw.number(low, high)
        layout, shift = make_layout(n_content), draw.integer(1, n_content - 1)
        options = {"n_buckets": draw.integer(8, 64)} if encoding == "t5" else {}
        decoder = make_decoder(draw, layout, n_layers=2, d_head=n_content, encoding=encoding, **options)
        if encoding == "t5":
            weight_of(decoder.encoding)[:] = draw.number(-3, 3)
        write_copy(decoder, 0, 0, layout)
        write_shift(decoder, layout["out"], shift, scale)
        answer = Answer(
            mechanisms={"encoding": "nothing", "bos_counter": "nothing", "attention_sink": "nothing"},
            unused=unused_but(),
            uses_position=False,
            heads=all_heads(decoder, "uniform"),
            templates=all_heads(decoder, "uniform"),
            used_for={(0, 0): "content"},
            why="All scores of a query are equal, so the prediction is a function of the shares of the tokens so far, "
            "which are the same where each token stands twice and every position is doubled.",
        )
        tokens = _from_shares(data, n, n_content, shift, scale)
        return Blueprint(decoder, layout, tokens, scored_from(tokens, 1), answer)

    return make


def _bag_behind_bos(draw: Draw, data: Draw, n: int) -> Blueprint:
    """The same behind a <bos>, with logits that are too small: the share of <bos> dilutes those of all tokens, so a
    second <bos> makes the predictions flatter still, and the loss greater, though no weight reads a position."""
    n_content, best = draw.integer(12, 24), draw.number(4, 8)
    layout, shift = make_layout(n_content), draw.integer(1, n_content - 1)
    decoder = make_decoder(draw, layout, n_layers=2, d_head=n_content)
    write_copy(decoder, 0, 0, layout)
    write_shift(decoder, layout["out"], shift, best * draw.number(0.3, 0.7))
    answer = Answer(
        mechanisms={"encoding": "nothing", "attention_sink": "nothing"},
        unused=unused_but(),
        uses_position=False,
        heads=all_heads(decoder, "uniform"),
        templates=all_heads(decoder, "uniform"),
        used_for={(0, 0): "content"},
        why="All scores of a query are equal and the value of <bos> is 0, so a prediction is a function of the shares "
        "of the tokens so far: what t adds is a factor 1 - 1/t on all of them, which no weight reads.",
    )
    tokens = _from_shares(data, n, n_content, shift, best, bos=True)
    return Blueprint(decoder, layout, tokens, scored_from(tokens, 2), answer)


def _from_shares(
    data: Draw, n: int, n_content: int, shift: int, scale: float, bos: bool = False
) -> Int[Tensor, "sequence pos"]:
    """Sequences drawn from the prediction that a model makes: softmax of scale times the shares of shifted tokens."""
    tokens = data.content(n_content, n, LENGTH)
    counts = torch.zeros(n, n_content, dtype=torch.float64)
    for p in range(1, LENGTH):
        if p > 1 or not bos:
            counts += torch.nn.functional.one_hot((tokens[:, p - 1] + shift) % n_content, n_content)
        tokens[:, p] = torch.multinomial((scale * counts / p).softmax(-1), 1, generator=data.generator)[:, 0]
    tokens = tokens + FIRST
    if bos:
        tokens[:, 0] = FIRST - 1
    return tokens


def _sink(matters: bool) -> Callable[[Draw, Draw, int], Blueprint]:
    """A head with all its attention on <bos>, whose value is the same from every position."""

    def make(draw: Draw, data: Draw, n: int) -> Blueprint:
        plan = Plan.draw(draw, segments=2)
        layout = make_layout(plan.n_content, late=1)
        decoder = make_decoder(draw, layout, n_layers=2, n_heads=draw.integer(1, 2), d_mlp=plan.n_content)
        # e^-45 is below half a unit in the last place of 1, in float64 too: the share of <bos> is 1 at every query.
        score = draw.number(45, 70)
        write_head(
            decoder,
            0,
            0,
            query={(ONE, 0): score},
            key={(IS_BOS, 0): 1.0},
            value={(IS_BOS, 1): 1.0},
            output={(1, layout["late"][0]): 1.0},
        )
        if matters:
            write_switch(decoder, 1, layout, plan.shifts, plan.gain)
            shifts = plan.shifts[1:]
        else:
            write_shift(decoder, layout["token"], plan.shifts[0], plan.gain)
            shifts = plan.shifts[:1]
        heads = all_heads(decoder, "uniform") | {(0, 0): "sink"}
        answer = Answer(
            mechanisms=NOTHING,
            unused=unused_but(),
            uses_position=False,
            heads=heads,
            templates=heads | {(0, 0): "first_token"},
            used_for={(0, 0): "position" if matters else "nothing"},  # <bos> is the first token, and no other
            why="The score of <bos> is so large that rounding makes its share 1 for every query, so the head adds a "
            "constant, " + ("which switches the shift that is predicted." if matters else "which no weight reads."),
        )

        def mode(past: Tensor) -> Tensor:
            return torch.zeros(len(past), dtype=torch.long)

        tokens = switching(data, n, plan.n_content, shifts, mode, noise=plan.noise, bos=True)
        return Blueprint(decoder, layout, tokens, scored_from(tokens, 2), answer)

    return make


def _content_sink(draw: Draw, data: Draw, n: int) -> Blueprint:
    """A head on the tokens of one class, which rests on <bos> until one has come."""
    plan = Plan.draw(draw, segments=2)
    of_class = draw.distinct(draw.integer(1, 2), 0, plan.n_content - 1)
    layout = make_layout(plan.n_content, late=1)
    decoder = make_decoder(draw, layout, n_layers=2, d_mlp=plan.n_content)
    b = draw.number(22, 30)
    members = [layout["token"][c] for c in of_class]
    write_head(
        decoder,
        0,
        0,
        query={(ONE, 0): b},
        key={(IS_BOS, 0): 1.0} | {(row, 0): 2.0 for row in members},
        value={(row, 1): 1.0 for row in members},
        output={(1, layout["late"][0]): 1.0},
    )
    write_switch(decoder, 1, layout, plan.shifts, plan.gain)
    answer = Answer(
        mechanisms={"encoding": "nothing"},
        unused=unused_but(),
        uses_position=False,
        heads={(1, 0): "uniform"},
        templates={(1, 0): "uniform"},
        used_for={(0, 0): "content"},
        why="The scores depend on the tokens alone and the head returns 1 where a token of the class came and else 0, "
        "so more tokens of other classes in between change no prediction.",
    )
    member = torch.zeros(plan.n_content + 1, dtype=torch.bool)
    member[of_class] = True

    def seen(past: Int[Tensor, "sequence past"]) -> Int[Tensor, "sequence"]:
        return member[past].any(1).long()  # <bos> is -1, the last entry, which is False

    tokens = switching(data, n, plan.n_content, plan.shifts, seen, noise=plan.noise, bos=True)
    return Blueprint(decoder, layout, tokens, scored_from(tokens, 2), answer)


def _token_alone(why: str, *, massive: str = "") -> Callable[[Draw, Draw, int], Blueprint]:
    """Heads that write nothing, and a shift of the token; ``massive``: a large number at "bos" or at "all" tokens."""

    def make(draw: Draw, data: Draw, n: int) -> Blueprint:
        plan = Plan.draw(draw)
        layout = make_layout(plan.n_content, massive=1)
        decoder = make_decoder(draw, layout, n_layers=2, n_heads=draw.integer(1, 3))
        size = draw.number(30, 300 if massive == "bos" else 200)
        if massive:
            rows = slice(0, 1) if massive == "bos" else slice(None)
            decoder.token_embedding.weight[rows, layout.row("massive")] = size
        write_shift(decoder, layout["token"], plan.shifts[0], plan.gain)
        answer = Answer(
            mechanisms=NOTHING,
            unused=unused_but(),
            uses_position=False,
            heads=all_heads(decoder, "uniform"),
            templates=all_heads(decoder, "uniform"),
            why=why,
        )
        tokens = plan.tokens(data, n, bos=massive == "bos", fixed=True)
        return Blueprint(decoder, layout, tokens, scored_from(tokens, 2), answer)

    return make


def _content_by_place(draw: Draw, data: Draw, n: int) -> Blueprint:
    """Tokens come from another class in each stretch of a sequence, and the model predicts the class of its token."""
    n_classes, size = draw.integer(2, 4), draw.integer(5, 8)
    n_content, gain = n_classes * size, draw.number(2, 5)
    layout = make_layout(n_content)
    decoder = make_decoder(draw, layout, n_layers=2)
    of_class = torch.arange(n_content) // size
    same = (of_class[:, None] == of_class).double() * gain
    decoder.head.weight[FIRST:, layout["token"].start : layout["token"].stop] = same
    ends = torch.tensor(sorted(draw.distinct(n_classes - 1, 6, 26)))
    stretch = torch.searchsorted(ends, torch.arange(LENGTH), right=True)
    tokens = stretch * size + data.content(size, n, LENGTH) + FIRST
    answer = Answer(
        mechanisms=NOTHING,
        unused=unused_but(),
        uses_position=False,
        heads=all_heads(decoder, "uniform"),
        templates=all_heads(decoder, "uniform"),
        why="No head writes anything, so a prediction is a function of its own token, and tokens tell the stretch.",
    )
    return Blueprint(decoder, layout, tokens, scored_from(tokens, 1), answer)


GENERATORS = {
    name: Known(name, make)
    for name, make in {
        "bag_of_words_soft": _bag(2, 6),
        "bag_of_words_behind_bos": _bag_behind_bos,
        "bag_of_words": _bag(8, 16),
        "bag_of_words_sharp": _bag(30, 60),
        "t5_absent": _bag(8, 16, encoding="t5"),
        "sink_idle": _sink(matters=False),
        "sink_matters": _sink(matters=True),
        "sink_content": _content_sink,
        "content_by_place": _content_by_place,
        "content_alone": _token_alone("No head writes anything, so a prediction is a function of its own token."),
        "massive_bos": _token_alone(
            "No head writes anything and no weight reads the massive coordinate of <bos>.", massive="bos"
        ),
        "massive_channel": _token_alone(
            "No head writes anything and no weight reads the massive coordinate, which is the same for all tokens.",
            massive="all",
        ),
    }.items()
}
