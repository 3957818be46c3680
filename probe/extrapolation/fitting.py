"""Finding attention temperatures: by a grid, by gradients as the paper trains them, or by search without gradients."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from probe.config import check_number, check_size
from probe.deprecation import old_arguments, old_field
from probe.device import fast_products, gradients
from probe.errors import ProbeError
from probe.extrapolation.temperature import HeadScale, UniformScale
from probe.models.mode import evaluating
from probe.shown import Shown
from probe.statistics import N_BOOTSTRAP
from probe.training.data import BatchOrder, EncodedExamples, Feed, at_once
from probe.training.forced import Scores, beside_baseline, forced_scores

SCALES = (1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.8, 2.0)


@dataclass(frozen=True)
class ScaleTraining:
    """How the scales of heads are trained. The defaults are Wang et al. 2024, section 3.2 and appendix.

    AdamW without weight decay, β = (.9, .95), a linear warm-up, then a cosine to a tenth of the rate; after each step
    λ is lifted to ``least``. The paper's ablation leaves out that limit (``least`` None) or the initial value
    (``initial`` 1).
    """

    initial: float = 1.6  #: the best uniform scale, for four times the trained length
    least: float | None = 1.0
    steps: int = 200  #: of the optimizer
    warmup: int = 20  #: steps in which the rate rises
    learning_rate: float = 0.1  #: the highest, at the end of the warm-up
    batch_size: int = 8  #: sequences of a step
    accumulation: int = 1  #: parts of a batch that go through the model one after the other
    seed: int = 0  #: of the order of the data

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation"):
            check_size(name, getattr(self, name))
        for name in ("warmup", "seed"):
            check_size(name, getattr(self, name), least=0)
        for name in ("initial", "learning_rate"):
            check_number(name, getattr(self, name))
        if self.least is not None:
            check_number("least", self.least)
            if self.initial < self.least:
                raise ProbeError(f"initial ({self.initial:g}) must be at least least ({self.least:g})")

    def rate(self, step: int) -> float:
        """The learning rate of step 0, 1, …"""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2)


@dataclass(frozen=True)
class FittedScale(Shown):
    """The scales that were found, and how."""

    scale: Float[Tensor, "layer head"]  #: λ of every head
    rows: pd.DataFrame  #: of a training: step, loss, learning_rate, least, mean, most; of a search: evaluation, loss
    log = old_field("log", "rows")


@old_arguments(config="training")
def train_scale(
    model: nn.Module,
    data: EncodedExamples,
    training: ScaleTraining | None = None,
    *,
    uniform: bool = False,
    on_log: Callable[[dict[str, Any]], None] | None = None,
) -> FittedScale:
    """Train one λ a head, or one in all, on the loss of ``data``, with every weight of the model frozen.

    Wang et al. 2024, section 3.2: the data are sequences of the length that is to be reached. The model itself is left
    as it was: ``scaled(model, fit.scale)`` has the result in its weights. The same numbers at every call, on a CPU.

    Args:
        model: any model whose heads can be scaled: ``can_scale`` tells.
        data: sequences with their scored tokens.
        training: the first value of λ, its lower limit, steps, batches and rates; ``ScaleTraining()`` where None.
        uniform: train one λ for all heads instead of one per head.
        on_log: called with the row of ``rows`` of each step.

    Raises:
        ProbeError: for a model without scalable heads, or a loss that stops being finite.
    """
    EncodedExamples.check(data)
    training = training or ScaleTraining()
    device, d_vocab = device_of(model), vocabulary_of(model)
    kind = UniformScale if uniform else HeadScale
    entries = []
    with gradients(), fast_products(device), _frozen(model), kind(model, training.initial) as scales:
        order = BatchOrder(data.lengths, training.batch_size, training.seed)
        parts = math.ceil(order.batch_size / at_once(order.batch_size, data.tokens.shape[1], d_vocab))
        feed = Feed(data, order, device, min(max(training.accumulation, parts), order.batch_size))
        optimizer = torch.optim.AdamW([scales.scale], lr=training.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
        for step in range(training.steps):
            for group in optimizer.param_groups:
                group["lr"] = training.rate(step)
            share, loss = feed.share(step), 0.0
            for part in share.micro_batches:
                logits = logits_of(model, part.inputs).flatten(0, 1).index_select(0, part.scored).float()
                part_loss = F.cross_entropy(logits, part.targets, reduction="sum") / share.n_scored
                part_loss.backward()
                loss += float(part_loss.detach())
            if not math.isfinite(loss):
                raise ProbeError(f"the loss became {loss} at step {step + 1}: a smaller learning_rate is wanted")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if training.least is not None:
                scales.clamp(training.least)
            values = scales.by_head().detach()
            entry = {"step": step + 1, "loss": loss, "learning_rate": training.rate(step)}
            entry |= {"least": float(values.min()), "mean": float(values.mean()), "most": float(values.max())}
            entries.append(entry)
            if on_log is not None:
                on_log(entry)
        found = scales.by_head().detach().cpu().clone()
    return FittedScale(found, pd.DataFrame(entries))


def search_scale(
    model: nn.Module,
    data: EncodedExamples,
    *,
    initial: float = 1.2,
    bounds: tuple[float, float] = (1.0, 4.0),
    evaluations: int = 300,
    batch_size: int = 8,
) -> FittedScale:
    """One λ a head without gradients: the least mean loss on ``data``, by scipy's COBYQA (Ragonneau & Zhang 2023),
    within ``bounds``. For small models: it wants at least 2 n + 3 evaluations for n heads.

    Raises:
        ProbeError: for bounds or an initial value out of order.
    """
    from scipy.optimize import Bounds, minimize

    EncodedExamples.check(data)
    low, high = bounds
    if not 0 < low <= initial <= high:
        raise ProbeError(f"0 < low <= initial <= high was wanted, got {low:g}, {initial:g}, {high:g}")
    check_size("evaluations", evaluations)
    entries: list[dict[str, Any]] = []
    with HeadScale(model, initial) as scales:
        shape = scales.scale.shape

        def loss(logs: np.ndarray) -> float:
            with torch.no_grad():
                scales.scale.copy_(torch.as_tensor(np.exp(logs), dtype=torch.float32).view(shape))
            found = scale_losses(model, data, batch_size=batch_size)
            entries.append({"evaluation": len(entries) + 1, "loss": float(found["loss"].sum() / found["scored"].sum())})
            return entries[-1]["loss"]

        start = np.full(shape.numel(), math.log(initial))
        result = minimize(
            loss, start, method="COBYQA", bounds=Bounds(math.log(low), math.log(high)), options={"maxfev": evaluations}
        )
    return FittedScale(torch.as_tensor(np.exp(result.x), dtype=torch.float32).view(shape), pd.DataFrame(entries))


def sweep_scale(
    model: nn.Module,
    data: EncodedExamples,
    scales: Sequence[float] = SCALES,
    *,
    batch_size: int = 8,
    n_bootstrap: int = N_BOOTSTRAP,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """What uniform scales make of the same sequences: loss, and exact match given the right tokens before.

    Metrics: "loss" (nats a scored token), "token_accuracy", and "exact_match" (the share of sequences whose every
    scored token is the likeliest: those that greedy decoding gets right), each again as its change from λ = 1,
    "loss_change" and so on, paired. λ = 1 is always run.

    Returns:
        Columns scale, metric, value, low, high, n (distinct sequences): bootstrap intervals over sequences.
    """
    EncodedExamples.check(data)
    if not len(data):
        raise ProbeError("at least one sequence is needed, got none")
    data, found = data.distinct(), {}
    for scale in dict.fromkeys((1.0, *map(float, scales))):
        with UniformScale(model, scale):
            found[scale] = scale_losses(model, data, batch_size=batch_size)
    wanted = [*map(float, scales)]
    return beside_baseline("scale", found, wanted, 1.0, n_bootstrap=n_bootstrap, confidence=confidence, seed=seed)


def best_scale(rows: pd.DataFrame, metric: str = "loss") -> float:
    """The scale of the least loss, or of the greatest share, among the rows of ``sweep_scale``."""
    of = rows[rows["metric"] == metric].set_index("scale")["value"]
    if of.empty:
        raise ProbeError(f"rows of {metric!r} were wanted, got those of {', '.join(sorted(set(rows['metric'])))}")
    return float(of.idxmin() if metric == "loss" else of.idxmax())


def scale_losses(model: nn.Module, data: EncodedExamples, *, batch_size: int = 8) -> Scores:
    """``forced_scores`` of any model."""
    device = device_of(model)
    with evaluating(model):
        return forced_scores(lambda inputs: logits_of(model, inputs.to(device)), data, batch_size=batch_size)


def logits_of(model: nn.Module, tokens: Tensor) -> Float[Tensor, "batch pos d_vocab"]:
    """The logits of a model of ours, of a bridge, or of Hugging Face's, whose call returns them with other things."""
    out = model(tokens)
    return out if isinstance(out, Tensor) else out.logits


