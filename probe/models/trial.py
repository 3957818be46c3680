"""What trying a model needs: tokens, how far rounding goes, and whether two computations agree."""

import torch
from jaxtyping import Int
from torch import Tensor

from probe.errors import ProbeError

# The largest error that is rounding, relative to the largest number, by dtype: in float32 some 1e-6 is usual.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}

N_TOKENS = 24

# Of one state repeated, the scores of a row differ by more than this, relative to the largest, where a layer sees
# position; where it does not, they differ by rounding, which in half precision is much.
_DIFFERENT = {torch.float64: 1e-6, torch.float32: 1e-3}
_DIFFERENT_IN_HALF = 5e-2


def random_tokens(d_vocab: int, n_ctx: int | None, device: torch.device) -> Int[Tensor, "batch pos"]:
    """Tokens on which a model is tried: two sequences, always the same, of ``N_TOKENS`` or as many as it takes."""
    length = min(N_TOKENS, n_ctx or N_TOKENS)
    if length < 1 or d_vocab < 1:
        raise ProbeError(f"a model must take tokens at positions, got {d_vocab} tokens and {n_ctx} positions")
    return torch.randint(d_vocab, (2, length), generator=torch.Generator().manual_seed(0)).to(device)


def tolerance(x: Tensor) -> float:
    """The largest error, relative to the largest number, that is rounding in the dtype of these numbers."""
    return TOLERANCES.get(x.dtype, TOLERANCES[torch.float16])


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """The largest difference, relative to the largest number that was wanted."""
    return float((got.float() - wanted.float()).abs().max() / wanted.float().abs().max())


def agree(got: Tensor, wanted: Tensor, what: str) -> None:
    """Refuse an error that is no rounding, relative to the largest number."""
    most = max(tolerance(got), tolerance(wanted))
    error = relative_error(got, wanted)
    if not error <= most:
        raise ProbeError(f"{what} must agree to {most:g}, got a relative error of {error:.2g}")


def least_difference(dtype: torch.dtype) -> float:
    """The least difference of a row's scores, relative to the largest, that no rounding makes in that dtype."""
    return _DIFFERENT.get(dtype, _DIFFERENT_IN_HALF)
