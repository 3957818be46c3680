"""Models with a position encoding that is read, that stands unread, or that says nothing."""

import dataclasses
from collections.abc import Callable

import torch
from jaxtyping import Float64
from torch import Tensor

from constructions.known.answer import Answer, Head, unused_but
from constructions.known.blueprint import (
    Blueprint,
    Placement,
    all_heads,
    by_distance,
    causal_softmax,
    make_decoder,
    make_layout,
    scored_from,
    weight_of,
    write_shift,
    write_switch,
)
from constructions.known.drawing import LENGTH, Draw, copying
from constructions.known.generator import Known
from constructions.known.plan import Plan
from constructions.known.splits import shares_within_rows
from constructions.layout import ONE, POSITION, Layout
from constructions.weights import head_weights, write_head, write_units
from probe.models.decoder import Decoder
from probe.models.encodings import Alibi, Rotary
from probe.models.encodings.absolute import sinusoids

FIXED_BASIS = ("clean", "distracting")  # the variants of a model whose encoding fixes the coordinates


def _embedded_answer(decoder: Decoder, verdict: str, why: str) -> Answer:
    """The answer of a model whose heads write nothing, and whose position comes from its embeddings."""
    nothing = dict.fromkeys(("bos_counter", "variance_decay", "neighbour_similarity", "attention_sink"), "nothing")
    if verdict != "nothing":
        del nothing["neighbour_similarity"]  # a table may make near tokens alike
    return Answer(
        mechanisms=nothing | {"position": verdict, "encoding": verdict},
        unused=unused_but("position", "encoding") if verdict == "used" else unused_but(),
        uses_position=verdict == "used",
        site=None if verdict == "nothing" else "blocks.0.hook_resid_pre",
        heads=all_heads(decoder, "uniform"),
        templates=all_heads(decoder, "uniform"),
        why=why,
    )


def _learned(verdict: str) -> Callable[[Draw, Draw, int], Blueprint]:
    def make(draw: Draw, data: Draw, n: int) -> Blueprint:
        plan = Plan.draw(draw)
        layout = make_layout(plan.n_content, late=len(plan.after), table=draw.integer(2, 6))
        width = len(plan.after) * plan.n_content
        decoder = make_decoder(draw, layout, n_layers=2, n_heads=2, d_mlp=width, encoding="learned")
        scale = draw.number(0.5, 3)
        table = weight_of(decoder.encoding)
        table[:, POSITION] = torch.arange(1, LENGTH + 1) / LENGTH * scale
        table[:, layout["table"].start : layout["table"].stop] = draw.normal(LENGTH, len(layout["table"]))
        if verdict == "nothing":
            table[:] = table[draw.integer(0, LENGTH - 1)]
        if verdict == "available":
            write_shift(decoder, layout["token"], plan.shifts[0], plan.gain)
        else:
            write_units(decoder, 0, plan.late(POSITION, layout["late"], lambda t: t / LENGTH * scale))
            write_switch(decoder, 1, layout, plan.shifts, plan.gain)
        why = {
            "used": "Thresholds of one column of the table decide which shift of the token is predicted.",
            "available": "No weight reads the columns that the table writes.",
            "nothing": "All rows of the table are the same, so it is a constant, and a reader finds no position.",
        }[verdict]
        if verdict == "nothing":
            held = int((torch.tensor(plan.after) < table[0, POSITION] / scale * LENGTH - 0.5).sum())
            plan = dataclasses.replace(plan, shifts=[plan.shifts[held]], after=[])
        tokens = plan.tokens(data, n, bos=False, fixed=verdict == "available")
        return Blueprint(decoder, layout, tokens, scored_from(tokens, 1), _embedded_answer(decoder, verdict, why))

    return make


