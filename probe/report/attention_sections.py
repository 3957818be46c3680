"""What a page says about attention: templates, the split of scores, the census, models compared."""

from collections.abc import Mapping, Sequence

import pandas as pd
import plotly.graph_objects as go

from probe.report import attention
from probe.report.page import Line, Section
from probe.report.style import named
from probe.report.tables import beside_untrained, interval_of, of

DISTANCE = "jensen_shannon"


def attention_figures(
    rows: pd.DataFrame, maps: Mapping[str, pd.DataFrame], curves: Mapping[str, pd.DataFrame]
) -> dict[str, go.Figure]:
    """The figures of what was measured, by name; of what was not measured there is none."""
    found: dict[str, go.Figure] = {}
    templates = of(rows, "templates", metric=DISTANCE)
    if len(templates):
        found["template_distances"] = attention.plot_template_distances(templates)
    for encoding, heads in maps.items():
        found[f"attention_{encoding}"] = attention.plot_attention_maps(_closest_head_of_each_layer(heads))
    for encoding, heads in curves.items():
        found[f"f_rel_{encoding}"] = attention.plot_f_rel_curves(heads, of(rows, "split", encoding=encoding), encoding)
    census = of(rows, "census", control="none")
    if len(census):
        found["census"] = attention.plot_census_grid(census)
    if census["metric"].isin(list(attention.LOSSES)).any():
        found["census_losses"] = attention.plot_census_losses(census)
    entropy = of(rows, "entropy")
    if len(entropy):
        found["entropy"] = attention.plot_entropy_by_query(entropy)
    pairs = of(rows, "model_distance", metric=DISTANCE, scope="mean", aggregate="minimum")
    for control, name in (("none", "model_distances"), ("untrained", "model_distances_untrained")):
        if (pairs["control"] == control).any():
            found[name] = attention.plot_distance_matrix(pairs[pairs["control"] == control])
    return named(found)


def attention_sections(rows: pd.DataFrame, drawn: Mapping[str, go.Figure]) -> list[Section]:
    """The sections of what was measured."""
    sections = [_templates(rows, drawn), _split(rows, drawn), _census(rows, drawn), _models(rows, drawn)]
    return [section for section in sections if section.figures or section.tables]


def attention_summary(rows: pd.DataFrame, encodings: Sequence[str]) -> list[Line]:
    """What was found of each model's attention, and between models, in words."""
    pairs = of(rows, "model_distance", metric=DISTANCE, scope="mean", aggregate="minimum", control="none")
    pairs = pairs.sort_values("value").to_dict("records")
    said = [f"{pair['model_a']} – {pair['model_b']} {interval_of(pair)}" for pair in pairs]
    text = "Distance of the attention of two models, by the nearest heads of each layer, nats (95 % bootstrap):"
    return [attention_explained(rows, encodings), *([Line("Models", text, said)] if said else [])]


def attention_explained(rows: pd.DataFrame, encodings: Sequence[str]) -> Line:
    """How much of attention position explains at all, which is what a nearness to a template has to be read beside."""
    explained = null_table(rows).set_index("encoding")["explained"]
    split = of(rows, "split", control="none", scope="seen", part="distance", metric="toeplitz_r2")
    toeplitz = split.groupby("encoding")["value"].mean()
    said = [f"{e} {explained[e]:.0%} and {toeplitz[e]:.0%}" for e in encodings if e in explained and e in toeplitz]
    text = (
        "How much of attention position explains: of the divergence from uniform, by each head's best template, and of "
        "the scores' variance within rows, by f_rel; means over heads. The rest is content."
    )
    return Line("Attention", text, said)


def _named(drawn: Mapping[str, go.Figure], prefix: str) -> list[tuple[str, go.Figure]]:
    return [
        (f"Encoding: {name.removeprefix(prefix)}.", figure) for name, figure in drawn.items() if name.startswith(prefix)
    ]


