"""The page of a study: its rows in words, figures and tables."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from probe.report.accuracy import plot_accuracy_by_length, plot_under_shift
from probe.report.attention_sections import DISTANCE, attention_explained, attention_figures, attention_sections
from probe.report.constructions import plot_construction_errors
from probe.report.extrapolation_sections import extrapolation_figures, extrapolation_sections, extrapolation_summary
from probe.report.page import Line, Made, Section, render_page
from probe.report.position_sections import position_figures, position_read, position_sections
from probe.report.style import named
from probe.report.tables import interval_of, of

IN_DISTRIBUTION, LONGER = "validation", "test"


def study_figures(
    rows: pd.DataFrame,
    maps: Mapping[str, pd.DataFrame],
    curves: Mapping[str, pd.DataFrame],
    train_length: int,
) -> dict[str, go.Figure]:
    """All figures of a study by name.

    ``rows`` are those of ``rows.parquet``; ``maps[encoding]`` and ``curves[encoding]`` a model's attention maps and the
    curves of its scores' split.
    """
    # Where a length stands in both splits, as it may in tasks whose examples are drawn, the test's is shown.
    accuracy = of(rows, "accuracy").sort_values("split").drop_duplicates(["encoding", "length"])
    shifted = of(rows, "shifted")  # of models under a bridge there are none
    found = {
        "accuracy": plot_accuracy_by_length(accuracy, train_length),
        **({"shifted": plot_under_shift(shifted)} if len(shifted) else {}),
        **position_figures(rows),
        **attention_figures(rows, maps, curves),
        **extrapolation_figures(rows, train_length),
        "constructions": plot_construction_errors(of(rows, "construction").rename(columns={"value": "largest_error"})),
    }
    return named(found)


def study_page(
    rows: pd.DataFrame,
    drawn: Mapping[str, go.Figure],
    made: Made,
    train_length: int,
    *,
    all_rows: pd.DataFrame | None = None,
) -> str:
    """The report as one HTML file.

    Args:
        rows: those of ``rows.parquet`` of each encoding's first seed.
        drawn: the figures of ``study_figures``.
        made: how it was made; its settings are those of ``study.json``.
        train_length: the longest length that was trained.
        all_rows: all of ``rows.parquet``, to be downloaded; by default ``rows``.
    """
    sections = [
        Section(
            "Accuracy by length",
            [
                "Exact match: the share of held-out sequences whose greedy completion equals the target, token by "
                "token and in length. Bands and brackets are 95 % Wilson intervals over sequences; one training seed, "
                "so they say nothing about other seeds."
            ],
            figures=[("Exact match by length.", drawn["accuracy"])],
            tables=[("In distribution (held-out sequences of trained lengths) and beyond.", accuracy_table(rows))],
        )
    ]
    if "shifted" in drawn:
        sections.append(
            Section(
                "Positions shifted",
                [
                    "The same sequences of trained lengths, every position p taken for p + k (Sinha et al. 2022). A "
                    "model that knows no position but by its own means, or distances alone, does not notice; what has "
                    "learned absolute positions does. Loss and exact match given the right tokens before; 95 % "
                    "bootstrap."
                ],
                figures=[("Loss and exact match against the shift.", drawn["shifted"])],
            )
        )
    sections += position_sections(rows, drawn)
    sections += attention_sections(rows, drawn)
    sections += extrapolation_sections(rows, drawn)
    sections += [
        Section(
            "Constructions",
            [
                "Weights written by hand into the same decoder, every claim run through its forward pass. An error "
                "within the tolerance holds; the tests show that the checks fail when a weight is off by 1 % or the "
                "<bos> is missing."
            ],
            figures=[("Every check, its error as a share of its tolerance.", drawn["constructions"])],
            tables=[("Claims.", construction_table(rows))],
        ),
    ]
    said = [*summary(rows, made.settings), *extrapolation_summary(rows, train_length)]
    title = f"Position study: {made.settings['task']}"
    return render_page(title, said, sections, rows=rows if all_rows is None else all_rows, made=made)


def summary(rows: pd.DataFrame, settings: Mapping[str, Any]) -> list[Line]:
    """What was done and found, in words."""
    encodings = list(settings["encodings"])
    lines = [_trained(settings), *_accuracies(rows, encodings), position_read(rows, encodings)]
    lines.append(attention_explained(rows, encodings))
    if "none" in encodings and len(encodings) > 1:
        lines.append(_nearest_to_nope(rows))
    claims = of(rows, "construction")
    holds = int(claims["holds"].astype(bool).sum())
    lines.append(Line("Constructions", f"Of {len(claims)} checks of hand-built weights, {holds} hold."))
    return lines


def _trained(settings: Mapping[str, Any]) -> Line:
    """What was trained, on what, for how long; what was loaded instead."""
    encodings, training = settings["encodings"], settings["training"]
    options, shape = (
        ", ".join(f"{name} {value}" for name, value in settings[of].items()) for of in ("task_options", "model")
    )
    task = f"{settings['task']} ({options})" if options else settings["task"]
    seeds = ", ".join(
        f"{n} of {encoding}" for encoding, n in settings["seeds"].items() if encoding in encodings and n > 1
    )
    loaded = ", ".join(settings["load"])
    return Line(
        "Trained",
        f"{len(encodings)} decoders ({', '.join(encodings)}) on {task}: "
        f"{shape}; {training['steps']} steps of {training['batch_size']} sequences, learning rate "
        f"{training['learning_rate']:g}; seed {settings['seed']}{f', seeds: {seeds}' if seeds else ''}."
        + (f" Loaded, not trained here: {loaded}." if loaded else ""),
    )


def _accuracies(rows: pd.DataFrame, encodings: Sequence[str]) -> list[Line]:
    accuracy = of(rows, "accuracy")
    overall = accuracy[accuracy["length"].isna()].set_index(["encoding", "split"])
    found = []
    for split, lead, what in (
        (IN_DISTRIBUTION, "In distribution", "held-out sequences of trained lengths"),
        (LONGER, "Test set", "the test set, whose lengths go beyond"),
    ):
        said = [f"{e} {interval_of(overall.loc[(e, split)])}" for e in encodings if (e, split) in overall.index]
        if said:
            found.append(Line(lead, f"Exact match on {what} (95 % Wilson over sequences; one training seed):", said))
    return found


def _nearest_to_nope(rows: pd.DataFrame) -> Line:
    """The models in order of their distance from NoPE, and how far two seeds of NoPE are apart, which every distance
    between models has to be read beside."""
    pairs = of(rows, "model_distance", metric=DISTANCE, scope="mean", aggregate="minimum")
    own = pairs[(pairs["model_a"] == "none") & (pairs["model_b"] == "none") & (pairs["control"] == "none")]
    pairs = pairs[(pairs["model_a"] == "none") ^ (pairs["model_b"] == "none")].sort_values("value")
    other = pairs["model_a"].where(pairs["model_a"] != "none", pairs["model_b"])
    untrained = pairs[pairs["control"] == "untrained"].set_index(other[pairs["control"] == "untrained"])["value"]
    said = [
        f"{name} {interval_of(pair)} ({untrained[name]:.3f})"
        for name, pair in zip(other, pairs.to_dict("records"), strict=True)
        if pair["control"] == "none"
    ]
    text = (
        "By its attention patterns NoPE is nearest to these, the nearest first (Jensen–Shannon divergence, nats, 95 % "
        "bootstrap; in parentheses before training)."
    )
    if len(own):
        text += f" Two seeds of NoPE are {interval_of(own.iloc[0])} apart."
    return Line("Nearest to NoPE", text, said)


def accuracy_table(rows: pd.DataFrame) -> pd.DataFrame:
    accuracy = of(rows, "accuracy")
    overall = accuracy[accuracy["length"].isna()]
    names = {IN_DISTRIBUTION: "in distribution", LONGER: "test"}
    return pd.DataFrame(
        {
            "encoding": overall["encoding"],
            "sequences": overall["split"].map(names),
            "exact match": overall["value"],
            "low": overall["low"],
            "high": overall["high"],
            "n": overall["n"].astype(int),
        }
    )


def construction_table(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a construction: what it claims, to what length it was checked here, and in how many checks it holds."""
    claims = of(rows, "construction").rename(columns={"value": "largest_error"})
    share = claims["largest_error"] / claims["tolerance"].where(claims["tolerance"] > 0)
    claims = claims.assign(share=share.fillna(claims["largest_error"] * float("inf")).fillna(0.0))
    return pd.DataFrame(
        [
            {
                "construction": name,
                "claim": part["claim"].iloc[0],
                "source": part["source"].iloc[0],
                "dtypes": ", ".join(dict.fromkeys(part["dtype"])),
                "checked to length": int(part["length"].max()),
                "largest error / tolerance": float(part["share"].max()),
                "holds": f"{int(part['holds'].sum())} of {len(part)}",
            }
            for name, part in claims.groupby("construction", sort=False)
        ]
    )
