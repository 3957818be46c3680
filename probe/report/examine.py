"""The page of models that others trained: what a study's page says of them, and what only they have."""

from collections.abc import Mapping

import pandas as pd

from probe.report.accuracy import plot_under_shift
from probe.report.attention_sections import attention_explained, attention_figures, attention_sections
from probe.report.hybrids import plot_attention_by_kind
from probe.report.page import Line, Made, Section, render_page
from probe.report.position import plot_loss_along_texts
from probe.report.position_sections import position_figures, position_read, position_sections
from probe.report.position_table import plot_table_curves, plot_table_map
from probe.report.tables import beside_untrained, interval_of, of


def examine_page(
    rows: pd.DataFrame,
    maps: Mapping[str, pd.DataFrame],
    curves: Mapping[str, pd.DataFrame],
    about: pd.DataFrame,
    made: Made,
) -> str:
    """The report as one HTML file.

    Args:
        rows: those of ``rows.parquet``.
        maps, curves: attention maps and curves of the scores' split, by model.
        about: a row a model: what it is and how it was loaded.
        made: how it was made; its settings are those of ``examine.json``.
    """
    drawn = {**position_figures(rows), **attention_figures(rows, maps, curves)}
    sections = [
        Section("Models", ["What was loaded, and which position encoding each layer sees."], tables=[("", about)]),
        *_tables(rows),
        *_shifted(rows),
        *position_sections(rows, drawn),
        *attention_sections(rows, drawn),
        *_needle(rows),
        *_kinds(rows),
        *_by_position(rows),
    ]
    return render_page("Models examined", examine_summary(rows, about), sections, rows=rows, made=made)


def examine_summary(rows: pd.DataFrame, about: pd.DataFrame) -> list[Line]:
    """What was looked at and found, in words."""
    names = about["model"].tolist()
    models = [
        f"{r['model']}: {r['parameters']} parameters, {r['layers × heads']} layers × heads, position "
        f"{r['position seen']}."
        for r in about.to_dict("records")
    ]
    lines = [Line("Models", "", models), position_read(rows, names)]
    table = of(rows, "table", metric="components_95")
    for name, part in table.groupby("encoding", sort=False):
        value, fresh = (part[part["control"] == c]["value"].item() for c in ("none", "untrained"))
        smooth = of(rows, "table", metric="low_frequencies_90", encoding=name).set_index("control")["value"]
        text = (
            f"{name}'s table of positions has 95 % of its variance in {value:.0f} dimensions (a fresh one in "
            f"{fresh:.0f}), and 90 % in the lowest {smooth['none']:.1%} of the frequencies along positions (dealt out "
            f"anew: {smooth['shuffled']:.0%})."
        )
        lines.append(Line("Table", text))
    moved = of(rows, "shifted", metric="loss_change")
    shifted = []
    for name, part in moved.groupby("encoding", sort=False):
        most = part.loc[part["shift"].astype(int).idxmax()]
        shifted.append(f"{name} {interval_of(most)}, by {int(most['shift'])}")
    if shifted:
        lines.append(Line("Shifted", "What the loss gains, nats a token, when all positions are shifted:", shifted))
    lines.append(attention_explained(rows, names))
    kinds = of(rows, "by_layer_encoding", metric="on_keys")
    for row in kinds[kinds["layer_encoding"].str.contains(" - ", regex=False)].to_dict("records") if len(kinds) else ():
        text = (
            f"{row['encoding']}: heads of layers without position put {interval_of(row)} more of their attention on a "
            f"key that is asked for than those of the others ({row['layer_encoding']}; interval over heads)."
        )
        lines.append(Line("Hybrid", text))
    return lines


def _tables(rows: pd.DataFrame) -> list[Section]:
    numbers, drawn = of(rows, "table"), []
    if numbers.empty:
        return []
    for name in dict.fromkeys(numbers["encoding"]):
        similarity, basis = of(rows, "table_map", encoding=name), of(rows, "table_basis", encoding=name)
        drawn += [
            (
                f"{name}: how alike positions are, and the first principal components.",
                plot_table_map(similarity, basis),
            ),
            (f"{name}: norms, and similarity by distance.", plot_table_curves(of(rows, "table", encoding=name))),
        ]
    single = numbers[numbers["position"].isna() & numbers["lag"].isna()]
    wide = single.pivot_table(index=["encoding", "metric"], columns="control", values="value", sort=False)
    wide = wide[["none", "untrained", "shuffled"]].rename(columns={"none": "learned", "untrained": "fresh"})
    return [
        Section(
            "The table of positions",
            [
                "The vectors that the model adds to its embeddings, less their mean. participation_ratio: the number "
                "of dimensions that they fill, (Σ λ)² / Σ λ². low_frequencies_90: the share of the frequencies along "
                "positions, from the lowest on, that has 90 % of the variance; .9 for white noise. Controls: a fresh "
                "table, and the same vectors dealt out anew among positions."
            ],
            figures=drawn,
            tables=[("Numbers of the table.", wide.rename_axis(columns=None).reset_index())],
        )
    ]