def _templates(rows: pd.DataFrame, drawn: Mapping[str, go.Figure]) -> Section:
    figures, tables = _named(drawn, "attention_"), []
    if "template_distances" in drawn:
        figures.append(("Distance of every head from every template (a point a head).", drawn["template_distances"]))
        tables.append(
            ("Mean over all heads, in parentheses before training; fitted parameters of a head.", template_table(rows))
        )
        tables.append(("The nearest template of each head beside its nulls, means over heads.", null_table(rows)))
    trained = of(rows, "trained_t5")
    if len(trained):
        tables.append(
            (
                f"Distance from the bias that the model {trained['table'].iloc[0]} has learned: each head beside the "
                "column of the table with its own number, means over heads.",
                beside_untrained(trained, "template"),
            )
        )
    return Section(
        "Attention beside its templates",
        [
            "For each layer, the head that lies closest to its nearest template: its mean pattern over held-out "
            "sequences, the template, the difference. Fitted templates were fitted to one half of the sequences and "
            "every distance measured on the other, so that a family gains nothing there by having more parameters; the "
            "number is the Jensen–Shannon divergence in nats, from 0 to ln 2 = 0.693, a mean over sequences and query "
            "positions.",
            "Nulls: the distance of the same heads from uniform attention; of the same patterns with the keys of each "
            "row shuffled, from the template fitted to them anew; and of each head from the nearest head of another "
            "seed of its model, where there is one.",
        ],
        figures=figures,
        tables=tables,
    )


def _split(rows: pd.DataFrame, drawn: Mapping[str, go.Figure]) -> Section:
    split = of(rows, "split")
    figures = _named(drawn, "f_rel_")
    tables = [("Means over heads, in parentheses before training.", split_table(split))] if len(split) else []
    if "entropy" in drawn:
        figures.append(
            ("Entropy of every head by query position; uniform attention has the greatest.", drawn["entropy"])
        )
    return Section(
        "Scores split into position and content",
        [
            "Scores as μ + f_abs(key) + g(query) + f_rel(distance) + content, by least squares over all held-out "
            "sequences (theorem 2 of Kazemnejad et al. 2023 promises heads of this form). A panel is f_rel of a head, "
            "with the ALiBi line and the T5 bias nearest to it; R² is the share of the scores' variance within rows, "
            "which is all that softmax sees, that f_rel alone explains. Bands: 95 % bootstrap over sequences.",
            "A linear f_rel cannot be told from an absolute bias on keys, -m(t - i) = -mt + mi, since softmax does not "
            "see -mt: ALiBi is as well an absolute bias on keys. By convention the linear trend belongs to f_rel here.",
        ],
        figures=figures,
        tables=tables,
    )


def _census(rows: pd.DataFrame, drawn: Mapping[str, go.Figure]) -> Section:
    census = of(rows, "census")
    figures = []
    if "census" in drawn:
        figures.append(("What each head looks like; hover for its scores.", drawn["census"]))
    if "census_losses" in drawn:
        figures.append(("What the model loses when a head's pattern is replaced.", drawn["census_losses"]))
    return Section(
        "Census of heads",
        [
            "The label says what a head's pattern looks like, the losses what it is used for: the change of the "
            "next-token loss (nats a token, over the tokens that the model learns to predict, held-out sequences) when "
            "its pattern is replaced by its best template, by itself with uniform attention in the template's place, "
            "or by uniform attention. Shade: the share of the pattern's variance that the best template explains. 95 % "
            "bootstrap over sequences, paired; one head at a time."
        ],
        figures=figures,
        tables=[("Heads by label, in parentheses before training, and what they are used for.", census_counts(census))]
        if len(census)
        else [],
    )


def _models(rows: pd.DataFrame, drawn: Mapping[str, go.Figure]) -> Section:
    figures, tables = [], []
    if "model_distances" in drawn:
        figures.append(("Distance between every two trained models, in nats.", drawn["model_distances"]))
    if "model_distances_untrained" in drawn:
        figures.append(("The same before training.", drawn["model_distances_untrained"]))
    order = of(rows, "model_order", control="none", reference="none")
    if len(order):
        tables.append(
            ("Which model NoPE is nearer to: distance to the first less distance to the second.", order_table(order))
        )
    matched = of(rows, "model_distance", metric=DISTANCE, scope="mean", aggregate="matching")
    if len(matched):
        tables.append(("The same models by the best one-to-one matching of heads.", _pair_table(matched)))
    return Section(
        "Models compared",
        [
            "As in Kazemnejad et al. 2023, section 5.2: at each layer the smallest Jensen–Shannon divergence over all "
            "pairs of heads, then the mean over layers. On the diagonal, the distance between two seeds of one model, "
            "where there are two. Brackets: 95 % bootstrap over sequences and seeds, the minimum taken anew each time; "
            "with one seed they say nothing about other seeds. The paper orders models by distance from NoPE: T5, "
            "ALiBi, then rotary and absolute. The second matrix is the control: the same models before training."
        ],
        figures=figures,
        tables=tables,
    )


