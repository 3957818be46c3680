"""Which keys a query sees, read off its scores, and scores in which hidden keys are -inf."""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from probe.errors import ProbeError


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


def nearest_keys(n_visible: Int[Tensor, "query"]) -> Bool[Tensor, "query key"]:
    """True where query t sees key i because it is one of its ``n_visible[t]`` nearest, its own included."""
    distance = torch.arange(len(n_visible), device=n_visible.device)[:, None] - torch.arange(
        len(n_visible), device=n_visible.device
    )
    return (distance >= 0) & (distance < n_visible[:, None])


def window_mask(window: int | None, n: int) -> Bool[Tensor, "1 1 query key"]:
    """The mask of a sliding window over n keys; all keys up to the query's own where it is None."""
    return nearest_keys(torch.arange(1, n + 1).clamp(max=window or n))[None, None]


def sliding_window(visible: Bool[Tensor, "query key"]) -> int | None:
    """How many keys each query sees at most: all n of them where nothing is hidden but the future. None for any other
    mask than a causal one or a sliding window."""
    n_visible = visible.sum(-1)
    window = int(n_visible.max())
    nearest = nearest_keys(torch.arange(1, len(visible) + 1, device=visible.device).clamp(max=window))
    return window if torch.equal(visible, nearest) else None


def window_of(visible: Bool[Tensor, "batch head query key"], layer: int) -> int | None:
    """The width of a layer's sliding window; None where each query sees all keys up to its own.

    Raises:
        ProbeError: where keys are hidden otherwise, or not the same ones in every sequence and head.
    """
    alike = torch.equal(visible, visible[:1, :1].expand_as(visible))
    window = sliding_window(visible[0, 0]) if alike else None
    if window is None:
        raise ProbeError(f"streaming needs a causal mask or a sliding window, but layer {layer} hides other keys")
    return None if window == visible.shape[-1] else window


def joined_masks(hidden: Mapping[int, list[Tensor | None]], n: int, batch_size: int) -> dict[int, Tensor]:
    """The masks of all batches together, by layer; layers whose mask is plainly causal are left out."""
    found = {}
    for layer, parts in hidden.items():
        masks = [part for part in parts if part is not None]
        if not masks:
            continue
        if len(masks) == len(parts) and all(m.shape[:2] == (1, 1) and torch.equal(m, masks[0]) for m in masks):
            found[layer] = masks[0]
            continue
        n_query, n_heads = masks[0].shape[2], max(mask.shape[1] for mask in masks)
        causal = torch.ones(1, 1, n_query, n_query, dtype=torch.bool).tril()
        sizes = [min(batch_size, n - start) for start in range(0, n, batch_size)]
        each = [
            (causal if m is None else m).expand(size, n_heads, -1, -1) for m, size in zip(parts, sizes, strict=True)
        ]
        found[layer] = torch.cat(each)
    return found
