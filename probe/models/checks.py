"""What every model refuses before it runs."""

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor

from probe.errors import ProbeError, unknown_name

ATTENTION_PATHS = ("auto", "explicit", "fused")


def check_call(
    tokens: Tensor, hooked: Collection[str], attention: str, config: Any, whose: str, in_layers: Sequence[str]
) -> None:
    """Refuse tokens that are no ids of shape (batch, pos), a site that the model has not, and an unknown attention
    path. ``in_layers`` are the names of the sites of a layer, for the message."""
    if tokens.ndim != 2 or tokens.is_floating_point():
        raise ProbeError(f"tokens must be integers of shape (batch, pos), got {tokens.dtype} {tuple(tokens.shape)}")
    if tokens.numel() == 0:
        raise ProbeError(f"tokens must hold at least one sequence of one token, got shape {tuple(tokens.shape)}")
    if attention not in ATTENTION_PATHS:
        raise unknown_name("attention path", attention, ATTENTION_PATHS)
    # Elsewhere than on the CPU this would wait for the device at every call; there the kernel asserts it.
    if tokens.device.type == "cpu":
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= config.d_vocab:
            raise ProbeError(f"token ids must lie in 0…{config.d_vocab - 1}, got {low}…{high}")
    sites = config.sites() if hooked else ()
    for site in hooked:
        if site not in sites:
            raise ProbeError(
                f"unknown site {site!r}; {whose} sites: hook_embed, blocks.<layer>.<one of {', '.join(in_layers)}> for "
                f"layers 0…{config.n_layers - 1}"
            )
