"""What a study measures, and all that its folder has of it: rows, figures, report."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from probe.files import write_text
from probe.measure.base import Case
from probe.measure.plan import Missing, Plan
from probe.measure.registry import MEASUREMENTS
from probe.measure.results import collect
from probe.report.export import standalone
from probe.report.measured import figures_of_results
from probe.report.page import Made
from probe.report.sections import Results
from probe.report.study import study_page
from probe.runs import RunFolder
from probe.study.beyond import BEYOND_STAGES
from probe.study.command import study_command
from probe.study.config import StudyConfig, StudyData, run_name
from probe.study.places import locate
from probe.tasks import make_task

# What a study measures of each model, and of all models together; of texts there is more (``beyond_stages``).
MEASURED = (
    *("accuracy", "shifted", "probe", "fit", "extrapolation", "use", "geometry", "mechanism"),
    *("templates", "census", "split", "curves", "entropy", "maps", "temperature"),
    *("model_distance", "model_order", "trained_t5"),
)


def case_of(config: StudyConfig, data: StudyData, encoding: str, models: Sequence[nn.Module]) -> Case:
    return Case(encoding, models, data.traced(config), config.seed, examples=data)


def plan_of(cases: Sequence[Case]) -> Plan:
    return Plan.make(cases, MEASURED)


def models_of(config: StudyConfig, folder: Path) -> dict[str, list[nn.Module]]:
    """The finished models of a study on the CPU, by encoding."""
    found = {}
    for encoding in config.encodings:
        names = [run_name(encoding, r) for r in range(config.n_seeds(encoding))]
        places = [config.load.get(encoding, folder / "models" / name / "final") for name in names]
        found[encoding] = [locate(place).load("cpu") for place in places]
    return found


def collect_rows(config: StudyConfig, folder: Path) -> pd.DataFrame:
    """Every number of a finished study, one row each, with every key it has: measurement, task, model, seed, …

    Args:
        config: of the study.
        folder: of the study, with its finished stages.
    """
    run, data = RunFolder(Path(folder), "study"), StudyData.of(config)
    cases = [case_of(config, data, encoding, of) for encoding, of in models_of(config, run.path).items()]
    return results_of(config, run, cases, [])[0]


def read_stage(folder: str | Path, name: str) -> pd.DataFrame:
    """The rows of a finished stage of a study.

    Args:
        folder: of the study.
        name: of the stage: a measurement, a hyphen and an encoding ("maps-none"), or a measurement of all models.

    Raises:
        ProbeError: where the stage is not finished, or its rows are not those that were written.
    """
    return RunFolder(Path(folder), "study").rows(name)


def results_of(
    config: StudyConfig, run: RunFolder, cases: Sequence[Case], missing: Sequence[Missing]
) -> tuple[pd.DataFrame, Results]:
    """All rows, and the same with what is drawn."""
    results = collect(run, cases, missing, train_length=make_task(config.task, config.task_options).train_length)
    of = {case.name: case.encoding for case in cases}
    parts = [results.rows] + [
        run.rows(f"{stage}-{name}").assign(measurement=stage, model=name, encoding=encoding)
        for stage in BEYOND_STAGES
        if stage not in MEASUREMENTS  # the others are there already
        for name, encoding in of.items()
        if run.file_of(f"{stage}-{name}").exists()
    ]
    rows = pd.concat(parts, ignore_index=True).assign(task=config.task).drop(columns="data")
    rows["seed"] = config.seed + (rows["replica"].fillna(0).astype(int) if "replica" in rows else 0)
    claims = run.rows("constructions").rename(columns={"largest_error": "value"})
    claims = claims.assign(measurement="construction", metric="largest_error", task=config.task, seed=config.seed)
    rows = pd.concat([rows, claims.astype({"holds": "boolean"})], ignore_index=True)
    rows = rows.astype({"layer": "Int64", "head": "Int64"})  # missing where a row is of a model or a construction
    keys = ["measurement", "task", "model", "encoding", "seed"]
    rows = rows[[*keys, *(c for c in rows.columns if c not in keys)]]
    return rows, dataclasses.replace(results, rows=rows)


def write_report(
    config: StudyConfig,
    folder: Path,
    rows: pd.DataFrame,
    results: Results,
    device: torch.device,
    made_with: dict[str, str],
) -> None:
    drawn = figures_of_results(results)
    for name, text in standalone(drawn).items():
        write_text(folder / "figures" / name, text)
    command, files = study_command(config, device.type)
    made = Made(command, files, dataclasses.asdict(config), made_with)
    write_text(folder / "report.html", study_page(results, made, drawn=drawn, all_rows=rows))
