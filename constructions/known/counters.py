"""Models that hold the position because a head counts by its attention to <bos>.

Throughout, t is the number of tokens that a query sees, 1 at <bos>.
"""

import math
from collections.abc import Callable

import torch

from constructions.known.answer import Answer, unused_but
from constructions.known.blueprint import (
    Blueprint,
    all_heads,
    make_decoder,
    make_layout,
    scored_from,
    write_shift,
    write_switch,
)
from constructions.known.drawing import LENGTH, Draw
from constructions.known.generator import Known
from constructions.known.plan import Plan
from constructions.known.splits import shares_within_rows
from constructions.layout import IS_BOS, ONE, POSITION, Layout
from constructions.weights import write_head, write_units
from probe.models.decoder import Decoder

COUNTED = {"encoding": "nothing", "position": "used", "bos_counter": "used"}
SITE = "blocks.0.hook_resid_post"


def write_counter(decoder: Decoder, layer: int, head: int, mark: int, row: int, score: float = 0.0) -> None:
    """Weights by which a head adds its share of attention on the marked token to ``row``: with the score c of that
    token and 0 of all others, e^c / (e^c + t - 1)."""
    write_head(
        decoder,
        layer,
        head,
        query={(ONE, 0): score},
        key={(mark, 0): 1.0},
        value={(mark, 1): 1.0},
        output={(1, row): 1.0},
    )


def _counting(reads: bool, cut: bool = False, massive: bool = False) -> Callable[[Draw, Draw, int], Blueprint]:
    """A uniform head that counts, with a reader, one whose last connection is cut, or none."""

    def make(draw: Draw, data: Draw, n: int) -> Blueprint:
        plan = Plan.draw(draw)
        layout = make_layout(plan.n_content, share=1, late=len(plan.after), massive=1)
        width = len(plan.after) * max(2, plan.n_content)
        decoder = make_decoder(draw, layout, n_layers=2, n_heads=draw.integer(1, 3), d_mlp=width)
        write_counter(decoder, 0, 0, IS_BOS, layout.row("share"))
        size = draw.number(30, 60)
        if massive:
            decoder.token_embedding.weight[:, layout.row("massive")] = size
        if reads or cut:
            write_units(decoder, 0, plan.late(layout.row("share"), layout["late"], lambda t: 1 / t))
        if reads:
            write_switch(decoder, 1, layout, plan.shifts, plan.gain)
        else:
            write_shift(decoder, layout["token"], plan.shifts[0], plan.gain)
        verdict = "used" if reads else "available"
        answer = Answer(
            mechanisms=_mechanisms(verdict),
            unused=unused_but("position", "bos_counter") if reads else unused_but(),
            uses_position=reads,
            site=SITE,
            heads=all_heads(decoder, "uniform"),
            templates=all_heads(decoder, "uniform"),
            used_for={(0, 0): "position" if reads else "nothing"},
            why="Head 0 of layer 0 has W_Q = 0 and the value 1 on <bos> alone, so it adds 1/t to the stream, "
            + _reader(reads, cut),
        )
        tokens = plan.tokens(data, n, bos=True, fixed=not reads)
        return Blueprint(decoder, layout, tokens, scored_from(tokens, 2), answer)

    return make


def _reader(reads: bool, cut: bool) -> str:
    if reads:
        return "whose thresholds decide which shift of the token is predicted."
    if cut:
        return "and units compare it with thresholds, but no weight reads the rows that they write."
    return "and no weight reads that row."


def _mechanisms(verdict: str) -> dict[str, str]:
    # Attention outputs are the same in every sequence, so there is no variance that could decay, and every head is
    # uniform, so none is a sink.
    nothing = dict.fromkeys(("encoding", "variance_decay", "attention_sink"), "nothing")
    return nothing | {"position": verdict, "bos_counter": verdict}


