"""What every model refuses before it runs."""

from collections.abc import Collection, Sequence
from typing import Any

from jaxtyping import Int
from torch import Tensor

from probe.errors import ProbeError, unknown_name
from probe.sequences import TokenIds, check_ids, token_ids

ATTENTION_PATHS = ("auto", "explicit", "fused")


def check_call(
    tokens: TokenIds, hooked: Collection[str], attention: str, config: Any, whose: str, in_layers: Sequence[str]
) -> Int[Tensor, "batch pos"]:
    """The tokens as int64 ids. Refuses what are no ids of shape (batch, pos), a site that the model has not, and an
    unknown attention path. ``in_layers`` are the names of the sites of a layer, for the message."""
    ids = token_ids(tokens)
    if attention not in ATTENTION_PATHS:
        raise unknown_name("attention path", attention, ATTENTION_PATHS)
    # Elsewhere than on the CPU this would wait for the device at every call; there the kernel asserts it.
    if ids.device.type == "cpu":
        check_ids(ids, config.d_vocab)
    sites = config.sites() if hooked else ()
    for site in hooked:
        if site not in sites:
            raise ProbeError(
                f"unknown site {site!r}; {whose} sites: hook_embed, blocks.<layer>.<one of {', '.join(in_layers)}> for "
                f"layers 0…{config.n_layers - 1}"
            )
    return ids
