"""The shares of the variance of scores that follow from a literal matrix of scores."""

import torch
from jaxtyping import Float64
from torch import Tensor


def shares_within_rows(scores: Float64[Tensor, "query key"]) -> dict[str, float]:
    """The shares of the variance within rows, over the keys up to the query, that "key", "distance" and neither
    ("residual") explain; they sum to 1.

    A part is one free number for each of its values. A linear trend in the key, a i, is a linear trend in the distance
    as well, -a (t - i), but for a t, which is the same in a row. It counts as the distance's: the part "key" has no
    slope over the keys 1…T - 1, each weighted by its number of cells (``probe.attention.split_scores``). As keys and
    distances overlap in a causal triangle all the same, the share of a part is the mean of what it explains first and
    what it explains second (Lindeman, Merenda & Gold 1980):

        share(key) = (R²(key) + R²(key, distance) - R²(distance)) / 2.

    So a bias that depends on the distance alone has a share(distance) of nearly 1, and a residual of 0.
    """
    query, key = torch.tril_indices(*scores.shape)
    y = scores[query, key]
    n = len(scores)
    rows = torch.nn.functional.one_hot(query, n).double()
    parts = {
        name: torch.nn.functional.one_hot(at, n).double() for name, at in (("key", key), ("distance", query - key))
    }
    # The combinations of the keys' columns that are orthogonal to the trend; with distances the trend is theirs.
    cells, at = parts["key"].sum(0), torch.arange(n, dtype=torch.float64)
    trend = torch.where(at > 0, cells * (at - (cells * at)[1:].sum() / cells[1:].sum()), 0.0)
    parts["key"] = parts["key"] @ (torch.eye(n, dtype=torch.float64) - torch.outer(trend, trend) / (trend @ trend))

    def left(*names: str) -> float:
        design = torch.cat([rows, *(parts[name] for name in names)], dim=1)
        fitted = design @ torch.linalg.lstsq(design, y[:, None], driver="gelsd").solution
        return float((y - fitted[:, 0]).square().sum())

    whole, of_key, of_distance, both = left(), left("key"), left("distance"), left("key", "distance")
    key_share = ((whole - of_key) + (of_distance - both)) / 2 / whole
    distance_share = ((whole - of_distance) + (of_key - both)) / 2 / whole
    return {"key": key_share, "distance": distance_share, "residual": both / whole}