def template_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean distance over heads, a row a template, a column an encoding; the untrained model's in parentheses."""
    templates = of(rows, "templates", metric=DISTANCE)
    parameters = templates.groupby("template")["n_parameters"].max().astype(int)
    table = beside_untrained(templates, "template")
    table.insert(1, "fitted parameters", table["template"].map(parameters))
    return table


def null_table(rows: pd.DataFrame) -> pd.DataFrame:
    """The nearest template of each head and the nulls, means over heads, a row an encoding."""
    templates = of(rows, "templates", metric=DISTANCE, control="none")
    nearest = templates.loc[templates.groupby(["encoding", "layer", "head"], sort=False)["value"].idxmin()]
    columns = {
        "value": "nearest template",
        "null_uniform": "from uniform",
        "null_shuffled": "keys shuffled",
        "null_seed": "another seed",
        "explained": "explained",
    }
    columns = {column: name for column, name in columns.items() if column in nearest}
    means = nearest.groupby("encoding", sort=False)[list(columns)].mean()
    means["most often"] = nearest.groupby("encoding")["template"].agg(lambda names: names.mode().iloc[0])
    return means.rename(columns=columns).reset_index()


def split_table(split: pd.DataFrame) -> pd.DataFrame:
    """Shares of variance within rows and the Toeplitz R², means over heads, a row each, a column an encoding."""
    names = {
        ("seen", "distance", "share"): "f_rel, share within rows",
        ("seen", "key", "share"): "f_abs, share within rows",
        ("seen", "residual", "share"): "content, share within rows",
        ("seen", "distance", "toeplitz_r2"): "R² of f_rel alone (Toeplitz)",
        ("mean", "distance", "toeplitz_r2"): "the same of mean scores",
        ("seen", "distance", "alibi_r2"): "R² of a line for f_rel",
        ("seen", "distance", "t5_r2"): "R² of T5's buckets for f_rel",
    }
    keys = pd.Series(list(zip(split["scope"], split["part"], split["metric"], strict=True)), index=split.index)
    named = split.assign(quantity=keys.map(names)).dropna(subset="quantity")
    return beside_untrained(named, "quantity")


def census_counts(census: pd.DataFrame) -> pd.DataFrame:
    """How many heads have each label, and how many are used for what, a column an encoding."""
    heads = census.drop_duplicates(["encoding", "control", "layer", "head"])
    labels = heads.groupby(["encoding", "control", "label"], sort=False).size().rename("value").reset_index()
    table = beside_untrained(labels, "label", "{:.0f}")
    used = heads[heads["control"] == "none"].groupby(["encoding", "used_for"]).size().unstack(0).fillna(0).astype(int)
    used = used.rename_axis(columns=None).reset_index().rename(columns={"used_for": "label"})
    both = pd.concat([table, used.assign(label="used for " + used["label"])], ignore_index=True)
    return both.rename_axis(columns="encoding")


def order_table(order: pd.DataFrame) -> pd.DataFrame:
    """Every two models by their distance from NoPE, with the interval of the difference."""
    order = order.sort_values("value")
    return pd.DataFrame(
        {
            "nearer": order["model_a"].where(order["value"] <= 0, order["model_b"]),
            "than": order["model_b"].where(order["value"] <= 0, order["model_a"]),
            "by": order["value"].abs(),
            "low": order["low"].where(order["value"] > 0, -order["high"]),
            "high": order["high"].where(order["value"] > 0, -order["low"]),
        }
    )


def _pair_table(pairs: pd.DataFrame) -> pd.DataFrame:
    both = pairs.assign(pair=pairs["model_a"] + " – " + pairs["model_b"], text=pairs.apply(interval_of, axis=1))
    table = both.pivot_table(index="pair", columns="control", values="text", aggfunc="first", sort=False)
    return table.rename(columns={"none": "trained"}).rename_axis(columns=None).reset_index()


def _closest_head_of_each_layer(heads: pd.DataFrame) -> pd.DataFrame:
    one = heads.drop_duplicates(["layer", "head"]).sort_values("distance").drop_duplicates("layer")
    return heads.merge(one[["layer", "head"]], on=["layer", "head"])