def device_of(model: nn.Module) -> torch.device:
    """Where a model's weights are.

    Raises:
        ProbeError: for what is no torch module with weights.
    """
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    if parameter is None:
        raise ProbeError(f"model must be a torch module with weights, got {type(model).__name__}")
    return parameter.device


def vocabulary_of(model: nn.Module) -> int:
    """How many tokens a model gives logits for, as it does for one token.

    Raises:
        ProbeError: for what does not map ids "batch pos" to logits "batch pos d_vocab".
    """
    ids = torch.zeros(1, 1, dtype=torch.long, device=device_of(model))
    said = ""
    try:
        with torch.no_grad(), evaluating(model):
            logits = logits_of(model, ids)
        if isinstance(logits, Tensor) and logits.ndim == 3 and logits.shape[:2] == (1, 1):
            return logits.shape[-1]
    except Exception as error:  # of any kind: the module is the user's own
        said = f": {type(error).__name__}: {' '.join(str(error).split())[:100]}"
    raise ProbeError(
        f"model must map ids (batch, pos) to logits (batch, pos, d_vocab), got {type(model).__name__}{said}"
    )


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter of the model asks for a gradient, and nothing is dropped, inside."""
    asked = [(p, p.requires_grad) for p in model.parameters()]
    model.requires_grad_(False)
    try:
        with evaluating(model):
            yield
    finally:
        for parameter, requires_grad in asked:
            parameter.requires_grad_(requires_grad)
