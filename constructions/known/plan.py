"""The task that most models share: a shift of the token, and a mechanism that decides which."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from constructions.known.blueprint import late_units
from constructions.known.drawing import Draw, switching
from constructions.weights import Unit


@dataclass(frozen=True)
class Plan:
    """The constants of a model that adds a shift to its token, another one from each of some positions on."""

    n_content: int
    after: list[int]  #: from t = after[j] + 1 on the next shift holds
    shifts: list[int]  #: one more than ``after``
    gain: float  #: the logit of the predicted token
    noise: float  #: the share of random tokens

    @classmethod
    def draw(cls, draw: Draw, segments: int | None = None, first: int = 4) -> "Plan":
        """Two to four shifts, unless the number is given; the first holds up to t = ``first`` at least."""
        segments = draw.integer(2, 4) if segments is None else segments
        n_content = draw.integer(16, 28)
        after = sorted(draw.distinct(segments - 1, first, 20))
        shifts = draw.distinct(segments, 1, n_content - 1)
        return cls(n_content, after, shifts, draw.number(4, 7), draw.number(0.05, 0.2))

    def segment(self, past: Int[Tensor, "sequence past"]) -> Int[Tensor, "sequence"]:
        """The number of the shift that holds after so many tokens."""
        t = past.shape[1]
        return torch.full((len(past),), sum(t > at for at in self.after))

    def tokens(self, draw: Draw, n: int, *, bos: bool, fixed: bool = False) -> Int[Tensor, "sequence pos"]:
        """Sequences that follow the plan; with ``fixed``, its first shift everywhere."""

        def mode(past: Tensor) -> Tensor:
            return self.segment(past) * (not fixed)

        return switching(draw, n, self.n_content, self.shifts, mode, noise=self.noise, bos=bos)

    def late(self, x: int, rows: Sequence[int], value: Callable[[float], float]) -> list[Unit]:
        """Units that set ``rows[j]`` to 1 from t = after[j] + 1 on, where row ``x`` holds the monotone ``value(t)``."""
        return [
            unit
            for at, row in zip(self.after, rows, strict=True)
            for unit in late_units(x, row, value(at), value(at + 1))
        ]