def _sinusoidal(reads: bool) -> Callable[[Draw, Draw, int], Blueprint]:
    def make(draw: Draw, data: Draw, n: int) -> Blueprint:
        plan = Plan.draw(draw)
        layout = make_layout(plan.n_content, late=len(plan.after))
        decoder = make_decoder(draw, layout, n_layers=2, n_heads=2, d_mlp=len(plan.after) * plan.n_content)
        # The rows of the model stand on cosines of the slow half, whose angles stay below 1e-4, so that float32 rounds
        # them to 1, and the embeddings take this 1 out. POSITION stands on the fastest sine whose first quarter is
        # longer than a sequence.
        d_model, base = 4 * layout.d_model, 10.0 ** draw.number(11, 14)
        wave = next(i for i in range(0, d_model, 2) if base ** (i / d_model) * 1.5 > LENGTH)
        rows = d_model // 2 + 2 * torch.arange(layout.d_model) + 1
        rows[POSITION] = wave
        added = torch.ones(layout.d_model, dtype=torch.float64)
        added[POSITION] = 0
        signal = sinusoids(torch.arange(LENGTH), d_model, base)[:, wave]
        if reads:
            # The row holds the sine of position t - 1.
            write_units(decoder, 0, plan.late(POSITION, layout["late"], lambda t: float(signal[int(t) - 1])))
            write_switch(decoder, 1, layout, plan.shifts, plan.gain)
        else:
            write_shift(decoder, layout["token"], plan.shifts[0], plan.gain)
        why = (
            "Thresholds of one sine of the position decide which shift of the token is predicted."
            if reads
            else "No weight reads a coordinate in which the sinusoids are not the constant 1."
        )
        answer = _embedded_answer(decoder, "used" if reads else "available", why)
        tokens = plan.tokens(data, n, bos=False, fixed=not reads)
        placement = Placement("sinusoidal", {"base": base}, rows, added, d_model)
        return Blueprint(decoder, layout, tokens, scored_from(tokens, 1), answer, placement)

    return make


def write_copy(decoder: Decoder, layer: int, head: int, layout: Layout) -> None:
    """Weights by which a head adds the tokens that it attends to to the rows "out"."""
    W = head_weights(decoder, layer, head)
    for c, (token, out) in enumerate(zip(layout["token"], layout["out"], strict=True)):
        W.W_V[token, c] = 1
        W.W_O[c, out] = 1


def write_prediction(draw: Draw, decoder: Decoder, layout: Layout, kernel: Tensor, shift: int, reads: bool) -> None:
    """The unembedding of copied tokens, or of the token itself where the copies are not read.

    The gain is such that the token of which a query sees most has a logit of 4 to 6, in the mean over queries, and one
    of 2.5 to 3.5 where that is less than 90 % of what it sees.
    """
    gain, most = draw.number(4, 6), float(kernel.amax(-1).mean())
    if reads:
        write_shift(decoder, layout["out"], shift, (gain if most > 0.9 else gain / 2 + 0.5) / most)
    else:
        write_shift(decoder, layout["token"], shift, gain)


def attended(
    draw: Draw,
    data: Draw,
    n: int,
    blueprint: tuple[Decoder, Layout],
    head: int,
    scores: Float64[Tensor, "query key"],
    *,
    reads: bool,
    answer: Callable[[dict[Head, dict[str, float]]], Answer],
) -> Blueprint:
    """A model of one layer whose ``head`` has those scores, copies what it attends to and predicts its shift."""
    decoder, layout = blueprint
    n_content, kernel = len(layout["token"]), causal_softmax(scores)
    shift = draw.integer(1, n_content - 1)
    write_copy(decoder, 0, head, layout)
    write_prediction(draw, decoder, layout, kernel, shift, reads)
    follows = kernel if reads else torch.eye(LENGTH, dtype=torch.float64)
    tokens = copying(data, n, n_content, shift, follows, noise=draw.number(0.05, 0.2))
    split = {(0, head): shares_within_rows(scores)}
    return Blueprint(decoder, layout, tokens, scored_from(tokens, 1), answer(split))


def attention_answer(
    verdict: str,
    why: str,
    heads: dict[Head, str],
    templates: dict[Head, str],
    split: dict[Head, dict[str, float]],
    *,
    used_for: dict[Head, str],
    bos: bool = False,
) -> Answer:
    """The answer of a model whose encoding acts in attention, where no token but <bos> is distinguished."""
    return Answer(
        mechanisms={"encoding": verdict} if bos else {"encoding": verdict, "bos_counter": "nothing"},
        unused=unused_but("encoding", "position") if verdict == "used" else unused_but(),
        uses_position=verdict == "used",
        heads=heads,
        templates=templates,
        split=split,
        used_for=used_for,
        why=why,
    )