def _leaning(draw: Draw, data: Draw, n: int) -> Blueprint:
    """A counter that prefers <bos>, or avoids it."""
    plan = Plan.draw(draw)
    layout = make_layout(plan.n_content, share=1, late=len(plan.after))
    decoder = make_decoder(draw, layout, n_layers=2, d_mlp=len(plan.after) * plan.n_content)
    c = draw.number(1, 3) * (1 if draw.integer(0, 1) else -1)
    write_counter(decoder, 0, 0, IS_BOS, layout.row("share"), c)
    write_units(
        decoder,
        0,
        plan.late(layout.row("share"), layout["late"], lambda t: math.exp(c) / (math.exp(c) + t - 1)),
    )
    write_switch(decoder, 1, layout, plan.shifts, plan.gain)
    answer = Answer(
        mechanisms=COUNTED | {"variance_decay": "nothing"},
        unused=unused_but("position", "bos_counter"),
        uses_position=True,
        site=SITE,
        heads={(1, 0): "uniform"},
        templates={(0, 0): "first_token_sink", (1, 0): "uniform"},
        split={(0, 0): _split_of_first(c)},
        used_for={(0, 0): "position"},
        why="Head 0 of layer 0 has the score c on <bos>, 0 on all others, and its share of <bos>, e^c/(e^c + t - 1), "
        "decides which shift of the token is predicted.",
    )
    tokens = plan.tokens(data, n, bos=True)
    return Blueprint(decoder, layout, tokens, scored_from(tokens, 2), answer)


def _split_of_first(score: float) -> dict[str, float]:
    scores = torch.zeros(LENGTH, LENGTH, dtype=torch.float64)
    scores[:, 0] = score
    return shares_within_rows(scores)


def _sink_that_counts(draw: Draw, data: Draw, n: int) -> Blueprint:
    """A head with almost all attention on <bos>, whose rest is a straight line in the position."""
    plan = Plan.draw(draw)
    layout = make_layout(plan.n_content, not_bos=1, late=len(plan.after))
    decoder = make_decoder(draw, layout, n_layers=2, d_mlp=len(plan.after) * plan.n_content)
    c = draw.number(8, 11)
    write_head(
        decoder,
        0,
        0,
        query={(ONE, 0): c},
        key={(IS_BOS, 0): 1.0},
        value={(layout.row("not_bos"), 1): 1.0},
        output={(1, POSITION): math.exp(c)},
    )
    # z = (t - 1) ε / (1 + (t - 1) ε) with ε = e^-c, and the output multiplies it by 1/ε (``constructions.counting``).
    write_units(decoder, 0, plan.late(POSITION, layout["late"], lambda t: (t - 1) / (1 + (t - 1) * math.exp(-c))))
    write_switch(decoder, 1, layout, plan.shifts, plan.gain)
    answer = Answer(
        mechanisms=COUNTED | {"variance_decay": "nothing"},
        unused=unused_but("position", "bos_counter", "attention_sink"),
        uses_position=True,
        site=SITE,
        heads={(0, 0): "sink", (1, 0): "uniform"},
        templates={(0, 0): "first_token_sink", (1, 0): "uniform"},
        split={(0, 0): _split_of_first(c)},
        used_for={(0, 0): "position"},
        why="Head 0 of layer 0 has the score c on <bos>, and its attention on the t - 1 others, (t - 1)e^-c to first "
        "order, is their number, whose thresholds decide which shift of the token is predicted.",
    )
    tokens = plan.tokens(data, n, bos=True)
    return Blueprint(decoder, layout, tokens, scored_from(tokens, 2), answer)


def _massive_bos(draw: Draw, data: Draw, n: int) -> Blueprint:
    """A counter whose value on <bos> is massive, and nobody reads it."""
    plan = Plan.draw(draw)
    layout: Layout = make_layout(plan.n_content, massive=1, share=1)
    decoder = make_decoder(draw, layout, n_layers=2, n_heads=draw.integer(1, 3))
    decoder.token_embedding.weight[0, layout.row("massive")] = draw.number(30, 200)
    write_counter(decoder, 0, 0, layout.row("massive"), layout.row("share"))
    write_shift(decoder, layout["token"], plan.shifts[0], plan.gain)
    answer = Answer(
        mechanisms=_mechanisms("available"),
        unused=unused_but(),
        uses_position=False,
        site=SITE,
        heads=all_heads(decoder, "uniform"),
        templates=all_heads(decoder, "uniform"),
        used_for={(0, 0): "nothing"},
        why="Head 0 of layer 0 has W_Q = 0 and the value M on <bos> alone, so it adds M/t to a row that no weight "
        "reads.",
    )
    tokens = plan.tokens(data, n, bos=True, fixed=True)
    return Blueprint(decoder, layout, tokens, scored_from(tokens, 2), answer)


GENERATORS = {
    name: Known(name, make)
    for name, make in {
        "bos_counter_used": _counting(reads=True),
        "bos_counter_available": _counting(reads=False),
        "bos_counter_reader_cut": _counting(reads=False, cut=True),
        "bos_counter_massive_channel_used": _counting(reads=True, massive=True),
        "bos_counter_massive_bos_available": _massive_bos,
        "bos_counter_leaning_used": _leaning,
        "bos_counter_sink_used": _sink_that_counts,
    }.items()
}
