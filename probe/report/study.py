"""The page of a study: what was trained, and then what was measured."""

from collections.abc import Mapping
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from probe.report.measured import measured_page
from probe.report.page import Line, Made
from probe.report.sections import Results


def study_page(results: Results, made: Made, *, drawn: dict[str, go.Figure], all_rows: pd.DataFrame) -> str:
    """The report as one HTML file.

    Args:
        results: of the first seed of every encoding.
        made: how it was made; its settings are those of ``study.json``.
        drawn: the figures of ``figures_of_results``.
        all_rows: all of ``rows.parquet``, to be downloaded.
    """
    title = f"Position study: {made.settings['task']}"
    return measured_page(title, results, made, lead=[_trained(made.settings)], drawn=drawn, all_rows=all_rows)


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