def _rotary(reads: bool) -> Callable[[Draw, Draw, int], Blueprint]:
    def make(draw: Draw, data: Draw, n: int) -> Blueprint:
        d_head, back, size = 32, draw.integer(1, 3), draw.number(8, 12)
        layout = make_layout(draw.integer(16, 28))
        decoder = make_decoder(draw, layout, d_head=d_head, encoding="rotary", base=draw.number(50, 200))
        encoding = decoder.encoding
        assert isinstance(encoding, Rotary)
        # Keys have the angle 0 and queries -k θ_j in plane j, so the score is size Σ_j cos(θ_j (t - i - k)): largest at
        # the distance k.
        angles = back * encoding.frequencies
        half = d_head // 2
        write_head(
            decoder,
            0,
            0,
            query={(ONE, j): size * float(angle.cos()) for j, angle in enumerate(angles)}
            | {(ONE, half + j): -size * float(angle.sin()) for j, angle in enumerate(angles)},
            key={(ONE, j): 1.0 for j in range(half)},
        )
        distance = torch.arange(LENGTH, dtype=torch.float64)
        bias = size * torch.cos((distance[:, None] - back) * encoding.frequencies).sum(-1)
        label = "previous_token" if back == 1 else "relative"
        why = (
            "W_Q and W_K read the constant row alone, so the rotation makes a score of the distance with its top at k, "
        )
        why += "and the token that stands there is predicted from." if reads else "and no weight reads what it copies."

        def answer(split: dict[Head, dict[str, float]]) -> Answer:
            verdict, use = ("used", "position") if reads else ("available", "nothing")
            return attention_answer(verdict, why, {(0, 0): label}, {}, split, used_for={(0, 0): use})

        return attended(draw, data, n, (decoder, layout), 0, by_distance(bias), reads=reads, answer=answer)

    return make


def _alibi(reads: bool) -> Callable[[Draw, Draw, int], Blueprint]:
    def make(draw: Draw, data: Draw, n: int) -> Blueprint:
        n_content, n_heads = draw.integer(20, 28), 2 ** draw.integer(3, 4)
        layout = make_layout(n_content)
        decoder = make_decoder(draw, layout, n_heads=n_heads, d_head=n_content, encoding="alibi")
        encoding = decoder.encoding
        assert isinstance(encoding, Alibi)
        head = n_heads // 8 - 1  # the one whose slope is 1/2: a steeper one has half of its attention on its own token
        bias = -encoding.slopes[head] * torch.arange(LENGTH)
        why = "Head h has no scores but ALiBi's, -m(t - i), "
        why += "and the tokens are predicted from by these weights." if reads else "and no weight reads what it copies."

        def answer(split: dict[Head, dict[str, float]]) -> Answer:
            templates = {(0, h): "alibi" for h in range(n_heads)}
            verdict, use = ("used", "position") if reads else ("available", "nothing")
            labels = {(0, head): "decay"}
            return attention_answer(verdict, why, labels, templates, split, used_for={(0, head): use})

        return attended(draw, data, n, (decoder, layout), head, by_distance(bias), reads=reads, answer=answer)

    return make


GENERATORS = {
    name: Known(name, make, **({"variants": FIXED_BASIS} if name.startswith("sinusoidal") else {}))
    for name, make in {
        "learned_used": _learned("used"),
        "learned_available": _learned("available"),
        "learned_absent": _learned("nothing"),
        "sinusoidal_used": _sinusoidal(reads=True),
        "sinusoidal_available": _sinusoidal(reads=False),
        "rotary_used": _rotary(reads=True),
        "rotary_available": _rotary(reads=False),
        "alibi_used": _alibi(reads=True),
        "alibi_available": _alibi(reads=False),
    }.items()
}
