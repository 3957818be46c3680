"""The page of a study: its rows in words, figures and tables."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from probe.report import figures
from probe.report.attention_sections import DISTANCE, attention_figures, attention_sections, null_table
from probe.report.constructions import construction_errors
from probe.report.extrapolation_sections import extrapolation_figures, extrapolation_sections, extrapolation_summary
from probe.report.page import Section, render_page
from probe.report.position_sections import depth, position_figures, position_sections
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
    return {
        "accuracy": figures.accuracy_by_length(accuracy, train_length),
        **({"shifted": figures.under_shift(shifted)} if len(shifted) else {}),
        **position_figures(rows),
        **attention_figures(rows, maps, curves),
        **extrapolation_figures(rows, train_length),
        "constructions": construction_errors(of(rows, "construction").rename(columns={"value": "largest_error"})),
    }


def study_page(
    rows: pd.DataFrame,
    drawn: Mapping[str, go.Figure],
    settings: Mapping[str, Any],
    environment: Mapping[str, str],
    command: str,
    train_length: int,
) -> str:
    """The report as one HTML file.

    Args:
        rows: those of ``rows.parquet``.
        drawn: the figures of ``study_figures``.
        settings: what was studied, as in ``study.json``.
        environment: versions and device.
        command: what makes this report anew.
        train_length: the longest length that was trained.
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
        Section(
            "Settings and versions",
            [f"Made by: {command}"],
            tables=[("Settings.", _table_of(_flat(settings))), ("Versions.", _table_of(environment))],
        ),
    ]
    said = [*summary(rows, settings), *extrapolation_summary(rows, train_length)]
    return render_page(f"Position study: {settings['task']}", said, sections)


def summary(rows: pd.DataFrame, settings: Mapping[str, Any]) -> list[str]:
    """What was done and found, in words."""
    encodings = list(settings["encodings"])
    accuracy = of(rows, "accuracy")
    overall = accuracy[accuracy["length"].isna()].set_index(["encoding", "split"])
    lines = [
        f"{len(encodings)} decoders ({', '.join(encodings)}) on {settings['task']}, seed {settings['seed']}: "
        f"{_size(settings)}."
    ]
    for split, what in ((IN_DISTRIBUTION, "In distribution"), (LONGER, "On the test set")):
        said = [f"{e} {interval_of(overall.loc[(e, split)])}" for e in encodings if (e, split) in overall.index]
        if said:
            lines.append(f"{what}, exact match is {', '.join(said)}.")
    ridge = of(rows, "probe", probe="ridge", metric="r2")
    last = ridge[ridge["site"].map(depth) == ridge["site"].map(depth).max()].set_index(["encoding", "control"])
    said = [
        f"{e} {interval_of(last.loc[(e, 'none')])} (untrained {last.loc[(e, 'untrained'), 'value']:.3f}, embedding "
        f"{last.loc[(e, 'embedding'), 'value']:.3f})"
        for e in encodings
    ]
    lines.append(f"Position is read from the last layer with R² {'; '.join(said)}.")
    if "none" in encodings and len(encodings) > 1:
        lines.append(
            f"In its attention patterns NoPE is nearest to: {_nearest_to_nope(rows)} (nats).{_between_seeds(rows)}"
        )
    lines.append(_position_in_attention(rows, encodings))
    claims = of(rows, "construction")
    holds = int(claims["holds"].astype(bool).sum())
    lines.append(f"Of the hand-built constructions' {len(claims)} checks, {holds} hold.")
    return lines


def _between_seeds(rows: pd.DataFrame) -> str:
    """How far two seeds of NoPE are apart, which every distance between models has to be read beside."""
    pairs = of(rows, "model_distance", metric=DISTANCE, scope="mean", aggregate="minimum", control="none")
    own = pairs[(pairs["model_a"] == "none") & (pairs["model_b"] == "none")]
    return "" if own.empty else f" Two seeds of NoPE are {interval_of(own.iloc[0])} apart."


def _position_in_attention(rows: pd.DataFrame, encodings: Sequence[str]) -> str:
    """How much of attention position explains at all, which is what a nearness to a template has to be read beside."""
    explained = null_table(rows).set_index("encoding")["explained"]
    split = of(rows, "split", control="none", scope="seen", part="distance", metric="toeplitz_r2")
    toeplitz = split.groupby("encoding")["value"].mean()
    said = [f"{e} {explained[e]:.0%} and {toeplitz[e]:.0%}" for e in encodings]
    return (
        "How much of attention position explains (of the divergence from uniform, by each head's best template; of the "
        f"scores' variance within rows, by f_rel; means over heads): {', '.join(said)}. The rest is content."
    )


def _nearest_to_nope(rows: pd.DataFrame) -> str:
    pairs = of(rows, "model_distance", metric=DISTANCE, scope="mean", aggregate="minimum")
    pairs = pairs[(pairs["model_a"] == "none") ^ (pairs["model_b"] == "none")].sort_values("value")
    other = pairs["model_a"].where(pairs["model_a"] != "none", pairs["model_b"])
    untrained = pairs[pairs["control"] == "untrained"].set_index(other[pairs["control"] == "untrained"])["value"]
    said = [
        f"{name} {interval_of(pair)} (untrained {untrained[name]:.3f})"
        for name, pair in zip(other, pairs.to_dict("records"), strict=True)
        if pair["control"] == "none"
    ]
    return ", ".join(said)


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


def _size(settings: Mapping[str, Any]) -> str:
    model, training = settings["model"], settings["training"]
    shape = ", ".join(f"{name} {value}" for name, value in model.items())
    return (
        f"{shape}; {training['steps']} steps of {training['batch_size']} sequences, learning rate "
        f"{training['learning_rate']:g}"
    )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = (
                ", ".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)
            )
    return flat


def _table_of(pairs: Mapping[str, Any]) -> pd.DataFrame:
    return pd.DataFrame({"name": list(pairs), "value": [str(v) for v in pairs.values()]})
