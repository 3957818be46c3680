"""All that a folder has of models: the rows of its stages, what is drawn, and what was not measured."""

from collections.abc import Mapping, Sequence

import pandas as pd

from probe.attention import by_layer_encoding
from probe.errors import ProbeError, one_line
from probe.files import read_rows
from probe.measure.base import Case
from probe.measure.plan import Missing, stage_of
from probe.measure.registry import MEASUREMENTS
from probe.models.anatomy import layers_of
from probe.models.protocol import Layer
from probe.report.sections import Results
from probe.report.tables import MISSING
from probe.runs import RunFolder

# What is split by what a layer sees, in models whose layers are of two kinds.
BY_KIND = {
    "needle": ("on_keys", "on_first", "on_recent", "elsewhere", "reach"),
    "census": ("induction", "sink", "previous_token", "window", "content", "uniform"),
}
#: The columns that come first. Rows of any measurements have them together.
KEYS = ("measurement", "model", "encoding")


def collect(
    run: RunFolder, cases: Sequence[Case], missing: Sequence[Missing] = (), *, train_length: int | None = None
) -> Results:
    """All that a folder has of these models: the rows, with measurement, model, encoding and data; and what is drawn.

    A stage that failed, or whose rows are not those that were written, is one row with the reason.

    Args:
        run: the folder.
        cases: the models.
        missing: what was not measured, each of which becomes a row with its reason.
        train_length: of the models, where it is known.
    """
    missing, parts = list(missing), []
    drawings: dict[str, dict[str, pd.DataFrame]] = {}
    for name, each in MEASUREMENTS.items():
        for case in [None] if each.between else cases:
            # Models are compared with each other on the same tokens, so any of theirs says which.
            keys = {"measurement": name, "data": (case or cases[0]).traced.data}
            rows = _read(run, name, case, missing)
            if rows is None:
                continue
            if case is None:
                parts.append(rows.assign(**keys))
                continue
            if each.drawn:
                drawings.setdefault(name, {})[case.name] = rows
                continue
            keys |= {"model": case.name, "encoding": case.encoding}
            parts.append(with_layers(rows.assign(**keys), layers_of(case.model)))
            if name in BY_KIND:
                parts += _by_kind(rows, name, keys)
    if missing:
        data = {case.name: case.traced.data for case in cases}
        told = pd.DataFrame(missing)
        parts.append(told.assign(data=[data.get(m, cases[0].traced.data) for m in told["model"]]))
    rows = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
    rows = rows.reindex(columns=list(dict.fromkeys([*KEYS, *rows.columns, "data", "metric"])))
    for column in ("layer", "head"):  # missing where a row is of a model
        rows[column] = rows[column].astype("Int64") if column in rows else pd.Series(pd.NA, rows.index, "Int64")
    return Results(rows, drawings, train_length)


def with_layers(rows: pd.DataFrame, layers: Sequence[Layer]) -> pd.DataFrame:
    """The rows, those about a layer with what that layer is: layer_kind, layer_encoding, layer_window (missing without
    one) and layer_sink.

    Args:
        rows: with a column ``layer``, or ``site`` with names such as "blocks.0.hook_resid_post"; others stay as they
            are.
        layers: of the model.
    """
    if "layer" in rows:
        index = rows["layer"]
    elif "site" in rows:
        index = rows["site"].str.extract(r"^blocks\.(\d+)\.", expand=False)
    else:
        return rows
    index = pd.to_numeric(index).astype("Int64")
    by_layer = pd.DataFrame(
        {
            "layer_kind": [layer.kind for layer in layers],
            "layer_encoding": [layer.encoding for layer in layers],
            "layer_window": pd.array([layer.window for layer in layers], "Int64"),
            "layer_sink": pd.array([layer.sink for layer in layers], "boolean"),
        }
    )
    of = by_layer.reindex(index).set_index(rows.index)
    return rows.assign(**{name: of[name] for name in of})


def _read(run: RunFolder, name: str, case: Case | None, missing: list[Missing]) -> pd.DataFrame | None:
    """The rows of a stage; None where there are none. A stage that cannot be read becomes one that failed."""
    model = None if case is None else case.name
    stage = stage_of(name, model)
    if not run.file_of(stage).exists() or (name, model) in {(m.measurement, m.model) for m in missing}:
        return None
    try:
        return run.rows(stage)
    except ProbeError as error:
        missing.append(Missing(name, model, "failed", one_line(error)))
        return None


def missing_earlier(run: RunFolder) -> list[Missing]:
    """What an earlier run in this folder said that it did not measure."""
    try:
        rows = read_rows(run.path / "rows.parquet")
    except (OSError, ProbeError):  # there was none that came to its end
        return []
    if not {*Missing._fields} <= {*rows.columns}:
        return []
    rows = rows.loc[rows["metric"].isin(MISSING), list(Missing._fields)].astype(object)
    return [Missing(*row) for row in rows.where(rows.notna(), None).itertuples(index=False)]


def _by_kind(rows: pd.DataFrame, name: str, keys: Mapping[str, str]) -> list[pd.DataFrame]:
    trained = rows[rows["control"] == "none"]
    if "layer_encoding" not in trained or trained["layer_encoding"].nunique() < 2:
        return []
    found = by_layer_encoding(trained, BY_KIND[name])
    return [found.assign(**{**keys, "measurement": "by_layer_encoding", "of": name})]
