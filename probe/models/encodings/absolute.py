"""Encodings that are added to the token embeddings."""

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor, nn

from probe.config import check_number
from probe.errors import ProbeError
from probe.models.encodings.base import PositionEncoding


def sinusoids(positions: Int[Tensor, "pos"], d_model: int, base: float = 10000.0) -> Float64[Tensor, "pos d_model"]:
    """sin(p / base^(2i/d_model)) in dimension 2i, the cosine in 2i + 1. Vaswani et al. 2017, section 3.5."""
    even = torch.arange(0, d_model, 2)
    angle = positions[:, None].double() / base ** (even.double() / d_model)
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2)


class Learned(PositionEncoding):
    """A learned vector for each position 0…n_ctx-1, added to the embedding."""

    embeds = True

    def __init__(self, **dimensions: int):
        super().__init__(**dimensions)
        self.weight = nn.Parameter(torch.empty(self.n_ctx, self.d_model))
        self.last_position = self.n_ctx - 1

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        nn.init.normal_(self.weight, std=0.02, generator=generator)

    def embed(
        self, x: Float[Tensor, "batch pos d_model"], positions: Int[Tensor, "pos"]
    ) -> Float[Tensor, "batch pos d_model"]:
        last = int(positions.max())
        if last >= self.n_ctx:
            raise ProbeError(
                f"the learned position table has {self.n_ctx} positions (n_ctx), got a sequence that reaches position "
                f"{last}"
            )
        return x + self.weight[positions.to(x.device)]


class Sinusoidal(PositionEncoding):
    """``sinusoids`` of the position, added to the embedding. Vaswani et al. 2017, section 3.5."""

    embeds = True

    def __init__(self, *, base: float = 10000.0, **dimensions: int):
        super().__init__(**dimensions)
        check_number("base", base)
        if self.d_model % 2:
            raise ProbeError(f"sinusoidal positions want an even d_model, got {self.d_model}")
        self.base = base

    def embed(
        self, x: Float[Tensor, "batch pos d_model"], positions: Int[Tensor, "pos"]
    ) -> Float[Tensor, "batch pos d_model"]:
        return x + self.table(positions).to(x)

    def table(self, positions: Int[Tensor, "pos"]) -> Float64[Tensor, "pos d_model"]:
        """The encoding itself."""
        return sinusoids(positions, self.d_model, self.base)
