"""What holds of every head because of the rows that its weights read and write."""

import dataclasses

from constructions.known.answer import Answer, Head
from constructions.known.blueprint import Blueprint
from constructions.layout import IS_BOS, ONE, Layout
from constructions.weights import head_weights


def with_every_head(blueprint: Blueprint) -> Answer:
    """The answer, completed for the heads that it leaves out, as far as their weights decide.

    A head whose values or outputs are all 0 writes nothing, so that it is used for nothing. One whose query reads rows
    that the token alone decides, or none, attends alike whatever position stands in its query, so that its attention
    does not follow it.
    """
    decoder, answer = blueprint.decoder, blueprint.answer
    of_tokens = _rows_of_tokens(blueprint.layout)
    follows: dict[Head, bool] = {}
    used_for: dict[Head, str] = {}
    for layer in range(decoder.config.n_layers):
        for head in range(decoder.config.n_heads):
            W = head_weights(decoder, layer, head)
            if not W.W_V.any() or not W.W_O.any():
                used_for[layer, head] = "nothing"
            rows = set(W.W_Q.any(1).nonzero().flatten().tolist())
            if layer >= first_reader(answer, decoder.config.n_layers) and rows <= of_tokens:
                follows[layer, head] = False
    return dataclasses.replace(answer, follows=follows | {**answer.follows}, used_for=used_for | {**answer.used_for})


def first_reader(answer: Answer, n_layers: int) -> int:
    """The first layer whose heads read what stands at the answer's site: the last layer where it names no site."""
    if answer.site is None:
        return n_layers - 1
    _, layer, name = answer.site.split(".")
    return int(layer) + (name != "hook_resid_pre")


def _rows_of_tokens(layout: Layout) -> set[int]:
    """The rows that embeddings alone write: no table of positions, no head and no unit writes into them."""
    groups = [layout[name] for name in ("token", "not_bos", "massive") if name in layout]
    content = range(layout.content.start, layout.content.stop)
    return {ONE, IS_BOS, *content, *(row for group in groups for row in group)}
