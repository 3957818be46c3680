"""A table of positions: what a model with learned or sinusoidal positions adds to its embeddings."""

from probe.measure.base import Case, Measurement, Needs
from probe.position import PositionTable, position_table


def _table(case: Case) -> PositionTable:
    return case.once("table", lambda: position_table(case.model, seed=case.seed))


_NEEDS = Needs(table=True)
TABLE = Measurement(
    "dimension and frequencies of the table of positions",
    "no pass",
    lambda case: _table(case).rows,
    "table",
    _NEEDS,
)
TABLE_BASIS = Measurement(
    "principal components of the table of positions",
    "no pass",
    lambda case: _table(case).basis.assign(metric="coordinate"),
    "table",
    _NEEDS,
)
TABLE_MAP = Measurement(
    "how alike the vectors of positions are",
    "no pass",
    lambda case: _table(case).similarity.assign(metric="cosine"),
    "table",
    _NEEDS,
)
