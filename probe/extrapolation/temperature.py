"""Attention temperatures: softmax(λ q·k / √d), with one λ for a model or one for every head.

Wang et al. 2024, section 3. λ q·k is linear in q, so λ is a factor of the rows of W_Q (and of its bias) that make a
head's queries: a parametrisation of the weights, under which no line of the model changes, and which folds into them.
Biases that encodings add to scores (T5, ALiBi) are not scaled.
"""

import copy
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from probe.errors import ProbeError

Scales = float | Float[Tensor, "layer head"]
M = TypeVar("M", bound=nn.Module)


class HeadScale:
    """One λ for every head of a model, in the rows of its W_Q, until ``fold`` or ``remove``.

    The model is a ``Decoder``, a ``TransformerBridge`` of one, or any whose attention modules have a linear ``q_proj``
    and a ``head_dim``, as Hugging Face's Llama. ``scale`` is the one parameter, "layer head"; where every λ is 1 the
    model's weights are the same bit for bit.

    >>> with HeadScale(decoder, 1.2):
    ...     decoder(tokens)

    Raises:
        ProbeError: for a model without such modules, one that normalises its queries behind W_Q (a factor would be
            lost there), one that is scaled already, or scales that are not above 0 or not of shape (layer, head).
    """

    def __init__(self, model: nn.Module, scale: Scales = 1.0):
        self._projections = query_projections(model)
        n_heads = [_n_heads(projection, d_head) for projection, d_head in self._projections]
        if len(set(n_heads)) > 1:
            raise ProbeError(f"layers of one number of heads were wanted, got {', '.join(map(str, n_heads))}")
        wanted = (len(n_heads), n_heads[0])
        values = torch.as_tensor(scale, dtype=torch.float32)
        if values.ndim and values.shape != wanted:
            raise ProbeError(f"scales must be one number or of shape {wanted} (layer, head), got {tuple(values.shape)}")
        if not ((values > 0) & values.isfinite()).all():
            raise ProbeError(f"scales must be numbers above 0, got {values.flatten().tolist()[:8]}")
        device = self._projections[0][0].weight.device
        self.scale = nn.Parameter(self._parameter(values.expand(wanted).to(device)))
        for layer, (projection, _) in enumerate(self._projections):
            for name in ("weight", "bias"):
                if getattr(projection, name, None) is not None:
                    parametrize.register_parametrization(projection, name, _OfHeads(self, layer))

    def _parameter(self, values: Float[Tensor, "layer head"]) -> Tensor:
        return values.clone()

    def by_head(self) -> Float[Tensor, "layer head"]:
        """λ of every layer and head."""
        return self.scale

    @torch.no_grad()
    def clamp(self, least: float) -> None:
        """Lift every λ that is below to ``least``."""
        self.scale.clamp_(min=least)

    def fold(self) -> None:
        """Multiply the weights by λ for good: an ordinary model is left, and an ordinary checkpoint."""
        self._take_off(leave_parametrized=True)

    def remove(self) -> None:
        """Take λ off; the weights are what they were."""
        self._take_off(leave_parametrized=False)

    def _take_off(self, leave_parametrized: bool) -> None:
        for projection, _ in self._projections:
            for name in ("weight", "bias"):
                if parametrize.is_parametrized(projection, name):
                    parametrize.remove_parametrizations(projection, name, leave_parametrized=leave_parametrized)
        self._projections = []

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


class _OfHeads(nn.Module):
    """The rows of W_Q, or of its bias, that make each head's queries, times the λ of that head."""

    def __init__(self, scales: HeadScale, layer: int):
        super().__init__()
        # In a tuple, so that λ is no parameter of the model's: optimizers and checkpoints of the model do not see it.
        self._scales, self._layer = (scales,), layer

    def forward(self, rows: Tensor) -> Tensor:
        scale = self._scales[0].by_head()[self._layer]
        scale = scale.repeat_interleave(len(rows) // len(scale))
        return (rows * scale.view(-1, *[1] * (rows.ndim - 1))).to(rows.dtype)


def scaled(model: M, scale: Scales) -> M:
    """A copy of a model whose weights hold λ."""
    twin = copy.deepcopy(model)
    HeadScale(twin, scale).fold()
    return twin


def query_projections(model: nn.Module) -> list[tuple[nn.Linear, int]]:
    """W_Q of every layer, and the size of its heads.

    Raises:
        ProbeError: for a model in which they are not found, or in which scaling them would do nothing, or twice.
    """
    found: list[tuple[nn.Linear, int]] = []
    for name, module in model.named_modules():
        projection, d_head = getattr(module, "q_proj", None), getattr(module, "head_dim", None)
        projection = getattr(projection, "original_component", projection)  # TransformerLens puts its own around it
        if not isinstance(projection, nn.Linear) or not isinstance(d_head, int):
            continue
        if any(projection is other for other, _ in found):
            continue
        if isinstance(getattr(module, "q_norm", None), nn.Module):
            raise ProbeError(f"{name} normalises its queries behind W_Q: a scale in its rows would be lost there")
        if parametrize.is_parametrized(projection):
            raise ProbeError(f"{name} is scaled already: fold or remove that first")
        found.append((projection, d_head))
    if not found:
        raise ProbeError(
            "a model with linear q_proj of heads of head_dim was wanted (a Decoder, its bridge, Hugging Face's Llama), "
            f"got {type(model).__name__}"
        )
    return found


def can_scale(model: nn.Module) -> bool:
    """Whether a model has queries that a ``HeadScale`` can scale."""
    try:
        query_projections(model)
    except ProbeError:
        return False
    return True


def _n_heads(projection: nn.Linear, d_head: int) -> int:
    n_heads, rest = divmod(projection.out_features, d_head)
    if rest or not n_heads:
        raise ProbeError(f"queries of heads of {d_head} were wanted, got {projection.out_features} dimensions")
    return n_heads
