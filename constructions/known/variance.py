"""Models that hold the position because a mean of more values is smaller."""

import math
from collections.abc import Callable

from constructions.known.answer import Answer, unused_but
from constructions.known.blueprint import (
    Blueprint,
    all_heads,
    late_units,
    make_decoder,
    make_layout,
    scored_from,
    write_shift,
    write_switch,
)
from constructions.known.drawing import Draw
from constructions.known.generator import Known
from constructions.known.plan import Plan
from constructions.weights import head_weights, write_units


def _expected(t: float) -> float:
    """E|z| of the mean z of t independent signs, √(2/πt) for t of a few and more."""
    return math.sqrt(2 / (math.pi * t))


def _decaying(reads: bool) -> Callable[[Draw, Draw, int], Blueprint]:
    """A uniform head over values of random signs, and units that read the size of its output."""

    def make(draw: Draw, data: Draw, n: int) -> Blueprint:
        # The number of tokens is a prime, so that no shift comes back to a token before all others have come.
        plan = Plan(
            n_content=[41, 43, 47, 53][draw.integer(0, 3)],
            after=[draw.integer(5, 9)],
            shifts=draw.distinct(2, 1, 39),
            gain=draw.number(4, 7),
            noise=draw.number(0.1, 0.3),
        )
        n_values, scale = draw.integer(40, 56), draw.number(2, 4)
        layout = make_layout(plan.n_content, values=n_values, size=1, late=1)
        decoder = make_decoder(
            draw, layout, n_layers=3, n_heads=1, d_head=n_values, d_mlp=max(2 * n_values, plan.n_content)
        )
        W = head_weights(decoder, 0, 0)
        signs = draw.signs(plan.n_content, n_values)
        W.W_V[layout["token"].start : layout["token"].stop] = scale * (signs - signs.mean(0))
        for j, row in enumerate(layout["values"]):
            W.W_O[j, row] = 1
        size = layout.row("size")
        if reads:
            # |z| = ReLU(z) + ReLU(-z), and row "size" is the mean of |z|.
            units = [({row: sign}, 0.0, {size: 1.0 / n_values}) for row in layout["values"] for sign in (1.0, -1.0)]
            write_units(decoder, 0, units)
            # The ramp is three tokens wide, as the size fluctuates by more than from one token to the next.
            at, late = plan.after[0], layout.row("late")
            write_units(decoder, 1, late_units(size, late, scale * _expected(at - 1), scale * _expected(at + 2)))
            write_switch(decoder, 2, layout, plan.shifts, plan.gain)
        else:
            write_shift(decoder, layout["token"], plan.shifts[0], plan.gain)
        verdict = "used" if reads else "available"
        mechanisms = dict.fromkeys(("encoding", "bos_counter", "attention_sink"), "nothing")
        mechanisms |= {"position": verdict, "variance_decay": verdict}
        if not reads:
            mechanisms["neighbour_similarity"] = "available"
        answer = Answer(
            mechanisms=mechanisms,
            unused=unused_but("position", "variance_decay") if reads else unused_but(),
            uses_position=reads,
            site="blocks.0.hook_resid_mid",
            heads=all_heads(decoder, "uniform"),
            templates=all_heads(decoder, "uniform"),
            # Of random signs the mean over sequences is 0 at every position, so that all that the head writes is
            # content, although the size of it tells the position.
            used_for={(0, 0): "content" if reads else "nothing"},
            why="Head 0 of layer 0 attends evenly to values of mean 0, so the size of its output falls as t^-1/2, and "
            + ("units read its absolute value alone." if reads else "no weight reads it."),
        )
        tokens = plan.tokens(data, n, bos=False, fixed=not reads)
        return Blueprint(decoder, layout, tokens, scored_from(tokens, 1), answer)

    return make


GENERATORS = {
    name: Known(name, make)
    for name, make in {
        "variance_decay_used": _decaying(reads=True),
        "variance_decay_available": _decaying(reads=False),
    }.items()
}
