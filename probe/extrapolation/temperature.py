"""Attention temperatures: softmax(λ q·k / √d), with one λ for a model or one for every head.

Wang et al. 2024, section 3. λ q·k is linear in q, so λ is a factor of the rows of W_Q (and of its bias) that make a
head's queries. No line of the model changes, and the factor folds into the weights.
Biases that encodings add to scores (T5, ALiBi) are not scaled.
"""

import copy
import functools
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from probe.errors import ProbeError
from probe.extrapolation.odds import check_odds_scale
from probe.models.scaled import LOCK, is_scaled, restore_rows, scale_rows

Scales = float | Float[Tensor, "layer head"]
M = TypeVar("M", bound=nn.Module)


class HeadScale:
    """One λ for every head of a model, in the rows of its W_Q, until ``fold`` or ``remove``.

    The model is a ``Decoder``, a ``TransformerBridge`` of one, or any whose attention modules have a linear ``q_proj``
    and a ``head_dim``, as Hugging Face's Llama. ``scale`` is the one parameter, "layer head"; where every λ is 1 the
    model's weights are the same bit for bit. That λ does what it says is measured once, on random tokens.

    While λ is on, whoever reads the weights reads the products: ``widen``, ``plant``, ``variant``, ``state_dict`` and
    ``copy.deepcopy`` make ordinary models that compute what this one computes just now. ``save`` and ``to_bridge``
    refuse. A second scale on the same model is refused, from another thread, too.

    >>> with HeadScale(decoder, 1.2):
    ...     decoder(tokens)

    Raises:
        ProbeError: for a model without such modules, one whose log-odds are not multiplied by λ (it normalises, clips
            or caps behind W_Q), one that is scaled already, or scales that are not above 0 or not of shape (layer,
            head).
    """

    def __init__(self, model: nn.Module, scale: Scales = 1.0):
        attentions = query_projections(model)
        self._projections = [projection for _, projection, _ in attentions]
        n_heads = [_n_heads(projection, d_head) for _, projection, d_head in attentions]
        if len(set(n_heads)) > 1:
            raise ProbeError(f"all layers must have one number of heads, got {', '.join(map(str, n_heads))}")
        wanted = (len(n_heads), n_heads[0])
        values = torch.as_tensor(scale, dtype=torch.float32)
        if values.ndim and values.shape != wanted:
            raise ProbeError(f"scales must be one number or of shape {wanted} (layer, head), got {tuple(values.shape)}")
        if not ((values > 0) & values.isfinite()).all():
            raise ProbeError(f"scales must be numbers above 0, got {values.flatten().tolist()[:8]}")
        device = self._projections[0].weight.device
        self.scale = nn.Parameter(self._parameter(values.expand(wanted).to(device)))
        with LOCK:
            check_odds_scale(model, [(attention, projection) for attention, projection, _ in attentions])
            scale_rows(
                {linear: functools.partial(self._factor, layer) for layer, linear in enumerate(self._projections)}
            )

    def _parameter(self, values: Float[Tensor, "layer head"]) -> Tensor:
        return values.clone()

    def _factor(self, layer: int, rows: Tensor) -> Float[Tensor, "row"]:
        scale = self.by_head()[layer].to(rows.device)
        return scale.repeat_interleave(len(rows) // len(scale))

    def by_head(self) -> Float[Tensor, "layer head"]:
        """λ of every layer and head."""
        return self.scale

    @torch.no_grad()
    def clamp(self, least: float) -> None:
        """Lift every λ that is below to ``least``."""
        self.scale.clamp_(min=least)

    def fold(self) -> None:
        """Multiply the weights by λ for good: an ordinary model is left, and an ordinary checkpoint."""
        self._take_off(keep=True)

    def remove(self) -> None:
        """Take λ off; the weights are what they were."""
        self._take_off(keep=False)

    def _take_off(self, keep: bool) -> None:
        projections, self._projections = self._projections, []
        restore_rows(projections, keep)

    def __enter__(self) -> "HeadScale":
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()  # nothing is left to do where it was folded


class UniformScale(HeadScale):
    """One λ for the whole model; ``scale`` is a single number."""

    def __init__(self, model: nn.Module, scale: float = 1.0):
        super().__init__(model, scale)

    def _parameter(self, values: Float[Tensor, "layer head"]) -> Tensor:
        self._shape = values.shape
        return values[0, 0].clone()

    def by_head(self) -> Float[Tensor, "layer head"]:
        return self.scale.expand(self._shape)


def scaled(model: M, scale: Scales) -> M:
    """A copy of a model whose weights hold λ."""
    twin = copy.deepcopy(model)
    HeadScale(twin, scale).fold()
    return twin


def query_projections(model: nn.Module) -> list[tuple[nn.Module, nn.Linear, int]]:
    """Of every layer the attention module that is called, its W_Q, and the size of its heads.

    Raises:
        ProbeError: for a model in which they are not found, or which is scaled already.
    """
    if not isinstance(model, nn.Module):
        raise ProbeError(f"model must be a torch module, got {type(model).__name__}")
    found: list[tuple[nn.Module, nn.Linear, int]] = []
    for name, module in model.named_modules():
        projection, d_head = getattr(module, "q_proj", None), getattr(module, "head_dim", None)
        projection = getattr(projection, "original_component", projection)  # TransformerLens puts its own around it
        if not isinstance(projection, nn.Linear) or not isinstance(d_head, int):
            continue
        if any(projection is other for _, other, _ in found):
            continue
        if is_scaled(projection):
            raise ProbeError(f"{name} is scaled already: fold or remove that first")
        found.append((module, projection, d_head))
    if not found:
        raise ProbeError(
            "a scale needs a model with linear q_proj of heads of head_dim (a Decoder, its bridge, Hugging Face's "
            f"Llama), got {type(model).__name__}"
        )
    return found


def check_can_scale(model: nn.Module) -> None:
    """Refuse a model that has no queries that a ``HeadScale`` can scale.

    Raises:
        ProbeError: as ``HeadScale``.
    """
    with LOCK:
        check_odds_scale(model, [(attention, projection) for attention, projection, _ in query_projections(model)])


def can_scale(model: nn.Module) -> bool:
    """Whether a model has queries that a ``HeadScale`` can scale."""
    try:
        check_can_scale(model)
    except ProbeError:
        return False
    return True


def _n_heads(projection: nn.Linear, d_head: int) -> int:
    n_heads, rest = divmod(projection.out_features, d_head)
    if rest or not n_heads:
        raise ProbeError(f"queries must be heads of {d_head} dimensions, got {projection.out_features} dimensions")
    return n_heads
