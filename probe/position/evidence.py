"""What speaks for and against each mechanism: the verdicts' evidence."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64
from sklearn.linear_model import LinearRegression
from torch import Tensor

from probe.position.geometry import ATTENTION_OUT, neighbour_similarity, variance_by_position
from probe.position.interventions import NORMAL, first_twice, mix_sequences
from probe.position.moments import precision
from probe.position.scores import Draws, r2
from probe.position.subject import Subject, decoded_shift, readout_sums
from probe.tracing import EMBED, PATTERN, RESID_POST, block_site, trace

# The thresholds of the verdicts; ``name_mechanism`` says where each stands.
READABLE = 0.3  # R² from which on position can be read
LOST = 0.5  # the share of an R² that must be gone for it to be lost
COUNTS = 0.25  # how far the slope of a head's log-odds may be from that of a counter, -1
SHIFTED = 0.1  # the share of the mean position by which a doubled <bos> must shift the decoded one; 1/2 if exact
DECAYS = 0.25  # the exponent that the fall of the variance must have at least
ALIKE = 0.5  # Spearman's correlation of the similarity of neighbours with nearness
SINK = 0.5  # the attention on the first key that makes a sink
FLAT = -0.5  # the slope of its log-odds from which on a sink does not count
MOVED = 0.15  # the share of the mean position by which a disturbance must move the decoded one
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

    def readout(self, subject: Subject, intervention: str, metric: str) -> float:
        return self.add(metric, subject.found[intervention][metric], intervention, subject.site)["value"]


Finding = tuple[bool, Callable[[], Disturbance] | None]


def _position(subject: Subject, evidence: Evidence) -> Finding:
    for name, outcome in subject.found.items():
        for metric, drawn in outcome.items():
            evidence.add(metric, drawn, name, subject.site)
    embedding = evidence.add("r2", r2(subject.draws.sequences @ subject.read(NORMAL, EMBED)[1]), NORMAL, EMBED)
    best = max(float(subject.found[name]["r2_refitted"][0]) for name in (NORMAL, "permuted_without_bos"))
    return _gone(best, embedding["value"]), None


def _bos_counter(subject: Subject, evidence: Evidence) -> Finding:
    if subject.bos is None:
        return False, None
    read = functools.partial(evidence.readout, subject)
    plain, dropped = read(NORMAL, "r2"), read("drop_bos", "r2")
    doubled, moved = (read("double_bos", "shift"), read("double_odds", "shift")), read("move_bos", "shift")
    read("constant", "r2")
    # The layer that counts: where doubled odds alone send the decoded position back furthest.
    edited = [subject.decode_under({block_site(i, PATTERN): first_twice}) for i in range(subject.n_layers)]
    layer = int(torch.stack([decoded_shift(sums.sum(0)) for sums in edited]).argmin())
    slopes = subject.attention["slope"]
    head = int((slopes[:, layer].mean(0) + 1).abs().argmin())
    counter = evidence.mean("log_odds_slope", slopes[:, layer, head], site=f"{block_site(layer, PATTERN)}[{head}]")
    available = (
        _gone(plain, dropped)
        and max(doubled) < -SHIFTED * subject.mean_position
        and moved > -(subject.test.shape[1] // 4) / 2
        and abs(counter["value"] + 1) < COUNTS
    )
    return available, lambda: _of_pattern(subject, layer, first_twice)


def _variance_decay(subject: Subject, evidence: Evidence) -> Finding:
    where, site = "permuted_without_bos", block_site(0, ATTENTION_OUT)
    traced = {part: trace(subject.model, subject.given(where, part)[1], [site]) for part in ("train", "test")}
    fitted = variance_by_position(traced["test"], [site], seed=subject.seed).query("metric == 'exponent'").iloc[0]
    value, low, high = fitted[["value", "low", "high"]]
    row = evidence.put("variance_exponent", value, low, high, where, site)
    centre = traced["train"][site].double().mean((0, 1))
    x = {part: _log_norm(each[site], centre) for part, each in traced.items()}
    log_t = torch.arange(1, subject.test.shape[1] + 1, dtype=torch.float64).log().numpy()
    line = LinearRegression().fit(x["train"].reshape(-1, 1), np.tile(log_t, len(x["train"])))
    group = np.repeat(np.arange(len(x["test"])), len(log_t))
    sums = readout_sums(line.predict(x["test"].reshape(-1, 1)), np.tile(log_t, len(x["test"])), group)
    readable = evidence.add("r2_log_position_from_norm", r2(subject.draws.sequences @ sums), where, site)
    available = row["low"] > DECAYS and readable["value"] >= READABLE

    def grown() -> Disturbance:
        # The fluctuation that stands at t has the size of that at t/2.
        train, test = (trace(subject.model, each, [site])[site] for each in (subject.train, subject.test))
        return turned(0, (2 ** (row["value"] / 2) - 1) * (test - train.mean(0)))

    return available, grown


def _neighbour_similarity(subject: Subject, evidence: Evidence) -> Finding:
    if subject.n_layers == 1:
        return False, None
    where, site = "permuted_without_bos", block_site(0, RESID_POST)
    traced = trace(subject.model, subject.given(where, "test")[1], [site])
    rows = neighbour_similarity(traced, [site], seed=subject.seed).query("control == 'none'")
    fitted = rows[rows["metric"] == "hidden_spearman"].iloc[0]
    value, low, high = fitted[["value", "low", "high"]]
    row = evidence.put("spearman_of_similarity", value, low, high, where, site)
    read = evidence.readout(subject, where, "r2_refitted")
    alone = evidence.readout(subject, "strangers_without_bos", "r2_refitted")
    available = row["low"] > ALIKE and _gone(read, alone)

    def mixed() -> Disturbance:
        x = trace(subject.model, subject.test, [block_site(0, ATTENTION_OUT)])[block_site(0, ATTENTION_OUT)]
        generator = torch.Generator().manual_seed(subject.seed)
        # The control has whole sequences of strangers: content is as wrong, neighbours are as alike as they were.
        return Disturbance(
            0, mix_sequences(x, generator) - x, lambda g: x[torch.randperm(len(x), generator=g)] - x, False
        )

    return available, mixed


def _attention_sink(subject: Subject, evidence: Evidence) -> Finding:
    mass, slope = (subject.attention[name].mean(0) for name in ("mass", "slope"))
    flat = mass.where(slope > FLAT, -1.0)
    layer, head = divmod(int(flat.argmax()), flat.shape[1])
    where = {"site": f"{block_site(layer, PATTERN)}[{head}]"}
    sink = evidence.mean("attention_on_first", subject.attention["mass"][:, layer, head], **where)
    evidence.mean("log_odds_slope", subject.attention["slope"][:, layer, head], **where)
    if sink["value"] < SINK or flat.max() < 0:
        return False, None
    heads = (flat[layer] >= SINK)[:, None, None]

    def cut(pattern: Float[Tensor, "batch head query key"]) -> Tensor:
        """The first key is hidden from the layer's sinks; the first query keeps it, and those that see nothing else."""
        rest = pattern.clone()
        rest[:, :, 1:, 0] = 0
        total = rest.sum(-1, keepdim=True)
        rest = torch.where(total > 0, rest / total.clamp(min=torch.finfo(rest.dtype).tiny), pattern)
        return torch.where(heads.to(pattern.device), rest, pattern)

    decoded = subject.draws.sequences @ subject.decode_under({block_site(layer, PATTERN): cut})
    without = evidence.add("r2", r2(decoded), "cut_sinks", subject.site)
    plain = evidence.readout(subject, NORMAL, "r2")
    return _gone(plain, without["value"]), lambda: _of_pattern(subject, layer, cut, False)


