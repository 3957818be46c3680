"""Any measurements on any models: planned, run in a folder that resumes, and put on one page."""

import inspect
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from probe.errors import ProbeError, one_line
from probe.measure.base import Case
from probe.measure.identity import Options, identity_of
from probe.measure.plan import Missing, Plan, stage_of
from probe.measure.registry import MEASUREMENTS
from probe.measure.results import collect, missing_earlier
from probe.models.anatomy import d_vocab_of
from probe.models.open.ways import as_model
from probe.progress import OnProgress, Steps, untold
from probe.provenance import environment
from probe.report.glossary import define
from probe.report.measured import measured_page
from probe.report.page import Line, Made, Section
from probe.report.sections import PARTS, Part, Results
from probe.rows import check_rows
from probe.runs import RunFolder


def measure_case(
    run: RunFolder,
    case: Case,
    names: Sequence[str],
    options: Options,
    *,
    say: Callable[[str], None] = lambda line: None,
    steps: Steps | None = None,
) -> list[Missing]:
    """Measure what is left of one model, stage by stage. Return what failed; the others are measured nevertheless."""
    failed = []
    for name in names:
        failed += _stage(run, name, case.name, [case], options, say, steps)
    return failed


def measure_between(
    run: RunFolder,
    cases: Sequence[Case],
    names: Sequence[str],
    options: Options,
    *,
    say: Callable[[str], None] = lambda line: None,
    steps: Steps | None = None,
) -> list[Missing]:
    """Measure what is left of all models together. Return what failed."""
    failed = []
    for name in names:
        failed += _stage(run, name, None, cases, options, say, steps)
    return failed


def _stage(
    run: RunFolder,
    name: str,
    model: str | None,
    cases: Sequence[Case],
    options: Options,
    say: Callable[[str], None],
    steps: Steps | None,
) -> list[Missing]:
    each, given = MEASUREMENTS[name], dict(options.get(name, {}))
    if steps is not None and "on_progress" in inspect.signature(each.measure).parameters:
        given["on_progress"] = steps.within
    failed = []

    def measured() -> pd.DataFrame:
        rows = each.measure(cases if each.between else cases[0], **given)
        check_rows(rows, () if each.drawn else ("metric", "value"))
        return rows

    try:
        if run.measure(stage_of(name, model), measured):
            say(name if model is None else f"{model}: {name}")
    except Exception as error:  # of many kinds; the other measurements stand
        reason = one_line(error) if isinstance(error, ProbeError) else f"{type(error).__name__}: {one_line(error)}"
        failed.append(Missing(name, model, "failed", reason))
        say(f"{name if model is None else f'{model}: {name}'} failed: {reason}")
    if steps is not None:
        steps.step()
    return failed


