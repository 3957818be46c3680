"""Every number in the tables of docs/verdicts.md comes from the rows that lie beside it."""

import re
from pathlib import Path

import pandas as pd
import pytest

from probe.benchmark import VERDICTS, confusion, verdict_scores

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "verdicts.md").read_text()


def share(row):
    return f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"


def verdict_lines(rows):
    scores = verdict_scores(rows).query("about == ''").set_index(["verdict", "metric"])
    for verdict in VERDICTS:
        cells = [
            share(scores.loc[(verdict, metric)]) if (verdict, metric) in scores.index else "" for metric in
            ("precision", "recall", "accuracy")
        ]  # fmt: skip
        yield f"| `{verdict}` | {' | '.join(cells)} | {scores.loc[(verdict, 'accuracy'), 'n']} |"


def confusion_lines(rows):
    for verdict, of in VERDICTS.items():
        if of.positive is not None:
            table = confusion(rows, verdict)
            for truth, counts in table.iterrows():
                cells = [str(counts.get(said, 0)) for said in (of.positive, f"not {of.positive}")]
                yield f"| `{verdict}` | {truth} | {' | '.join(cells)} |"


def interval_lines(rows):
    for row in rows.to_dict("records"):
        size = ", ".join(f"{row[c]} {c[2:]}" for c in rows if c.startswith("n_") and not pd.isna(row[c]))
        yield f"| {row['metric']} | {row['over']} | {size} | {share(row)} | {row['n']} |"


@pytest.mark.parametrize(
    ("file", "lines"),
    [("verdicts", verdict_lines), ("verdicts", confusion_lines), ("intervals", interval_lines)],
)
def test_every_table_is_made_of_the_rows(file, lines):
    rows = pd.read_parquet(DOCS / "verdicts" / f"{file}.parquet")
    assert "torch" in rows.attrs  # with what they were made
    wanted = [*lines(rows)]
    assert len(wanted) > 3
    missing = [line for line in wanted if line not in PAGE]
    assert not missing, "\n".join(missing)


def test_no_number_of_the_tables_is_from_elsewhere():
    made = {
        line
        for file, lines in (("verdicts", verdict_lines), ("verdicts", confusion_lines), ("intervals", interval_lines))
        for line in lines(pd.read_parquet(DOCS / "verdicts" / f"{file}.parquet"))
    }
    tables = [line for line in PAGE.splitlines() if re.match(r"\| .*\d\.\d{3} \[", line)]
    assert tables and set(tables) <= made
