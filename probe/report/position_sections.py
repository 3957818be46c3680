"""What a report says about position in hidden states: probes, use, geometry, mechanism."""

import math
from collections.abc import Mapping, Sequence

import pandas as pd
import plotly.graph_objects as go

from probe.report.cells import Told
from probe.report.drawing import short_site
from probe.report.geometry import plot_mechanism_readouts, plot_variance_against_position, plot_variance_shares
from probe.report.page import Line, Section
from probe.report.position import plot_erasure_losses, plot_extrapolation_curve, plot_probe_by_site, plot_probe_heatmap
from probe.report.style import named
from probe.report.tables import beside, beside_untrained, by_encoding, interval_of, known, of

SHARES = ("share_position", "share_context", "share_token", "share_residual", "participation_ratio")
STREAM = "hook_resid_post"
VARIANCES = ("variance", "exponent", "exponent_r2")


def position_figures(rows: pd.DataFrame) -> dict[str, go.Figure]:
    """Figures by name. Geometry and mechanism are drawn of one model, NoPE's where there is one; tables have all."""
    found = {
        "probe_r2": plot_probe_by_site(of(rows, "probe", probe="ridge"), "r2"),
        "probe_accuracy": plot_probe_by_site(of(rows, "probe", probe="logistic"), "accuracy"),
        "probe_heatmap": plot_probe_heatmap(of(rows, "fit")),
        "extrapolation": plot_extrapolation_curve(of(rows, "extrapolation")),
        "use": plot_erasure_losses(of(rows, "use")),
    }
    drawn = portrayed(rows)
    geometry = of(rows, "geometry", encoding=drawn)
    found["variance_shares"] = plot_variance_shares(geometry[geometry["metric"].isin(SHARES)])
    found["variance_by_position"] = plot_variance_against_position(geometry[geometry["metric"].isin(VARIANCES)])
    mechanism = of(rows, "mechanism", encoding=drawn, control="none")
    if len(mechanism):
        found["mechanism"] = plot_mechanism_readouts(mechanism)
    return named(found)


def portrayed(rows: pd.DataFrame) -> str:
    """The model whose geometry is drawn."""
    encodings = list(dict.fromkeys(of(rows, "geometry")["encoding"]))
    return "none" if "none" in encodings else encodings[0]


def position_sections(rows: pd.DataFrame, drawn: Mapping[str, go.Figure]) -> list[Section]:
    """The sections of a study's report."""
    return [
        Section(
            "Position in hidden states",
            [
                "Linear probes on held-out sequences, split by sequence. Ridge regression of the position (R²) and "
                "logistic classification of it (accuracy), beside three controls: the same probe on an untrained model "
                "of the same shape, on the token embedding alone, and with the positions of each sequence shuffled. "
                "Only what stands above the untrained model was learned. Bars: 95 % bootstrap over test sequences."
            ],
            figures=[
                ("R² of the regressed position by site.", drawn["probe_r2"]),
                ("Accuracy of the classified position by site.", drawn["probe_accuracy"]),
                (
                    "R² of the regressed position at every site and head; the colour is what training added.",
                    drawn["probe_heatmap"],
                ),
                (
                    "Error of a probe behind the last layer, fitted left of the line only.",
                    drawn["extrapolation"],
                ),
            ],
            tables=fit_tables(rows),
        ),
        Section(
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
            figures=[("Change of the loss, nats a token.", drawn["use"])],
            tables=[
                (
                    "Change of the loss before each layer, in parentheses that of random subspaces; p is the share of "
                    "them (position's own included) that cost as much.",
                    use_table(rows),
                )
            ],
        ),
        _geometry(rows, drawn),
        *([_mechanism(rows, drawn)] if "mechanism" in drawn else []),
    ]


def _geometry(rows: pd.DataFrame, drawn: Mapping[str, go.Figure]) -> Section:
    whose = portrayed(rows)
    return Section(
        "The geometry of position",
        [
            "Hidden states split into their mean, a part that the position fixes, one that the sequence fixes, one "
            "that the token fixes, and the rest (Song & Zhong 2023); the number over a bar is the dimension of the "
            "position part (participation ratio). Below, the variance of attention outputs over sequences against the "
            "number of keys: for the mean of n independent values it falls as 1/n, exponent 1 (Chi et al. 2023), at "
            "initialisation, too. Position 0 is left out."
        ],
        figures=[
            (f"Shares of the variance of hidden states, encoding {whose}.", drawn["variance_shares"]),
            (f"Variance of attention outputs, encoding {whose}.", drawn["variance_by_position"]),
        ],
        tables=[
            (
                "The position part's share of the variance, in parentheses the untrained model's.",
                _by_site(rows, "share_position"),
            ),
            (
                "The exponent of the variance of attention outputs, in parentheses untrained.",
                _by_site(rows, "exponent"),
            ),
        ],
    )


