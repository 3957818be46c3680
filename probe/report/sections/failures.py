"""What was asked for and could not be measured."""

import pandas as pd

from probe.report.page import Line, Section
from probe.report.sections.base import Figures, Part, Results
from probe.report.tables import MISSING


def section(results: Results, drawn: Figures) -> Section:
    missing = results.rows[results.rows["metric"].isin(MISSING)]
    columns = [column for column in ("measurement", "model", "metric", "reason") if column in missing]
    return Section(
        "Not measured",
        ["What was skipped because a model or the sequences cannot give what it needs, and what failed."],
        tables=[("Each with its reason.", missing[columns].reset_index(drop=True))] if len(missing) else [],
    )


def lines(results: Results) -> list[Line]:
    failed = results.rows[results.rows["metric"] == "failed"]
    said = [
        f"{r['measurement']}{'' if pd.isna(r['model']) else ' of ' + r['model']}: {r['reason']}"
        for r in failed.to_dict("records")
    ]
    return [Line("Failed", "These measurements failed; the others stand.", said)] if said else []


PART = Part(MISSING, lambda results: {}, section, lines)
