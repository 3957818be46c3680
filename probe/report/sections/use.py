"""Whether position is used: what erasing it costs."""

import math

import pandas as pd
import plotly.graph_objects as go

from probe.report.cells import Told
from probe.report.drawing import short_site
from probe.report.page import Section
from probe.report.position import plot_erasure_losses
from probe.report.sections.base import Figures, Part, Results, shown
from probe.report.tables import beside, by_model, known, of


def figures(results: Results) -> dict[str, go.Figure]:
    rows = results.of("use")
    return {"use": plot_erasure_losses(rows)} if len(rows) else {}


def section(results: Results, drawn: Figures) -> Section:
    caption = (
        "Change of the loss before each layer, in parentheses that of random subspaces; p is the share of them "
        "(position's own included) that cost as much."
    )
    return Section(
        "Is position used?",
        [
            "That position can be read does not say that the model reads it. Here it is taken out of the stream "
            "before each layer by least-squares concept erasure (LEACE, Belrose et al. 2023), after which no "
            "linear regression (position, one direction) or no linear classifier (classes, up to one direction a "
            "position) finds it. Position 0 is left alone, since its token tells its position already, and so is "
            "the mean state of each token. The grey lines are means of random subspaces of the same rank, "
            "orthogonal to position's (and, for one direction, to its first four powers), where there are any. The "
            "loss is that of "
            "the tokens that the model learns to predict, given the right ones before, on held-out sequences; "
            "95 % bootstrap, paired. Where erasing position costs more than erasing anything else of its size, it "
            "was used. Before layer 0 a model without position embeddings has nothing but its tokens, so that "
            "nothing is erased there."
        ],
        figures=shown(drawn, {"use": "Change of the loss, nats a token."}),
        tables=[(caption, use_table(results.rows))] if drawn.get("use") else [],
    )


def use_table(rows: pd.DataFrame) -> pd.DataFrame:
    """The change of the loss by site and concept, one column per model."""
    use = of(rows, "use", metric="loss")
    values = use.pivot_table(index=["site", "concept"], columns=["model", "control"], values="value", sort=False)
    p = use.get("p", pd.Series(dtype=float)).groupby([use[k] for k in ("site", "concept", "model")]).min()
    encodings = list(dict.fromkeys(use["model"]))

    def cell(site: str, concept: str, encoding: str, row: pd.Series) -> Told:
        loss, random = row[encoding, "none"], row.get((encoding, "random"), math.nan)
        share = p.get((site, concept, encoding), math.nan)
        told = beside(loss, random, "random")
        text = f"{told}, p {share:.2f}" if pd.notna(share) else str(told)
        return Told(text, known({"": loss, "random": random, "p": share}))

    found = [
        {"site": short_site(site), "concept": concept}
        | {e: cell(site, concept, e, row) for e in encodings if pd.notna(row.get((e, "none")))}
        for (site, concept), row in values.iterrows()
    ]
    return by_model(found, ["site", "concept", *encodings])


PART = Part(("use",), figures, section)
