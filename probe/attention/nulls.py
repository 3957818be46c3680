"""What a head's distance from a template is to be held against: heads without any order of keys, and other seeds."""

import numpy as np
import torch
from jaxtyping import Float64, Int
from torch import Tensor

from probe.attention.distances import pattern_distance
from probe.attention.head_pairs import head_pair_distances


def shuffled(
    pattern: Float64[Tensor, "batch head query key"], n_visible: Int[Tensor, "query"], generator: np.random.Generator
) -> Float64[Tensor, "batch head query key"]:
    """In each row the weights on the keys that are seen, in random order, drawn anew for each row, head and sequence.

    The rows keep their entropy and lose whatever order their keys had.
    """
    keys = pattern.numpy(force=True).copy()
    for t, n in enumerate(n_visible.tolist()):
        seen = (..., t, slice(t + 1 - n, t + 1))
        keys[seen] = generator.permuted(keys[seen], axis=-1)
    return torch.from_numpy(keys)


def nearest_head_distance(
    pattern: Float64[Tensor, "batch head query key"],
    other: Float64[Tensor, "batch other_head query key"],
    lengths: Int[Tensor, "batch"],
    chosen_on: slice,
    measured_on: slice,
    distance: str,
    sink: bool = False,
) -> Float64[Tensor, "measured head"]:
    """D of each head from the one of ``other`` that is nearest on the sequences ``chosen_on``, on ``measured_on``."""
    pairs = head_pair_distances(pattern[chosen_on], other[chosen_on], distance, lengths[chosen_on], sink=sink)
    nearest = pairs.mean(0).argmin(-1)
    measured = (pattern[measured_on], other[measured_on][:, nearest])
    return pattern_distance(*measured, distance, lengths[measured_on], sink=sink)
