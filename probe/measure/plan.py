"""Plan which measurements are made of which models, with the reason for each that is not."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from probe.errors import ProbeError, unknown_name
from probe.measure.base import Case, Measurement
from probe.measure.registry import MEASUREMENTS
from probe.models.anatomy import n_heads_of, n_layers_of


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
            ProbeError: for an unknown measurement, no model, or two models with the same name.
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
                reason = _between(each, cases)
                if reason is None:
                    plan.between.append(name)
                else:
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

    def pairs(self) -> set[tuple[str, str | None]]:
        """Each measurement that will be made, with the model that it is of (None: all)."""
        of_one = {(name, model) for model, names in self.of.items() for name in names}
        return of_one | {(name, None) for name in self.between}


def stage_of(name: str, model: str | None) -> str:
    """The name of the stage of a measurement of a model, or of all models (None)."""
    return name if model is None else f"{name}-{model}"


def _between(each: Measurement, cases: Sequence[Case]) -> str | None:
    """Why models cannot be compared head by head, layer by layer, on the same tokens; None where they can."""
    if len(cases) < each.needs.models:
        return f"it needs at least {each.needs.models} models, got {len(cases)}"
    if reason := next(filter(None, map(each.missing, cases)), None):
        return reason
    if reason := each.refuses(cases):
        return reason
    if len({(n_layers_of(case.model), n_heads_of(case.model)) for case in cases}) > 1:
        return "it needs models with equal numbers of layers and heads"
    if not all(torch.equal(cases[0].tokens, case.tokens) for case in cases):
        return "it needs models with the same tokens"
    return None
