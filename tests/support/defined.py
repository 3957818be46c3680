"""Which names in rows have no definition."""

from probe.report.glossary import definition_of
from probe.rows import check_rows

# The columns whose values are names of this toolkit's own.
NAMES = (
    *("measurement", "metric", "control", "scope", "template", "target", "mechanism", "verdict", "intervention"),
    *("probe", "part", "aggregate", "split", "label", "used_for", "variant", "concept", "layer_encoding"),
)


def undefined(rows):
    """(name, column) of every value in ``NAMES``, and (column, None) of every column, without a definition."""
    check_rows(rows)
    values = [(str(v), column) for column in NAMES if column in rows for v in rows[column].dropna().unique()]
    # "none - rotary" is the difference of two values that have one.
    values = [(part, column) for v, column in values for part in v.split(" - ")]
    return [(name, of) for name, of in [*values, *((c, None) for c in rows.columns)] if definition_of(name, of) is None]