def measure_models(
    cases: Sequence[Case],
    folder: str | Path,
    names: Sequence[str] | None = None,
    *,
    options: Options | None = None,
    command: str = "measure",
    title: str = "Models measured",
    typed: str | None = None,
    settings: Mapping[str, Any] | None = None,
    lead: Sequence[Line] = (),
    first: Sequence[Section] = (),
    train_length: int | None = None,
    say: Callable[[str], None] = lambda line: None,
    on_progress: OnProgress = untold,
) -> pd.DataFrame:
    """Measure models and write rows and a report into a folder; return the rows.

    A measurement that a model cannot give what it needs is skipped, one that fails leaves the others alone; either is a
    row with the metric "skipped" or "failed" and its reason, and is told in the report. What an earlier run in the
    folder finished is not measured again. It is in the rows even where ``names`` does not ask for it, and so is what
    that run skipped.

    Args:
        cases: the models, each under a name of its own, with what they are measured on.
        folder: where rows and report go.
        names: of ``MEASUREMENTS``; by default all that are not measured only where they are asked for.
        options: by the name of a measurement, the keyword arguments of its function.
        command: whose folder it is, a name in ``probe.runs.COMMANDS``.
        title: of the report.
        typed: the command that makes the report again, as it was typed. The report names it together with the
            measurements of earlier runs in the folder.
        settings: what the report says of how it was made.
        lead: lines of the report's summary that stand first; by default which models were measured on what.
        first: sections of the report that stand first.
        train_length: of the models, where it is known.
        say: called with a line when a measurement is finished or has failed.
        on_progress: called with how many measurements are done, and how many there are.

    Raises:
        ProbeError: for an unknown measurement; where none of them can be made, or all fail; where the folder is another
            command's, or holds rows of other weights, sequences, seeds or options; where another process works there.

    Example:
        >>> case = Case("nope", [decoder], TracedSequences(tokens))
        >>> rows = measure_models([case], folder, ["geometry"])
        >>> rows["measurement"].unique().tolist()
        ['geometry']
    """
    options = options or {}
    plan = Plan.make(cases, names)
    if not len(plan):
        reasons = "; ".join(dict.fromkeys(f"{m.measurement}: {m.reason}" for m in plan.missing))
        raise ProbeError(f"nothing can be measured of these models ({reasons})")
    for case in cases:
        check_tokens(case)
    parts = dict(PARTS)
    for name, each in MEASUREMENTS.items():
        define(each.defines)
        if isinstance(each.part, Part):
            parts[name] = each.part
    with RunFolder.open(folder, command, identity_of(cases, options)) as run:
        steps, failed = Steps(len(plan), on_progress), []
        for case in cases:
            failed += measure_case(run, case, plan.of[case.name], options, say=say, steps=steps)
            case.release(twins=not plan.between)
        failed += measure_between(run, cases, plan.between, options, say=say, steps=steps)
        compared = [m for m in plan.missing if m.model is None] if len(cases) > 1 else []
        if compared and not plan.between:
            say(f"models not compared with each other: {compared[0].reason}")
        else:
            for skipped in compared:
                say(f"{skipped.measurement} skipped: {skipped.reason}")
        planned = {*((m.measurement, m.model) for m in plan.missing), *plan.pairs()}
        earlier = [m for m in missing_earlier(run) if (m.measurement, m.model) not in planned]
        earlier = [m for m in earlier if not run.file_of(stage_of(m.measurement, m.model)).exists()]
        results = collect(run, cases, [*plan.missing, *failed, *earlier], train_length=train_length)
        if failed and results.empty:
            raise ProbeError(failed[0].reason)
        made = made_on(cases[0].model, _again(typed, names, results) if command == "measure" else typed, settings)
        page = measured_page(title, results, made, lead=lead or [_measured_on(cases)], first=first, parts=parts)
        run.finish(results.rows, page, made.environment)
        return results.rows


def _again(typed: str | None, names: Sequence[str] | None, results: Results) -> str | None:
    """The command that makes all of a page again: as it was typed, with the measurements of earlier runs in the folder
    among those that it asks for.

    Args:
        typed: the command of the last run.
        names: the measurements that it asked for; None: all that are not measured only where they are asked for.
        results: what the page shows.
    """
    there = results.measurements
    asked = [name for name, each in MEASUREMENTS.items() if (not each.asked if names is None else name in names)]
    if typed is None or there <= {*asked}:
        return typed
    words, kept = shlex.split(typed), []
    while words:
        word = words.pop(0)
        flag, equals, _ = word.partition("=")
        if len(flag) > 2 and "--only".startswith(flag):
            words = words if equals else words[1:]
        else:
            kept.append(word)
    only = ",".join(name for name in MEASUREMENTS if name in there or name in asked)
    return shlex.join([*kept, "--only", only])


def _measured_on(cases: Sequence[Case]) -> Line:
    """Which models were measured, and on what, in words."""
    on: dict[str, list[str]] = {}
    for case in cases:
        n, length = case.tokens.shape
        on.setdefault(f"{n} sequences of {length} tokens ({case.traced.data})", []).append(case.name)
    said = [f"{', '.join(names)} on {what}" for what, names in on.items()]
    return Line("Measured", "Untrained twins, models of the same shape with fresh weights, are the control.", said)


def check_tokens(case: Case) -> None:
    """Refuse token ids that a model does not know."""
    least, most, d_vocab = int(case.tokens.min()), int(case.tokens.max()), d_vocab_of(case.model)
    if least < 0 or most >= d_vocab:
        raise ProbeError(f"{case.name}: token ids must lie in 0…{d_vocab - 1}, got {least}…{most}")


def made_on(model: nn.Module, typed: str | None, settings: Mapping[str, Any] | None = None) -> Made:
    """How a page is made, by what was typed, on the device of a model."""
    return Made(typed, settings=settings or {}, environment=environment(as_model(model).device))
