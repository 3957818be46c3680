"""Looking into a decoder for a check: whole sequences, long ones in pieces, or single windows of a long one."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probe.models.decoder import Decoder, Hook, KVCache

# Where the hidden units of a whole sequence would be more numbers than this, it is run in pieces.
MAX_HIDDEN = 2**27


@torch.no_grad()
def observe(
    decoder: Decoder,
    tokens: Int[Tensor, "1 pos"],
    sites: Sequence[str],
    *,
    attention: str = "explicit",
    edits: Mapping[str, Hook] | None = None,
    cache: KVCache | None = None,
) -> dict[str, Float[Tensor, "..."]]:
    """The values at ``sites`` in one forward pass, float64, on the CPU, with ``edits`` made at other sites.

    ``probe.trace`` does this for measurements; a check must also choose the attention path and edit on the way. Long
    sequences go through wide MLPs in pieces, the keys and values of the earlier ones in a cache.
    """
    piece = max(1, MAX_HIDDEN // decoder.config.d_mlp)
    looks_at_scores = any(site.endswith(("hook_attn_scores", "hook_pattern")) for site in sites)
    if tokens.shape[1] <= piece or looks_at_scores or edits or cache is not None:
        return _forward(decoder, tokens, sites, attention, edits, cache)
    cache = KVCache()
    pieces = [_forward(decoder, part, sites, attention, None, cache) for part in tokens.split(piece, dim=1)]
    return {site: torch.cat([each[site] for each in pieces], dim=1) for site in sites}


def _forward(
    decoder: Decoder,
    tokens: Tensor,
    sites: Sequence[str],
    attention: str,
    edits: Mapping[str, Hook] | None,
    cache: KVCache | None,
) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}

    def keep(site: str) -> Hook:
        return lambda value: seen.update({site: value.cpu().double()})

    hooks = {**(edits or {}), **{site: keep(site) for site in sites}}
    decoder(tokens.to(decoder.device), hooks=hooks, attention=attention, cache=cache)
    return seen


@torch.no_grad()
def query_windows(
    decoder: Decoder,
    tokens: Int[Tensor, "1 pos"],
    sites: Sequence[str],
    attention: str,
    *,
    whole: int = 512,
    windows: int = 32,
    width: int = 8,
) -> Iterator[tuple[Int[Tensor, "query"], dict[str, Float[Tensor, "..."]]]]:
    """The 0-based positions of some queries, and the values at ``sites`` for them; scores and patterns among them.

    Up to ``whole`` tokens these are all queries at once. Of longer sequences no matrix of scores could be held: their
    keys and values are computed in one pass by ``attention``, and windows of queries, spread evenly with one at the
    end, are then run again on what the cache holds of the tokens before them.
    """
    length = tokens.shape[1]
    if length <= whole:
        yield torch.arange(length), observe(decoder, tokens, sites)
        return
    cache = KVCache()
    decoder(tokens.to(decoder.device), attention=attention, cache=cache)
    for start in torch.linspace(0, length - width, windows).long().tolist():
        part = tokens[:, start : start + width]
        yield torch.arange(start, start + width), observe(decoder, part, sites, cache=cache.first(start))
