"""The free constants of a model and its tokens, drawn from seeds."""

import zlib
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float64, Int
from torch import Tensor

LENGTH = 32  #: tokens of a sequence
N_SEQUENCES = 64
FIRST = 1  #: the id of the first content token; id 0 is <bos>, or stands nowhere


class Draw:
    """Random constants that are a function of a name and a seed."""

    def __init__(self, name: str, seed: int):
        self.generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)

    def integer(self, low: int, high: int) -> int:
        """An integer in low…high."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def number(self, low: float, high: float) -> float:
        """A number between low and high."""
        return low + (high - low) * float(torch.rand((), generator=self.generator, dtype=torch.float64))

    def distinct(self, n: int, low: int, high: int) -> list[int]:
        """n different integers in low…high, in random order."""
        return (low + torch.randperm(high - low + 1, generator=self.generator)[:n]).tolist()

    def normal(self, *shape: int) -> Float64[Tensor, "..."]:
        """Standard normal numbers."""
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def signs(self, *shape: int) -> Float64[Tensor, "..."]:
        """-1 or 1, each with probability 1/2."""
        return 2.0 * torch.randint(2, shape, generator=self.generator).double() - 1

    def content(self, n: int, *shape: int) -> Int[Tensor, "..."]:
        """Content tokens out of 0…n-1, all equally likely."""
        return torch.randint(n, shape, generator=self.generator)

    def chance(self, probability: float, n: int) -> Tensor:
        """n flags, each true with that probability."""
        return torch.rand(n, generator=self.generator, dtype=torch.float64) < probability


#: Which shift the next token follows, 0-based and one for each sequence, from the content tokens so far (-1: <bos>).
Mode = Callable[[Int[Tensor, "sequence past"]], Int[Tensor, "sequence"]]


def switching(
    draw: Draw, n_sequences: int, n_content: int, shifts: Sequence[int], mode: Mode, *, noise: float, bos: bool
) -> Int[Tensor, "sequence pos"]:
    """Ids in which each token is the one before plus ``shifts[mode]``, modulo ``n_content``.

    With probability ``noise`` a token is random instead. The first token is <bos> or random, and so is the one after
    <bos>. Every token is equally likely at every place, so no token alone tells its position.
    """
    tokens = draw.content(n_content, n_sequences, LENGTH)
    table = torch.tensor(shifts)
    if bos:
        tokens[:, 0] = -1
    for p in range(1 + bos, LENGTH):
        follows = (tokens[:, p - 1] + table[mode(tokens[:, :p])]) % n_content
        tokens[:, p] = torch.where(draw.chance(noise, n_sequences), tokens[:, p], follows)
    return tokens + FIRST


def copying(
    draw: Draw,
    n_sequences: int,
    n_content: int,
    shift: int,
    kernel: Float64[Tensor, "query key"],
    *,
    noise: float,
    bos: bool = False,
) -> Int[Tensor, "sequence pos"]:
    """Ids in which each token is one of those before plus ``shift``, modulo ``n_content``: the token at key i follows
    on query t with probability ``kernel[t, i]``.

    With probability ``noise``, or where the key is <bos>, a token is random instead.
    """
    tokens = draw.content(n_content, n_sequences, LENGTH)
    if bos:
        tokens[:, 0] = -1
    for p in range(1, LENGTH):
        key = torch.multinomial(kernel[p - 1, :p], n_sequences, replacement=True, generator=draw.generator)
        copied = tokens.gather(1, key[:, None])[:, 0]
        random = draw.chance(noise, n_sequences) | (copied < 0)
        tokens[:, p] = torch.where(random, tokens[:, p], (copied + shift) % n_content)
    return tokens + FIRST
