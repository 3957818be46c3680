"""Interventions that tell how a model knows position: on its tokens, and on values inside it."""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from probe.position.setting import Edits
from probe.tracing import PATTERN, RESID_POST, block_site

NORMAL = "normal"


@dataclass(frozen=True)
class Input:
    """Sequences that an intervention starts from. ``bos`` is the id with which all of them begin, None if none is;
    ``visible`` says which keys up to its own the first layer shows each query."""

    tokens: Int[Tensor, "batch pos"]
    bos: int | None
    n_layers: int
    generator: torch.Generator
    visible: Bool[Tensor, "#batch #head query key"]

    @property
    def length(self) -> int:
        return self.tokens.shape[1]

    def content(self, *shape: int) -> Int[Tensor, "..."]:
        """Tokens drawn from all those after the first."""
        pool = self.tokens[:, 1:].flatten()
        return pool[torch.randint(len(pool), shape, generator=self.generator)]


def drop_bos(given: Input) -> Int[Tensor, "batch pos"]:
    """Another token in place of ``<bos>``."""
    if given.bos is None:
        return given.tokens
    return torch.cat((given.content(len(given.tokens), 1), given.tokens[:, 1:]), dim=1)


def double_bos(given: Input) -> Int[Tensor, "batch pos"]:
    """A second ``<bos>`` in place of the token after the first: a counter then reads 2/t for 1/t, half the position."""
    return torch.cat((given.tokens[:, :1], given.tokens[:, :1], given.tokens[:, 2:]), dim=1)


def move_bos(given: Input) -> Int[Tensor, "batch pos"]:
    """``<bos>`` changes places with the token at a quarter of the length. From there on a counter is right, and what
    measures the distance to ``<bos>`` is behind by a quarter of the length."""
    tokens, to = given.tokens.clone(), given.length // 4
    tokens[:, 0], tokens[:, to] = given.tokens[:, to], given.tokens[:, 0]
    return tokens


def constant(given: Input) -> Int[Tensor, "batch pos"]:
    """One token again and again after the first, another in each sequence."""
    return torch.cat((given.tokens[:, :1], given.content(len(given.tokens), 1).expand_as(given.tokens[:, 1:])), dim=1)


def constant_without_bos(given: Input) -> Int[Tensor, "batch pos"]:
    """One token again and again: without an encoding every position has the same hidden states."""
    return given.content(len(given.tokens), 1).expand_as(given.tokens)


def permuted(given: Input) -> Int[Tensor, "batch pos"]:
    """The tokens after the first in random order: where they stood tells nothing any more."""
    order = torch.rand(len(given.tokens), given.length - 1, generator=given.generator, dtype=torch.float32).argsort(1)
    return torch.cat((given.tokens[:, :1], given.tokens[:, 1:].gather(1, order)), dim=1)


def permuted_without_bos(given: Input) -> Int[Tensor, "batch pos"]:
    """Random content and nothing else: no ``<bos>``, no order."""
    return drop_bos(dataclasses.replace(given, tokens=permuted(given)))


def uniform_first_layer(given: Input) -> Edits:
    """Attention in the first layer is uniform over the keys that a query sees: all, where the model is not causal."""

    def edit(pattern: Float[Tensor, "batch head query key"]) -> Tensor:
        causal = not pattern.triu(1).any()
        seen = given.visible.to(pattern) if causal else torch.ones_like(pattern[:1, :1])
        return (seen / seen.sum(-1, keepdim=True)).expand_as(pattern)

    return {block_site(0, PATTERN): edit}


def first_twice(pattern: Float[Tensor, "batch head query key"]) -> Float[Tensor, "batch head query key"]:
    """The odds of the first key doubled."""
    first = torch.arange(pattern.shape[-1], device=pattern.device) == 0
    return pattern * (1 + first.to(pattern)) / (1 + pattern[..., :1])


def double_odds(given: Input) -> Edits:
    """The first key counts twice in every head, as if a second ``<bos>`` stood there unseen."""
    return {block_site(layer, PATTERN): first_twice for layer in range(given.n_layers)}


def window_width(given: Input) -> int:
    """Such that at half of the length all layers together do not reach back to the start."""
    return max(2, 1 + given.length // (2 * given.n_layers))


def window(given: Input) -> Edits:
    """Every layer attends to the nearest keys only."""

    def edit(pattern: Float[Tensor, "batch head query key"]) -> Tensor:
        t = torch.arange(pattern.shape[-1], device=pattern.device)
        near = (t[:, None] - t).abs() < window_width(given)
        pattern = pattern * near
        return pattern / pattern.sum(-1, keepdim=True).clamp(min=torch.finfo(pattern.dtype).tiny)

    return {block_site(layer, PATTERN): edit for layer in range(given.n_layers)}


def strangers(given: Input) -> Edits:
    """Behind the first layer, each position has the state of that position in another sequence, drawn for each position
    anew: every state alone is as likely as before, but neighbours are no more alike than position makes them."""
    if given.n_layers == 1:
        return {}
    return {block_site(0, RESID_POST): functools.partial(mix_sequences, generator=given.generator)}


def mix_sequences(
    x: Float[Tensor, "batch pos d_model"], generator: torch.Generator
) -> Float[Tensor, "batch pos d_model"]:
    order = torch.rand(x.shape[:2], generator=generator, dtype=torch.float32).argsort(0).to(x.device)
    return x.gather(0, order[..., None].expand_as(x))


@dataclass(frozen=True)
class Intervention:
    """New tokens, edits of values, and from which position on the outcome is looked at."""

    tokens: Callable[[Input], Tensor] = lambda given: given.tokens
    edits: Callable[[Input], Edits] = lambda given: {}
    first: Callable[[Input], int] = lambda given: 1
    wants_bos: bool = False


INTERVENTIONS = {
    NORMAL: Intervention(),
    "drop_bos": Intervention(drop_bos, wants_bos=True),
    "double_bos": Intervention(double_bos, first=lambda given: 2, wants_bos=True),
    "move_bos": Intervention(move_bos, first=lambda given: given.length // 4 + 1, wants_bos=True),
    "constant": Intervention(constant),
    "constant_without_bos": Intervention(constant_without_bos),
    "permuted": Intervention(permuted),
    "permuted_without_bos": Intervention(permuted_without_bos),
    "uniform_first_layer": Intervention(edits=uniform_first_layer),
    "double_odds": Intervention(edits=double_odds, wants_bos=True),
    "window": Intervention(edits=window, first=lambda given: given.n_layers * (window_width(given) - 1) + 1),
    "strangers": Intervention(edits=strangers),
    "strangers_without_bos": Intervention(permuted_without_bos, strangers),
}
