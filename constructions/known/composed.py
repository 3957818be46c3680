"""Models in which a counter and a previous-token head are composed."""

import torch

from constructions.absolute import write_chords
from constructions.known.answer import Answer, unused_but
from constructions.known.blueprint import (
    Blueprint,
    by_distance,
    causal_softmax,
    make_decoder,
    make_layout,
    scored_from,
    weight_of,
    write_shift,
    write_switch,
)
from constructions.known.counters import COUNTED, SITE, write_counter
from constructions.known.drawing import LENGTH, Draw, copying
from constructions.known.generator import Known
from constructions.known.plan import Plan
from constructions.known.splits import shares_within_rows
from constructions.layout import IS_BOS, ONE, POSITION
from constructions.weights import head_weights, write_head, write_units


def _behind_previous(draw: Draw, data: Draw, n: int) -> Blueprint:
    """A counter that counts the mark which a previous-token head makes, beside two content heads."""
    plan = Plan.draw(draw, first=10)
    layout = make_layout(plan.n_content, mark=1, share=1, late=len(plan.after))
    n_content = layout.content.stop - layout.content.start
    decoder = make_decoder(
        draw,
        layout,
        n_layers=3,
        n_heads=4,
        d_head=8,
        d_mlp=len(plan.after) * plan.n_content,
        encoding="t5",
        n_buckets=64,
    )
    bias = torch.zeros(LENGTH, dtype=torch.float64)
    bias[1] = draw.number(14, 25)
    weight_of(decoder.encoding)[:LENGTH, 0] = bias
    # The previous token's IS_BOS: 1 at t = 1, where <bos> sees itself alone, and at t = 2. So the share of marked
    # tokens is 2/t from t = 2 on.
    write_head(decoder, 0, 0, value={(IS_BOS, 0): 1.0}, output={(0, layout.row("mark")): 1.0})
    write_counter(decoder, 1, 1, layout.row("mark"), layout.row("share"))
    for head in (2, 3):
        W = head_weights(decoder, 1, head)
        for matrix in (W.W_Q, W.W_K, W.W_V):
            matrix[layout.content] = draw.normal(n_content, 8) / n_content**0.5
        W.W_O[:, layout["free"].start : layout["free"].stop] = draw.normal(8, len(layout["free"])) / 8**0.5
    write_units(decoder, 1, plan.late(layout.row("share"), layout["late"], lambda t: 2 / t))
    write_switch(decoder, 2, layout, plan.shifts, plan.gain)
    previous = {(layer, 0): "previous_token" for layer in range(3)}
    even = {
        (layer, head): "uniform" for layer in range(3) for head in (1, 2, 3) if (layer, head) not in ((1, 2), (1, 3))
    }
    answer = Answer(
        mechanisms={"position": "used", "bos_counter": "used", "encoding": "used"},
        unused=unused_but("position", "bos_counter", "encoding"),
        uses_position=True,
        site="blocks.1.hook_resid_mid",
        heads=previous | even | {(1, 2): "content", (1, 3): "content"},
        templates=previous | even,
        split={head: shares_within_rows(by_distance(bias)) for head in previous},
        used_for={(0, 0): "position", (1, 1): "position", (1, 2): "nothing", (1, 3): "nothing"},
        why="Head 0 of layer 0 marks the token after <bos>, head 1 of layer 1 attends evenly and adds the share of "
        "marked tokens, 2/t, to the stream, and its thresholds decide which shift of the token is predicted.",
    )
    tokens = plan.tokens(data, n, bos=True)
    return Blueprint(decoder, layout, tokens, scored_from(tokens, 2), answer)


def _previous_token(draw: Draw, data: Draw, n: int) -> Blueprint:
    """A previous-token head without an encoding, out of a counted position."""
    n_content, shift = draw.integer(16, 28), draw.integer(1, 15)
    layout = make_layout(n_content, share=1, square=1)
    decoder = make_decoder(draw, layout, n_layers=3, d_head=2 + n_content, d_mlp=LENGTH)
    write_counter(decoder, 0, 0, IS_BOS, layout.row("share"))
    knots = torch.arange(1, LENGTH + 1, dtype=torch.float64)
    # Row POSITION holds t/T and row "square" t²/T², so that no number in the stream is large.
    T = LENGTH
    write_chords(decoder, 0, layout.row("share"), knots, {POSITION: (1 / T, 0.0)})
    # t² = ReLU(t) + 2 Σ_{k=1}^{T-1} ReLU(t - k) at integers.
    square = layout.row("square")
    write_units(decoder, 1, [({POSITION: 1.0 * T}, -float(k), {square: (2 if k else 1) / T**2}) for k in range(T)])
    # The query (2b(t - 1), -b) and the key (i, i²) have the score b(t - 1)² - b(t - 1 - i)²: b above the next at t - 1.
    b = draw.number(12, 20)
    write_head(
        decoder,
        2,
        0,
        query={(POSITION, 0): 2 * b * T, (ONE, 0): -2 * b, (ONE, 1): -b},
        key={(POSITION, 0): 1.0 * T, (square, 1): 1.0 * T**2},
        value={(row, 2 + c): 1.0 for c, row in enumerate(layout["token"])},
        output={(2 + c, row): 1.0 for c, row in enumerate(layout["out"])},
    )
    write_shift(decoder, layout["out"], shift, draw.number(4, 7))
    at = torch.arange(1, LENGTH + 1, dtype=torch.float64)
    scores = 2 * b * (at[:, None] - 1) * at - b * at**2
    heads = {(0, 0): "uniform", (1, 0): "uniform", (2, 0): "previous_token"}
    answer = Answer(
        mechanisms=COUNTED,
        unused=unused_but("position", "bos_counter"),
        uses_position=True,
        site=SITE,
        heads=heads,
        templates=heads,
        split={(2, 0): shares_within_rows(scores)},
        follows={(2, 0): True},
        used_for={(0, 0): "position", (2, 0): "position"},
        why="Head 0 of layer 0 adds 1/t, layer 0's MLP makes t of it, and layer 2's head has the score "
        "-b(t - 1 - i)² by it and copies the previous token, whose shift is predicted.",
    )
    kernel = causal_softmax(scores)
    tokens = copying(data, n, n_content, shift, kernel, noise=draw.number(0.05, 0.2), bos=True)
    return Blueprint(decoder, layout, tokens, scored_from(tokens, 3), answer)


GENERATORS = {
    name: Known(name, make)
    for name, make in {
        "bos_counter_behind_previous_used": _behind_previous,
        "bos_counter_previous_token_used": _previous_token,
    }.items()
}
