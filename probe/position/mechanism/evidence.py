"""The numbers that verdicts rest on, their thresholds, and what disturbs position."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from probe.position.mechanism.interventions import NORMAL
from probe.position.mechanism.readout import Readout
from probe.position.probes.scores import Draws

# The thresholds of the verdicts; ``name_mechanism`` says where each stands.
LOST = 0.5  # the share of an R² that must be gone for it to be lost
COUNTS = 0.25  # how far the slope of a head's log-odds may be from that of a counter, -1
SHIFTED = 0.1  # the share of the mean position by which a doubled <bos> must shift the decoded one; 1/2 if exact
DECAYS = 0.25  # the exponent that the fall of the variance must have at least
ALIKE = 0.5  # Spearman's correlation of the similarity of neighbours with nearness
SINK = 0.5  # the attention on the first key that makes a sink
FLAT = -0.5  # the slope of its log-odds from which on a sink does not count
MOVED = 0.15  # the share of the mean position by which a disturbance must move the decoded one
ACTS = 1e-4  # the share of the states' squares that must move for an encoding to act
WORTH = 0.01  # the share of what the model gains over token frequencies that a use must be worth
CONTROLS = 19  # disturbances of equal size; all must cost less than the real one: by chance 1 in 20


VERDICTS = ("nothing", "available", "used")
Row = dict[str, Any]
Rows = list[Row]


@dataclass(frozen=True)
class Disturbance:
    """What is added to the attention output of a layer: what disturbs position, and draws of as much that do not."""

    layer: int
    delta: Float[Tensor, "batch pos d_model"]
    control: Callable[[torch.Generator], Tensor]
    pretends: bool  # that a token stands at half its position: decoded positions must shift, and not only scatter


@dataclass
class Evidence:
    """The numbers that a verdict rests on."""

    draws: Draws
    rows: Rows

    def put(self, metric: str, value: float, low: float, high: float, intervention: str, site: str) -> Row:
        limits = {"value": float(value), "low": float(low), "high": float(high)}
        row = {"intervention": intervention, "site": site, "metric": metric, **limits}
        self.rows.append(row | {"n": self.draws.sequences.shape[1]})
        return self.rows[-1]

    def add(self, metric: str, drawn: Float64[Tensor, "draw"], intervention: str = NORMAL, site: str = "") -> Row:
        """A row out of its value on every draw."""
        value, low, high = self.draws.interval(drawn[:, None])
        return self.put(metric, value[0], low[0], high[0], intervention, site)

    def mean(self, metric: str, by_sequence: Float64[Tensor, "sequence"], **where: str) -> Row:
        return self.add(metric, self.draws.sequences @ by_sequence / len(by_sequence), **where)

    def read(self, readout: Readout, intervention: str, metric: str) -> float:
        return self.add(metric, readout.found[intervention][metric], intervention, readout.site)["value"]
