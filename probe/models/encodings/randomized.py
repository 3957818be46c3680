"""Encodings by position, and what hands them other positions."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probe.config import check_size
from probe.errors import ProbeError
from probe.models.encodings.absolute import Learned, Sinusoidal
from probe.models.encodings.base import PositionEncoding, Rotation, build
from probe.models.encodings.bias import T5, Alibi, AlibiLearned, Fire, Kerple, Sandwich
from probe.models.encodings.content import TransformerXL
from probe.models.encodings.rotation import Rotary, XPos

# Those that randomized positions can be handed to. More of them here would move all places behind them in ENCODINGS.
POSITIONAL: dict[str, type[PositionEncoding]] = {
    "learned": Learned,
    "sinusoidal": Sinusoidal,
    "t5": T5,
    "alibi": Alibi,
    "rotary": Rotary,
    "alibi_learned": AlibiLearned,
    "transformer_xl": TransformerXL,
    "fire": Fire,
    "kerple": Kerple,
    "sandwich": Sandwich,
    "xpos": XPos,
}


MOST_POSITIONS = 2**24  # they are drawn from a list of all of them: 128 MiB


class Randomized(PositionEncoding):
    """Positions in order, but drawn from 0…max_position-1, for another encoding, the ``base``.

    In training each batch of sequences of n tokens has n positions drawn without replacement and sorted, so that those
    of longer sequences are seen, too. Ruoss et al. 2023, section 3. The paper draws at test time as well; here a
    sequence has the first n of n_ctx positions that are drawn once, the same in every model: measurements can be
    repeated, and a sequence that grows keeps the positions that it has, as a cache of keys wants (with a cache they are
    the fixed ones in training, too). Sequences of more than n_ctx tokens are refused.
    """

    def __init__(
        self,
        *,
        base: str = "learned",
        base_options: dict[str, Any] | None = None,
        max_position: int = 2048,
        **dimensions: int,
    ):
        super().__init__(**dimensions)
        check_size("max_position", max_position, most=MOST_POSITIONS)
        if max_position < self.n_ctx:
            raise ProbeError(f"max_position ({max_position}) must be at least n_ctx ({self.n_ctx})")
        if not isinstance(base_options, dict | None):
            raise ProbeError(f"base_options must be a mapping, got {base_options!r}")
        dimensions["n_ctx"] = max_position
        self.base = build(POSITIONAL, "base of randomized positions", base, base_options or {}, **dimensions)
        self.embeds, self.reads_content = self.base.embeds, self.base.reads_content
        self.last_position = self.base.last_position
        self.max_position = max_position
        # A plain attribute, not a buffer: it follows from the config and does not belong in checkpoints.
        generator = torch.Generator("cpu").manual_seed(0)
        drawn = torch.randperm(max_position, generator=generator, device="cpu")[: self.n_ctx]
        self.fixed = drawn.sort().values

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        self.base.reset_parameters(generator)

    def positions(self, n: int, *, random: bool) -> Int[Tensor, "n"]:
        if n > self.n_ctx:
            raise ProbeError(f"randomized positions are drawn for at most {self.n_ctx} tokens (n_ctx), got {n}")
        return torch.randperm(self.max_position)[:n].sort().values if random else self.fixed[:n]

    def embed(
        self, x: Float[Tensor, "batch pos d_model"], positions: Int[Tensor, "pos"]
    ) -> Float[Tensor, "batch pos d_model"]:
        return self.base.embed(x, positions)

    def rotation(self, positions: Int[Tensor, "pos"], like: Tensor) -> Rotation | None:
        return self.base.rotation(positions, like)

    def decay(self, positions: Int[Tensor, "pos"], like: Tensor) -> Float[Tensor, "pos d_head"] | None:
        return self.base.decay(positions, like)

    def bias(
        self, query: Int[Tensor, "query"], key: Int[Tensor, "key"], like: Tensor
    ) -> Float[Tensor, "head query key"] | None:
        return self.base.bias(query, key, like)

    def content_bias(
        self,
        layer: int,
        q: Float[Tensor, "batch head query d_head"],
        k: Float[Tensor, "batch head key d_head"],
        query: Int[Tensor, "query"],
        key: Int[Tensor, "key"],
        scale: float,
    ) -> Float[Tensor, "batch head query key"]:
        return self.base.content_bias(layer, q, k, query, key, scale)
