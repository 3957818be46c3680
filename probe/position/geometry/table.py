"""The table of positions that a model adds to its embeddings: how many dimensions, how smooth, how alike neighbours."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float64
from scipy.fft import dct
from torch import Tensor, nn

from probe.config import check_size
from probe.errors import ProbeError
from probe.models.anatomy import our_decoder
from probe.models.encodings.absolute import Learned, Sinusoidal
from probe.models.twins import untrained_twin
from probe.shown import Shown

SMOOTH = 0.9  # the share of the variance for which the lowest frequencies are counted
MAP_BINS = 128  # pooled positions of the similarity map, at most

COLUMNS = ["control", "metric", "position", "lag", "value", "low", "high", "n"]


@dataclass(frozen=True)
class PositionTable(Shown):
    """``rows``, one row a number; ``basis``, the table along its principal components; ``similarity``, a map."""

    rows: pd.DataFrame
    basis: pd.DataFrame
    similarity: pd.DataFrame


def has_position_table(model: nn.Module) -> bool:
    """Whether a model adds a vector of its position, learned or sinusoidal, to each embedding."""
    decoder = our_decoder(model)
    return decoder is not None and isinstance(decoder.encoding, (Learned, Sinusoidal))


def position_table(
    model: nn.Module, *, components: int = 4, n_shuffles: int = 100, confidence: float = 0.95, seed: int = 0
) -> PositionTable:
    """Describe the table E, "n_ctx d_model", that a model adds to its embeddings; Ē is E less its mean over positions.

    Metrics:

    - "norm", by position: ‖E_p‖;
    - "participation_ratio": (Σ λ)² / Σ λ², λ the eigenvalues of the covariance of E over positions, in [1, d_model];
    - "components_95": the least number of principal components with 95 % of the variance;
    - "low_frequencies_90": the share of the frequencies of a cosine transform (DCT-II) along positions, from the lowest
      on, that have 90 % of the variance, in (0, 1]: .9 for white noise, little for a smooth curve;
    - "similarity", by lag k: the mean over p of cos(Ē_p, Ē_{p+k}), in [-1, 1].

    Controls: "shuffled", the same vectors at permuted positions, and "untrained", a fresh table of this architecture.
    A table is one thing and no sample, so that it has no interval; those of "shuffled" are over permutations.

    Args:
        components: principal components in ``basis``.
        n_shuffles: permutations.

    Returns:
        ``rows`` with the columns control, metric, position, lag, value, low, high, n (permutations; 1 for a table);
        ``basis`` with control, component, share, position, value; and ``similarity``, cos(Ē_p, Ē_q) with the columns
        position, other, value, means over blocks of positions where there are more than 128.

    Raises:
        ProbeError: for a model that adds no such table (``has_position_table``), fewer than 4 positions, or a table
            that is not finite or the same everywhere.
    """
    check_size("n_shuffles", n_shuffles)
    table, fresh = _table(model), _table(untrained_twin(model, seed))
    rng = np.random.default_rng(seed)
    order = [torch.from_numpy(rng.permutation(len(table))) for _ in range(n_shuffles)]
    numbers, tail = _dimensions(table), (1 - confidence) / 2
    # In how many dimensions the vectors lie, their order does not say.
    draws = {name: each.expand(n_shuffles, -1) for name, each in numbers.items() if name != "norm"}
    along = [_along_positions(table[o]) for o in order]
    draws |= {name: torch.stack([each[name] for each in along]) for name in along[0]}
    parts = [
        _frame(numbers | _along_positions(table), "none"),
        _frame(_dimensions(fresh) | _along_positions(fresh), "untrained"),
    ]
    low, high = ({name: each.quantile(q, dim=0) for name, each in draws.items()} for q in (tail, 1 - tail))
    means = _frame({name: each.mean(0) for name, each in draws.items()}, "shuffled")
    parts.append(means.assign(low=_frame(low, "")["value"], high=_frame(high, "")["value"], n=n_shuffles))
    basis = [_basis(each, components).assign(control=c) for c, each in (("none", table), ("untrained", fresh))]
    return PositionTable(
        pd.concat(parts, ignore_index=True)[COLUMNS], pd.concat(basis, ignore_index=True), _similarity_map(table)
    )


def _table(model: nn.Module) -> Float64[Tensor, "pos d_model"]:
    decoder = our_decoder(model)
    encoding = None if decoder is None else decoder.encoding
    if not isinstance(encoding, Learned | Sinusoidal):
        raise ProbeError(
            f"a model with a learned or sinusoidal table of positions was wanted, got {type(model).__name__} without"
        )
    if encoding.n_ctx < 4:
        raise ProbeError(f"a table of at least 4 positions was wanted, got {encoding.n_ctx}")
    table = encoding.weight if isinstance(encoding, Learned) else encoding.table(torch.arange(encoding.n_ctx))
    table = table.detach().cpu().double()
    if not table.isfinite().all():
        raise ProbeError("a table of positions must be finite, got NaN or infinity")
    if not (table != table[0]).any():
        raise ProbeError("a table of positions must differ between positions, got one vector everywhere")
    return table


def _dimensions(table: Float64[Tensor, "pos d_model"]) -> dict[str, Float64[Tensor, "value"]]:
    spectrum = torch.linalg.svdvals(table - table.mean(0)).square()
    return {
        "norm": table.norm(dim=1),
        "participation_ratio": (spectrum.sum().square() / spectrum.square().sum())[None],
        "components_95": _enough(spectrum, 0.95),
    }


def _along_positions(table: Float64[Tensor, "pos d_model"]) -> dict[str, Float64[Tensor, "value"]]:
    centred = table - table.mean(0)
    power = torch.from_numpy(dct(centred.numpy(), axis=0, norm="ortho")).square().sum(1)[1:]  # 0 is the mean
    unit = torch.nn.functional.normalize(centred, dim=1)
    cosines = unit @ unit.T
    return {
        "low_frequencies_90": _enough(power, SMOOTH) / len(power),
        "similarity": torch.stack([cosines.diagonal(k).mean() for k in range(1, len(table) // 2 + 1)]),
    }


def _enough(parts: Float64[Tensor, "part"], share: float) -> Float64[Tensor, "1"]:
    """How many of the parts, from the first on, have that share of their sum."""
    return 1 + (parts.cumsum(0) < share * parts.sum()).sum()[None].double()


def _frame(numbers: dict[str, Float64[Tensor, "value"]], control: str) -> pd.DataFrame:
    parts = []
    for metric, values in numbers.items():
        along = {"norm": ("position", 0), "similarity": ("lag", 1)}.get(metric)
        keys = {"position": pd.NA, "lag": pd.NA}
        if along is not None:
            keys[along[0]] = range(along[1], along[1] + len(values))
        parts.append(pd.DataFrame({"metric": metric, **keys, "value": values.numpy()}))
    frame = pd.concat(parts, ignore_index=True).astype({"position": "Int64", "lag": "Int64"})
    return frame.assign(control=control, low=np.nan, high=np.nan, n=1)


def _basis(table: Float64[Tensor, "pos d_model"], components: int) -> pd.DataFrame:
    U, S, _ = torch.linalg.svd(table - table.mean(0), full_matrices=False)
    along = (U * S)[:, :components]
    along = along * torch.where(along[-1] < 0, -1.0, 1.0)  # a component's sign is free
    share = S.square() / S.square().sum()
    return pd.concat(
        pd.DataFrame({"component": c, "share": float(share[c]), "position": range(len(table)), "value": along[:, c]})
        for c in range(along.shape[1])
    )


def _similarity_map(table: Float64[Tensor, "pos d_model"]) -> pd.DataFrame:
    unit = torch.nn.functional.normalize(table - table.mean(0), dim=1)
    cosines, size = unit @ unit.T, -(-len(table) // MAP_BINS)
    starts = torch.arange(0, len(table), size)
    blocks = (torch.arange(len(table)) // size)[None] == torch.arange(len(starts))[:, None]
    mean = blocks.double() / blocks.sum(1, keepdim=True)
    pooled = mean @ cosines @ mean.T
    position, other = (grid.flatten() for grid in torch.meshgrid(starts, starts, indexing="ij"))
    return pd.DataFrame({"position": position, "other": other, "value": pooled.flatten()})
