"""Any measurements on any models: planned, run in a folder that resumes, and put on one page."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import nn

from probe.attention import by_layer_encoding
from probe.errors import ProbeError, one_line, unknown_name
from probe.measure.base import Case, Measurement
from probe.measure.registry import MEASUREMENTS
from probe.models.anatomy import d_vocab_of, n_heads_of, n_layers_of
from probe.models.checkpoint import digest_of
from probe.models.identity import weights_digest
from probe.progress import OnProgress, Steps, untold
from probe.provenance import environment
from probe.report.glossary import define
from probe.report.measured import measured_page
from probe.report.page import Line, Made, Section
from probe.report.sections import PARTS, Part, Results
from probe.runs import RunFolder

Options = Mapping[str, Mapping[str, Any]]  # by the name of a measurement, what it is told

# What is split by what a layer sees, in models whose layers are of two kinds.
BY_KIND = {
    "needle": ("on_keys", "on_first", "on_recent", "elsewhere", "reach"),
    "census": ("induction", "sink", "previous_token", "window", "content", "uniform"),
}


class Missing(NamedTuple):
    """A measurement that was not made."""

    measurement: str
    model: str | None  #: None where it is of all models together
    metric: str  #: "skipped" or "failed"
    reason: str


@dataclass
class Plan:
    """What will be measured, and why the rest will not be."""

    of: dict[str, list[str]]  #: by model, the measurements of it alone
    between: list[str]  #: the measurements of all models together
    missing: list[Missing] = field(default_factory=list)

    @classmethod
    def make(cls, cases: Sequence[Case], names: Sequence[str] | None = None) -> "Plan":
        """Plan the measurements of these models; nothing is measured.

        Args:
            cases: the models, each under a name of its own.
            names: of ``MEASUREMENTS``; by default all that are not measured only where they are asked for.

        Raises:
            ProbeError: for a name that there is not, no model, or two models of one name.
        """
        for name in names or ():
            if name not in MEASUREMENTS:
                raise unknown_name("measurement", name, MEASUREMENTS)
        if not cases or len({case.name for case in cases}) < len(cases):
            raise ProbeError(
                f"models must have names, at least one and each its own, got {[case.name for case in cases]}"
            )
        chosen = [n for n, each in MEASUREMENTS.items() if (not each.asked if names is None else n in names)]
        plan = cls({case.name: [] for case in cases}, [])
        for name in chosen:
            each = MEASUREMENTS[name]
            if each.between:
                reason = _between(each, name, cases)
                if reason is None:
                    plan.between.append(name)
                elif names is not None or len(cases) > 1:
                    plan.missing.append(Missing(name, None, "skipped", reason))
                continue
            for case in cases:
                reason = each.missing(case)
                if reason is None:
                    plan.of[case.name].append(name)
                else:
                    plan.missing.append(Missing(name, case.name, "skipped", reason))
        return plan

    def __len__(self) -> int:
        return sum(map(len, self.of.values())) + len(self.between)

    def stages(self) -> Iterator[tuple[str, str | None, str]]:
        """Each measurement, the model that it is of (None: all), and the name of its stage in a folder."""
        for model, names in self.of.items():
            for name in names:
                yield name, model, f"{name}-{model}"
        for name in self.between:
            yield name, None, name


def _between(each: Measurement, name: str, cases: Sequence[Case]) -> str | None:
    """Why models cannot be compared head by head, layer by layer, on the same tokens; None where they can."""
    if len(cases) < each.needs.models:
        return f"it needs at least {each.needs.models} models, got {len(cases)}"
    if reason := next(filter(None, map(each.missing, cases)), None):
        return reason
    if name == "trained_t5" and not any(case.encoding == "t5" for case in cases):
        return "it needs a model with T5's encoding"
    if len({(n_layers_of(case.model), n_heads_of(case.model)) for case in cases}) > 1:
        return "it needs models with equal numbers of layers and heads"
    if not all(torch.equal(cases[0].tokens, case.tokens) for case in cases):
        return "it needs models with the same tokens"
    return None


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
        failed += _stage(run, f"{name}-{case.name}", name, case.name, [case], options, say, steps)
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
        failed += _stage(run, name, name, None, cases, options, say, steps)
    return failed


def _stage(
    run: RunFolder,
    stage: str,
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
    try:
        if run.measure(stage, lambda: each.measure(cases if each.between else cases[0], **given)):
            say(name if model is None else f"{model}: {name}")
    except Exception as error:  # of many kinds; the other measurements stand
        reason = one_line(error) if isinstance(error, ProbeError) else f"{type(error).__name__}: {one_line(error)}"
        failed.append(Missing(name, model, "failed", reason))
        say(f"{name if model is None else f'{model}: {name}'} failed: {reason}")
    if steps is not None:
        steps.step()
    return failed


def collect(
    run: RunFolder, cases: Sequence[Case], missing: Sequence[Missing] = (), *, train_length: int | None = None
) -> Results:
    """All that a folder has of these models: the rows, with measurement, model, encoding and data; and what is drawn.

    Args:
        run: the folder.
        cases: the models.
        missing: what was not measured, each of which becomes a row with its reason.
        train_length: of the models, where it is known.
    """
    parts: list[pd.DataFrame] = []
    drawings: dict[str, dict[str, pd.DataFrame]] = {}
    data = {case.name: case.traced.data for case in cases}
    for name, each in MEASUREMENTS.items():
        if each.between:
            if run.file_of(name).exists():
                # Models are compared with each other on the same tokens, so any of theirs says which.
                parts.append(run.rows(name).assign(measurement=name, data=cases[0].traced.data))
            continue
        for case in cases:
            stage = f"{name}-{case.name}"
            if not run.file_of(stage).exists():
                continue
            rows = run.rows(stage)
            if each.drawn:
                drawings.setdefault(name, {})[case.name] = rows
                continue
            keys = {"measurement": name, "model": case.name, "encoding": case.encoding, "data": data[case.name]}
            parts.append(rows.assign(**keys))
            if name in BY_KIND:
                parts += _by_kind(rows, name, keys)
    if missing:
        told = pd.DataFrame(missing)
        parts.append(told.assign(data=[data.get(m, cases[0].traced.data) for m in told["model"]]))
    rows = pd.concat(parts, ignore_index=True)
    for column in ("layer", "head"):  # missing where a row is of a model
        rows[column] = rows[column].astype("Int64") if column in rows else pd.Series(pd.NA, rows.index, "Int64")
    first = ["measurement", "model", "encoding"]
    return Results(rows[[*first, *(c for c in rows.columns if c not in first)]], drawings, train_length)


def _by_kind(rows: pd.DataFrame, name: str, keys: Mapping[str, str]) -> list[pd.DataFrame]:
    trained = rows[rows["control"] == "none"]
    if "layer_encoding" not in trained or trained["layer_encoding"].nunique() < 2:
        return []
    found = by_layer_encoding(trained, BY_KIND[name])
    return [found.assign(**{**keys, "measurement": "by_layer_encoding", "of": name})]


def identity_of(cases: Sequence[Case], options: Options) -> dict[str, Any]:
    """What the numbers of a folder depend on, as its record has it."""
    return {  # what a user said comes first, since a refusal names the first difference
        "seed": cases[0].seed,
        "options": {name: dict(given) for name, given in options.items() if given},
        "models": {case.name: [weights_digest(model) for model in case.models] for case in cases},
        "sequences": {case.name: _digest_of_data(case) for case in cases},
    }


def _digest_of_data(case: Case) -> str:
    tensors = {"tokens": case.tokens}
    if case.scored is not None:
        tensors["scored"] = case.scored
    if case.examples is not None:
        tensors["examples"] = case.examples.held_out.tokens
    if case.texts is not None:
        tensors["texts"] = case.texts.texts("test", case.texts.task.train_length, case.texts.n_texts).tokens
        settings = repr(asdict(case.texts)).encode()
        tensors["settings"] = torch.frombuffer(bytearray(settings), dtype=torch.uint8)
    return digest_of(tensors)


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
    row with the metric "skipped" or "failed" and its reason, and is told in the report. What is finished in the folder
    is not measured again, and is in the rows even where ``names`` does not ask for it.

    Args:
        cases: the models, each under a name of its own, with what they are measured on.
        folder: where rows and report go.
        names: of ``MEASUREMENTS``; by default all that are not measured only where they are asked for.
        options: by the name of a measurement, the keyword arguments of its function.
        command: whose folder it is, a name in ``probe.runs.COMMANDS``.
        title: of the report.
        typed: the command that makes the report again, as it was typed.
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
        if len(failed) == len(plan):
            raise ProbeError(failed[0].reason)
        if len(cases) > 1 and (apart := [m.reason for m in plan.missing if m.model is None]):
            say(f"models not compared with each other: {apart[0]}")
        asked = [m for m in plan.missing if names is not None and m.measurement in names]
        results = collect(run, cases, [*asked, *failed], train_length=train_length)
        made = made_on(cases[0].model, typed, settings)
        page = measured_page(title, results, made, lead=lead or [_measured_on(cases)], first=first, parts=parts)
        run.finish(results.rows, page, made.environment)
        return results.rows


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
    return Made(typed, settings=settings or {}, environment=environment(next(model.parameters()).device))
