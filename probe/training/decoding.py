"""Greedy decoding with the model's own cache."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from probe.errors import ProbeError
from probe.models.build import Model
from probe.training.data import at_once


@torch.no_grad()
def greedy(decoder: Model, prompts: Int[Tensor, "batch pos"], *, stop: int, max_new: int) -> list[list[int]]:
    """The most likely continuation, token by token, of prompts of one length.

    Each continuation ends before the first ``stop`` token, or after ``max_new`` tokens.
    """
    if max_new < 1:
        raise ProbeError(f"max_new must be at least 1, got {max_new}")
    continuations: list[list[int]] = [[] for _ in range(len(prompts))]
    alive = torch.arange(len(prompts))
    cache = decoder.new_cache()
    tokens = prompts.to(decoder.device)
    for _ in range(max_new):
        new = decoder(tokens, cache=cache)[:, -1].argmax(dim=-1)
        going = (new != stop).cpu()
        for row, token in zip(alive[going].tolist(), new.cpu()[going].tolist(), strict=True):
            continuations[row].append(token)
        if not going.all():
            if not going.any():
                break
            alive = alive[going]
            new = new[going.to(new.device)]
            cache.keep(going.to(new.device))
        tokens = new[:, None]
    return continuations


def greedy_in_groups(
    decoder: Model, prompts: Sequence[Sequence[int]], *, stop: int, max_new: Sequence[int], batch_size: int = 256
) -> list[list[int]]:
    """``greedy`` for prompts of any lengths: those of one length are decoded together, so nothing is ever padded and
    every token stands at its true position."""
    by_length: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(i)
    found: list[list[int]] = [[] for _ in prompts]
    for length, members in by_length.items():
        # Continuations of like length finish together.
        members = sorted(members, key=lambda i: max_new[i])
        step = at_once(batch_size, length, decoder.config.d_vocab)
        for start in range(0, len(members), step):
            group = members[start : start + step]
            longest = max(max_new[i] for i in group)
            texts = greedy(decoder, torch.tensor([list(prompts[i]) for i in group]), stop=stop, max_new=longest)
            for i, text in zip(group, texts, strict=True):
                found[i] = text
    return found