def _shifted(rows: pd.DataFrame) -> list[Section]:
    shifted = of(rows, "shifted")
    if shifted.empty:
        return []
    moved = shifted[shifted["metric"] == "loss_change"]
    text = moved.assign(text=moved.apply(interval_of, axis=1), shift=moved["shift"].astype(int))
    table = text.pivot(index="shift", columns="encoding", values="text").rename_axis(columns=None).reset_index()
    return [
        Section(
            "Positions shifted",
            [
                "The same texts, every position p taken for p + k (Sinha et al. 2022). A model that knows distances "
                "alone, or no position but by its own means, does not notice; what has learned absolute positions "
                "may. Loss of the next token, and the share of tokens that are the likeliest; 95 % bootstrap."
            ],
            figures=[("Loss and accuracy against the shift.", plot_under_shift(shifted, "token_accuracy"))],
            tables=[("Change of the loss, nats a token, paired.", table)],
        )
    ]


def _needle(rows: pd.DataFrame) -> list[Section]:
    needle = of(rows, "needle")
    if needle.empty:
        return []
    mean = beside_untrained(needle, "metric")
    trained = needle[(needle["control"] == "none") & needle["metric"].isin(["on_keys"])]
    best = trained.sort_values("value", ascending=False).groupby("encoding", sort=False).head(5)
    heads = pd.DataFrame(
        {
            "model": best["encoding"],
            "head": [f"{layer}.{head}" for layer, head in zip(best["layer"], best["head"], strict=True)],
            "layer sees": best["layer_encoding"],
            "on the key": [interval_of(row) for row in best.to_dict("records")],
        }
    )
    return [
        Section(
            "Looking for a key",
            [
                "A key of five digits stands somewhere in a text, and the text ends with the question for it. What "
                "heads attend to from the last token: the key (on_keys; uniform attention would put on_keys_uniform "
                "there), the first token, the last 16, the rest; reach is the mean attended distance beside that of "
                "uniform attention. That a head attends to the key does not say that the model says it."
            ],
            figures=[("Every head's attention on the key, by layer.", plot_attention_by_kind(needle, "on_keys"))],
            tables=[
                ("Means over all heads, in parentheses the untrained model's.", mean),
                ("The heads that attend most to the key (layer.head).", heads),
            ],
        )
    ]


def _kinds(rows: pd.DataFrame) -> list[Section]:
    """Hybrids: what the layers that see position do, and what the others."""
    found = of(rows, "by_layer_encoding")
    if found.empty:
        return []
    found = found.assign(text=found.apply(interval_of, axis=1))
    table = found.pivot_table(
        index=["encoding", "of", "metric"], columns="layer_encoding", values="text", aggfunc="first", sort=False
    )
    fit = of(rows, "fit", scope="all", control="none", metric="r2", target="position")
    fit = fit[fit["site"].str.endswith("hook_resid_post") & fit["encoding"].isin(found["encoding"])]
    probes = fit.groupby(["encoding", "layer_encoding"], sort=False)["value"].mean().rename("mean R²").reset_index()
    needle = of(rows, "needle")
    needle = needle[needle["encoding"].isin(found["encoding"])]
    reach = []
    if len(needle):
        reach = [("Reach of every head, from the question for the key.", plot_attention_by_kind(needle, "reach"))]
    return [
        Section(
            "Layers that see position, and layers that do not",
            [
                "Yang et al. 2025 (Rope to Nope and Back Again) report that layers without positions retrieve, and "
                "rotary layers stay local. Means over the heads of each kind of layer, and their difference; brackets "
                "are 95 % bootstrap intervals over heads, which say nothing of other seeds. Of the key: as above. Of "
                "the census: its scores."
            ],
            figures=reach,
            tables=[
                ("Means over heads by what their layer sees.", table.rename_axis(columns=None).reset_index()),
                ("R² of the position behind the layers of each kind, mean over layers.", probes),
            ],
        )
    ]


def _by_position(rows: pd.DataFrame) -> list[Section]:
    loss = of(rows, "loss_by_position")
    if loss.empty:
        return []
    return [
        Section(
            "Loss by position",
            ["The loss of a token by its place in the text: what a longer context is worth. 95 % bootstrap."],
            figures=[("Loss, nats a token, by position.", plot_loss_along_texts(loss))],
        )
    ]
