"""Results as a notebook shows them: each table by its first rows, the rest in a line."""

import dataclasses
import html
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FIRST = 5  # rows of a table
LONGEST = 200  # characters of anything else
SMALL = 24  # rows and columns of a matrix that is shown whole


@dataclass(frozen=True)
class Shown:
    """A frozen dataclass whose value Jupyter draws as HTML. Everything in it is escaped."""

    def _repr_html_(self) -> str:
        parts = [f"<b>{html.escape(type(self).__name__)}</b>"]
        for each in dataclasses.fields(self):
            said, table = _in_words(getattr(self, each.name))
            parts.append(f"<div><code>{html.escape(each.name)}</code> {html.escape(said)}</div>{table}")
        return "".join(parts)


def _in_words(value: Any) -> tuple[str, str]:
    """What a value is, in a line, and what of it can be shown as a table."""
    import pandas as pd
    import torch

    if isinstance(value, pd.DataFrame):
        more = f", the first {FIRST}" if len(value) > FIRST else ""
        return f"{len(value):,} rows{more}", value.head(FIRST).to_html(index=False, border=0)
    if isinstance(value, torch.Tensor):
        small = value.ndim == 2 and max(value.shape) <= SMALL
        table = pd.DataFrame(value.detach().cpu().float().numpy()).to_html(border=0) if small else ""
        return f"{tuple(value.shape)}, {str(value.dtype).removeprefix('torch.')}", table
    if dataclasses.is_dataclass(value):
        value = {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
    elif hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_in_words(of)[0]}" for key, of in value.items()) or "nothing", ""
    text = repr(value)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…", ""
