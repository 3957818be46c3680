"""Every claim, run through the model."""

from collections.abc import Iterable, Sequence

import pandas as pd
import torch

from constructions import CONSTRUCTIONS
from constructions.construction import Construction
from probe.errors import ProbeError, unknown_name


def verify(
    constructions: Iterable[str | Construction] | None = None,
    lengths: Sequence[int] = (64, 256, 1024),
    dtypes: Sequence[torch.dtype] = (torch.float64, torch.float32),
    attention: Sequence[str] = ("explicit",),
) -> pd.DataFrame:
    """The rows of ``Construction.check`` for each construction, dtype, length and attention path.

    Args:
        constructions: names in ``CONSTRUCTIONS``, or constructions; all of them by default.
        lengths: tokens in the sequence, ``<bos>`` among them.
        dtypes: of weights and activations.
        attention: the paths of ``Decoder.forward``. A claim about scores or patterns has no row for a path that holds
            none (``Construction.attention_paths``).

    Raises:
        ProbeError: for an unknown name, a dtype or a length for which a construction is not claimed, or if no row
            would come out.
    """
    wanted = CONSTRUCTIONS if constructions is None else constructions
    chosen = [_named(each) if isinstance(each, str) else each for each in wanted]
    tables = [
        construction.check(length, dtype, attention=path)
        for construction in chosen
        for dtype in dtypes
        for length in lengths
        for path in attention
        if path in construction.attention_paths
    ]
    if not tables:
        paths = sorted({path for construction in chosen for path in construction.attention_paths})
        raise ProbeError(
            f"verify wants at least one construction, length, dtype and attention path (of: {', '.join(paths)}), got "
            f"{len(chosen)}, {list(lengths)}, {list(dtypes)} and {list(attention)}"
        )
    return pd.concat(tables, ignore_index=True)


def _named(name: str) -> Construction:
    if name not in CONSTRUCTIONS:
        raise unknown_name("construction", name, CONSTRUCTIONS)
    return CONSTRUCTIONS[name]
