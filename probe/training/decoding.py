"""Greedy decoding, with the model's own cache where it has one."""

from collections.abc import Sequence

import torch
from torch import nn

from probe.errors import ProbeError
from probe.losses import likeliest
from probe.models.anatomy import d_vocab_of
from probe.models.open.ways import as_model
from probe.sequences import TokenIds, token_ids
from probe.training.data import at_once


@torch.no_grad()
def greedy(model: nn.Module, prompts: TokenIds, *, stop: int, max_new: int | Sequence[int]) -> list[list[int]]:
    """The most likely continuation, token by token, of prompts of one length.

    Each continuation ends before the first ``stop`` token, or after ``max_new`` tokens (one number for all, or one for
    each prompt). So what is said of a prompt does not depend on the others. A model without a
    cache that can be had, such as a bridge, computes all of its tokens anew at each step.

    Raises:
        ProbeError: for prompts that are no ids "batch pos", or limits that are not one number of at least 1 for each.
    """
    ids = token_ids(prompts, "prompts")
    most = torch.full((len(ids),), max_new) if isinstance(max_new, int) else torch.tensor([*max_new])
    if most.shape != (len(ids),) or int(most.min()) < 1:
        raise ProbeError(f"max_new must be at least 1, got {max_new} for {len(ids)} prompts")
    continuations: list[list[int]] = [[] for _ in range(len(ids))]
    alive = torch.arange(len(ids))
    view = as_model(model)
    cache, tokens = view.new_cache(), ids.to(view.device)
    for step in range(1, int(most.max()) + 1):
        new = likeliest((model(tokens) if cache is None else model(tokens, cache=cache))[:, -1])
        going = (new != stop).cpu()
        for row, token in zip(alive[going].tolist(), new.cpu()[going].tolist(), strict=True):
            continuations[row].append(token)
        going &= most[alive] > step
        if not going.all():
            if not going.any():
                break
            alive, kept = alive[going], going.to(new.device)
            new, tokens = new[kept], tokens[kept]
            if cache is not None:
                cache.keep(kept)
        tokens = new[:, None] if cache is not None else torch.cat((tokens, new[:, None]), dim=1)
    return continuations


def greedy_in_groups(
    model: nn.Module, prompts: Sequence[Sequence[int]], *, stop: int, max_new: Sequence[int], batch_size: int = 256
) -> list[list[int]]:
    """``greedy`` for prompts of any lengths: those of one length are decoded together, so nothing is ever padded and
    every token stands at its true position. Each ends after its own ``max_new`` tokens, whoever it is decoded with."""
    by_length: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(i)
    found: list[list[int]] = [[] for _ in prompts]
    for length, members in by_length.items():
        # Continuations of like length finish together.
        members = sorted(members, key=lambda i: max_new[i])
        step = at_once(batch_size, length, d_vocab_of(model))
        for start in range(0, len(members), step):
            group = members[start : start + step]
            limits = [max_new[i] for i in group]
            texts = greedy(model, torch.tensor([list(prompts[i]) for i in group]), stop=stop, max_new=limits)
            for i, text in zip(group, texts, strict=True):
                found[i] = text
    return found
