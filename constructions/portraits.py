"""A construction as rows that can be drawn: its matrices, its attention, what it writes, and its error by position."""

from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from constructions.construction import Construction
from constructions.layout import POSITION
from constructions.weights import head_weights
from probe.deprecation import old_field
from probe.models.decoder import Decoder
from probe.shown import Shown
from probe.tracing import PATTERN, block_site, trace


@dataclass(frozen=True)
class Portrait(Shown):
    """Rows for ``probe.report.plot_construction_portrait`` and ``plot_construction_matrices``.

    ``matrices``: layer, matrix ("head 0, W_V", "MLP, W_in"), n_rows, n_columns, row, column, weight, those that are not
    0. ``attention``: layer, head, query, key, weight, of heads that have any weight. ``stream``: t (1 at ``<bos>``),
    site, value of the stream's position row. ``rows``: t, quantity, error.
    """

    matrices: pd.DataFrame
    attention: pd.DataFrame
    stream: pd.DataFrame
    rows: pd.DataFrame
    errors = old_field("errors", "rows")


def portrait(construction: Construction, length: int = 64, dtype: torch.dtype = torch.float64) -> Portrait:
    """Run a construction on a sequence of that length and gather what can be seen of it.

    Raises:
        ProbeError: for a dtype it was not made for, or a length that it does not claim.
    """
    decoder = construction.build(length, dtype)
    tokens = construction.tokens(length)
    layers = range(decoder.config.n_layers)
    at_work = [(layer, head) for layer in layers for head in range(decoder.config.n_heads)
               if any(matrix.any() for matrix in head_weights(decoder, layer, head))]  # fmt: skip
    sites = [block_site(layer, site) for layer in layers for site in ("hook_resid_mid", "hook_resid_post")]
    traced = trace(decoder, tokens, [*sites, PATTERN])
    query, key = torch.tril_indices(length, length)
    attention = [
        pd.DataFrame(
            {
                "layer": layer,
                "head": head,
                "query": query.numpy(),
                "key": key.numpy(),
                "weight": traced.pattern(layer)[0, head, query, key].double().numpy(),
            }
        )
        for layer, head in at_work
    ]
    t = torch.arange(1, length + 1).numpy()
    stream = [
        pd.DataFrame({"t": t, "site": site, "value": traced.hidden(site)[0, :, POSITION].double().numpy()})
        for site in sites
    ]
    looked_at, errors = construction.errors(decoder, tokens, construction.attention_paths[0])
    by_position = [
        pd.DataFrame({"t": looked_at.numpy(), "quantity": quantity, "error": error.double().numpy()})
        for quantity, error in errors.items()
    ]
    return Portrait(
        _matrices(decoder),
        pd.concat(attention, ignore_index=True),
        pd.concat(stream, ignore_index=True),
        pd.concat(by_position, ignore_index=True),
    )


def _matrices(decoder: Decoder) -> pd.DataFrame:
    parts = []
    for layer, block in enumerate(decoder.layers):
        named: dict[str, Tensor] = {}
        for head in range(decoder.config.n_heads):
            weights = head_weights(decoder, layer, head)
            named |= {f"head {head}, {name}": matrix for name, matrix in weights._asdict().items()}
        named["MLP, W_in"] = block.mlp.up_proj.weight.T
        named["MLP, W_out"] = block.mlp.down_proj.weight.T
        for name, matrix in named.items():
            row, column = matrix.detach().nonzero(as_tuple=True)
            if len(row):
                weight = matrix.detach()[row, column].double().numpy()
                parts.append(
                    pd.DataFrame(
                        {
                            "layer": layer,
                            "matrix": name,
                            "n_rows": matrix.shape[0],
                            "n_columns": matrix.shape[1],
                            "row": row.numpy(),
                            "column": column.numpy(),
                            "weight": weight,
                        }
                    )
                )
    return pd.concat(parts, ignore_index=True)
