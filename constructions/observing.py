"""Looking into a decoder for a check: whole sequences, long ones in pieces, or single windows of a long one."""

from collections.abc import Mapping, Sequence

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


def _forward(decoder, tokens, sites, attention, edits, cache):
    seen: dict[str, Tensor] = {}

    def keep(site: str) -> Hook:
        return lambda value: seen.update({site: value.cpu().double()})

    hooks = {**(edits or {}), **{site: keep(site) for site in sites}}
    decoder(tokens.to(decoder.device), hooks=hooks, attention=attention, cache=cache)
    return seen
