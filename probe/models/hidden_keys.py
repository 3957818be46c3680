"""Which keys a query sees, read off its scores, and scores in which hidden keys are -inf."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def hide_keys(scores: Float[Tensor, "batch head query key"]) -> Float[Tensor, "batch head query key"]:
    """Scores with -inf at every hidden key.

    transformers hides keys of the future, and those that a sliding window has left behind, by the lowest finite number
    of the dtype, which it adds to their scores or puts in their place; a bridge does so for the future.
    """
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(future | (scores < torch.finfo(scores.dtype).min / 2), -torch.inf)


def mask_of_scores(scores: Float[Tensor, "batch head query key"]) -> Bool[Tensor, "#batch #head query key"] | None:
    """True where a key up to the query's own has a score above -inf, with batch and head of size 1 where all agree.
    None for the plain causal mask. Scores of future keys are not read."""
    seen = (scores != -torch.inf).tril()
    together = seen[:1, :1]
    if not torch.equal(seen, together.expand_as(seen)):
        return seen.cpu()
    causal = torch.ones(seen.shape[-2:], dtype=torch.bool, device=seen.device).tril()
    return None if torch.equal(together[0, 0], causal) else together.cpu()


def hides_by_numbers(scores: Tensor) -> bool:
    """Whether some key is hidden by the lowest finite number and not by -inf: scores as a bridge hands them out."""
    return bool(((scores < torch.finfo(scores.dtype).min / 2) & (scores > -torch.inf)).any())