def _encoding(subject: Subject, evidence: Evidence) -> Finding:
    return evidence.readout(subject, "constant_without_bos", "r2_refitted") >= READABLE, None


MECHANISMS: dict[str, Callable[[Subject, Evidence], Finding]] = {
    "position": _position,
    "bos_counter": _bos_counter,
    "variance_decay": _variance_decay,
    "neighbour_similarity": _neighbour_similarity,
    "attention_sink": _attention_sink,
    "encoding": _encoding,
}


def _gone(before: float, after: float) -> bool:
    """Whether an R² at which position can be read has been lost."""
    return before >= READABLE and before - max(after, 0.0) >= LOST * before


def _log_norm(x: Float[Tensor, "batch pos d_model"], centre: Float64[Tensor, "d_model"]) -> np.ndarray:
    """ln ‖x - centre‖², not below what rounding makes of x."""
    rounding = precision(x.dtype) ** 2 * x.double().square().sum(-1).mean()
    least = max(float(rounding), torch.finfo(torch.float64).tiny)
    return (x.double() - centre).square().sum(-1).clamp(min=least).log().numpy()


def _of_pattern(subject: Subject, layer: int, edit: Callable[[Tensor], Tensor], pretends: bool = True) -> Disturbance:
    """What another pattern changes in its layer's attention output."""
    site = block_site(layer, ATTENTION_OUT)
    plain, _ = subject.run(subject.test, lambda rows: {}, site)
    edited, _ = subject.run(subject.test, lambda rows: {block_site(layer, PATTERN): edit}, site)
    return turned(layer, edited - plain, pretends)


def turned(layer: int, delta: Float[Tensor, "batch pos d_model"], pretends: bool = True) -> Disturbance:
    """The control is a change of equal size at every token, in directions that the change itself does not take.

    The principal directions of the change, 95 % of its squares (at most half of all directions), are turned into random
    ones that are orthogonal to them. Not just turned: in few dimensions a random direction has much of the true one.
    """
    flat = delta.flatten(0, 1).double()
    strength, directions = torch.linalg.eigh(flat.T @ flat)
    strength, directions = strength.flip(0), directions.flip(1)
    d_model = delta.shape[-1]
    k = min(int((strength.cumsum(0) < 0.95 * strength.sum()).sum()) + 1, d_model // 2)
    own, others = directions[:, :k], directions[:, k:]

    def turn(generator: torch.Generator) -> Tensor:
        random = torch.randn(d_model - k, k, generator=generator, dtype=torch.float64)
        turned = flat @ own @ (others @ torch.linalg.qr(random)[0]).T
        size = flat.norm(dim=-1, keepdim=True) / turned.norm(dim=-1, keepdim=True).clamp(min=1e-300)
        return (turned * size).view(delta.shape).to(delta)

    return Disturbance(layer, delta, turn, pretends)