def _mechanism(rows: pd.DataFrame, drawn: Mapping[str, go.Figure]) -> Section:
    return Section(
        "By which mechanism?",
        [
            "Interventions on the tokens and on attention, each with a probe for position: a <bos> counter dies "
            "without <bos> and runs slow with a second one; decaying variance lives on in random content; an encoding "
            "survives a string of one token. A mechanism is available if position can be read by it, and used if "
            "disturbing it, with content held, moves the decoded position and costs more loss than changes that are as "
            "large in other directions; nothing means: not established on these sequences. (Position itself is there "
            "where the token embedding does not tell it already, as it does in tasks whose tokens have their places.)"
        ],
        figures=[(f"What is left of position, encoding {portrayed(rows)}.", drawn["mechanism"])],
        tables=[("Verdicts, in parentheses of the untrained model.", verdict_table(rows))],
    )


def position_read(rows: pd.DataFrame, encodings: Sequence[str]) -> Line:
    """How well the position is read behind the last layer of each model, in words."""
    ridge = of(rows, "probe", probe="ridge", metric="r2")
    layer = ridge["site"].map(depth)
    last = ridge[layer == layer.groupby(ridge["encoding"]).transform("max")].set_index(["encoding", "control"])
    said = [
        f"{e} {interval_of(last.loc[(e, 'none')])} ({last.loc[(e, 'untrained'), 'value']:.3f}, "
        f"{last.loc[(e, 'embedding'), 'value']:.3f})"
        for e in encodings
    ]
    text = (
        "Position is read from hidden states behind the last layer with this R² (95 % bootstrap over sequences; in "
        "parentheses untrained, and from the token embedding alone):"
    )
    return Line("Position", text, said)


def fit_summary(rows: pd.DataFrame) -> list[Line]:
    """How well the position is read behind the last layer that was looked at, in words; nothing where it was not."""
    r2 = of(rows, "fit", scope="all", target="position", control="none", metric="r2")
    r2 = r2[r2["site"].str.endswith(STREAM)]
    last = r2[r2["site"].map(depth) == r2["site"].map(depth).max()]
    text = "Position is read behind the last layer with this R² (95 % bootstrap over sequences and seeds):"
    return (
        [Line("Position", text, [f"{r['encoding']} {interval_of(r)}" for r in last.to_dict("records")])]
        if len(last)
        else []
    )


def fit_tables(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """``fit_table`` with its caption, where the stream behind a layer was looked at."""
    if not of(rows, "fit", scope="all")["site"].str.endswith(STREAM).any():
        return []
    return [("Behind the last layer: R² and, in parentheses, that less the untrained model's.", fit_table(rows))]


def fit_table(rows: pd.DataFrame) -> pd.DataFrame:
    """R² of every target behind the last layer, beside its selectivity, a column an encoding."""
    fit = of(rows, "fit", scope="all")
    fit = fit[fit["site"].str.endswith(STREAM)]
    fit = fit[fit["site"].map(depth) == fit["site"].map(depth).max()].set_index(["target", "encoding"])
    r2 = fit[(fit["control"] == "none") & (fit["metric"] == "r2")]["value"]
    gained = fit[(fit["control"] == "untrained") & (fit["metric"] == "selectivity")]["value"]
    encodings = list(dict.fromkeys(r2.index.get_level_values("encoding")))
    found = [
        {"target": target}
        | {e: beside(r2[target, e], gained[target, e], "less untrained", other_form="{:+.3f}") for e in encodings}
        for target in dict.fromkeys(r2.index.get_level_values("target"))
    ]
    return by_encoding(found, ["target", *encodings])


def use_table(rows: pd.DataFrame) -> pd.DataFrame:
    """The change of the loss by site and concept, a column an encoding."""
    use = of(rows, "use", metric="loss")
    values = use.pivot_table(index=["site", "concept"], columns=["encoding", "control"], values="value", sort=False)
    p = use.get("p", pd.Series(dtype=float)).groupby([use[k] for k in ("site", "concept", "encoding")]).min()
    encodings = list(dict.fromkeys(use["encoding"]))

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
    return by_encoding(found, ["site", "concept", *encodings])


def verdict_table(rows: pd.DataFrame) -> pd.DataFrame:
    """The verdict on each mechanism, a column an encoding."""
    verdicts = of(rows, "mechanism").drop_duplicates(["mechanism", "encoding", "control"])
    told = verdicts.set_index(["mechanism", "encoding", "control"])["verdict"]
    encodings = list(dict.fromkeys(verdicts["encoding"]))
    found = [
        {"mechanism": name.replace("_", " ")}
        | {e: f"{told[name, e, 'none']} ({told[name, e, 'untrained']})" for e in encodings}
        for name in dict.fromkeys(verdicts["mechanism"])
    ]
    return by_encoding(found, ["mechanism", *encodings])


def _by_site(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """A number of the geometry by site, a column an encoding."""
    values = of(rows, "geometry", metric=metric)
    return beside_untrained(values.assign(site=values["site"].map(short_site)), "site")


def depth(site: str) -> int:
    """A site's layer, -1 for what stands before all layers."""
    return int(site.split(".")[1]) if site.startswith("blocks.") else -1
