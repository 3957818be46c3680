"""Where heads look when a key is asked for."""

import pandas as pd
import plotly.graph_objects as go

from probe.report.hybrids import plot_attention_by_kind
from probe.report.page import Section
from probe.report.sections.base import Figures, Part, Results, shown
from probe.report.tables import beside_untrained, interval_of


def figures(results: Results) -> dict[str, go.Figure]:
    rows = results.of("needle")
    return {"needle": plot_attention_by_kind(rows, "on_keys")} if len(rows) else {}


def section(results: Results, drawn: Figures) -> Section:
    needle, tables = results.of("needle"), []
    if len(needle):
        trained = needle[(needle["control"] == "none") & needle["metric"].isin(["on_keys"])]
        best = trained.sort_values("value", ascending=False).groupby("model", sort=False).head(5)
        heads = pd.DataFrame(
            {
                "model": best["model"],
                "head": [f"{layer}.{head}" for layer, head in zip(best["layer"], best["head"], strict=True)],
                "layer sees": best["layer_encoding"],
                "on the key": [interval_of(row) for row in best.to_dict("records")],
            }
        )
        tables = [
            ("Means over all heads, in parentheses the untrained model's.", beside_untrained(needle, "metric")),
            ("The heads that attend most to the key (layer.head).", heads),
        ]
    return Section(
        "Looking for a key",
        [
            "A key of five digits stands somewhere in a text, and the text ends with the question for it. What heads "
            "attend to from the last token: the key (on_keys; uniform attention would put on_keys_uniform there), the "
            "first token, the last 16, the rest; reach is the mean attended distance beside that of uniform attention. "
            "That a head attends to the key does not say that the model says it."
        ],
        figures=shown(drawn, {"needle": "Every head's attention on the key, by layer."}),
        tables=tables,
    )


PART = Part(("needle",), figures, section)
