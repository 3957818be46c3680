"""Which sequences a probe is fitted to and which it is scored on: never the same."""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from probe.config import check_number, check_size
from probe.errors import ProbeError
from probe.sequences import Integers, Sequences, TokenIds


@dataclass(frozen=True)
class Split:
    """Sequences to fit to and others to score on. ``fitted_length`` says that only the first so many tokens of the
    former are used, and that scores are wanted by position on up to four times as many."""

    name: str  #: "sequence", "length" or "distribution"
    train: Sequences  #: what is fitted to
    test: Sequences  #: what is scored on
    fitted_length: int | None = None

    def __post_init__(self) -> None:
        """Refuse a split that leaks, or that leaves too little on either side."""
        if len(self.train) < 2 or not len(self.test):
            raise ProbeError(
                f"a split wants at least 2 distinct sequences to fit to and 1 to score on, got {len(self.train)} and "
                f"{len(self.test)}"
            )
        shared = set(self.train.keys()) & set(self.test.keys())
        if shared:
            raise ProbeError(
                f"a split must not have the same sequence on both sides, got {len(shared)} that are, the first of "
                f"them {list(min(shared))[:8]}"
            )

    @classmethod
    def by_sequence(cls, tokens: TokenIds, lengths: Integers | None, test: float | Tensor, seed: int) -> "Split":
        """Whole sequences on either side: a share of them for the test, drawn by the seed, or those with the given
        indices. A sequence that occurs twice counts once; under indices that put it on both sides, the split leaks."""
        every = _of_two_tokens(tokens, lengths)
        if isinstance(test, Tensor):
            chosen = torch.zeros(len(every), dtype=torch.bool)
            chosen[test] = True
            return cls("sequence", every[~chosen].distinct(), every[chosen].distinct())
        check_number("test", test, 0, 1)
        every = every.distinct()
        if len(every) < 4:
            raise ProbeError(f"a position probe wants at least 4 distinct sequences, got {len(every)}")
        order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))
        n_test = min(max(1, round(test * len(every))), len(every) - 2)
        return cls("sequence", every[order[n_test:]], every[order[:n_test]])

    @classmethod
    def by_distribution(
        cls, tokens: TokenIds, lengths: Integers | None, test_tokens: TokenIds, test_lengths: Integers | None
    ) -> "Split":
        """All of one set of sequences to fit to, all of another to score on."""
        train = _of_two_tokens(tokens, lengths).distinct()
        test = _of_two_tokens(test_tokens, test_lengths, "test_tokens").distinct()
        return cls("distribution", train, test)

    def by_length(self, length: int) -> "Split":
        """The same split, fitted to the first ``length`` tokens of each sequence and scored on the first 4 · length."""
        check_size("fitted_length", length, least=2)
        longest = int(self.test.lengths.max())
        if longest <= length:
            raise ProbeError(f"fitted_length ({length}) must be below the longest test sequence, got {longest} tokens")
        return Split("length", self.train.cut(length), self.test.cut(4 * length), length)

    @property
    def edges(self) -> list[int]:
        """The borders of the bins of positions in which scores are kept apart: a quarter of ``fitted_length`` wide, or
        one bin for all."""
        longest = self.test.tokens.shape[1]
        if self.fitted_length is None:
            return [0, longest]
        quarters = (round(self.fitted_length * quarter / 4) for quarter in range(17))
        return sorted({min(edge, longest) for edge in quarters})


def _of_two_tokens(tokens: TokenIds, lengths: Integers | None, what: str = "tokens") -> Sequences:
    """Sequences of at least 2 tokens: position 0 alone is nothing to tell apart."""
    sequences = Sequences.of(tokens, lengths, what)
    if sequences.tokens.shape[1] < 2:
        shape = tuple(sequences.tokens.shape)
        raise ProbeError(f"a position probe needs sequences of at least 2 tokens, got {what} of shape {shape}")
    return sequences


def constant_tokens(d_vocab: int, length: int, *, bos: int | None = None) -> Int[Tensor, "sequence {length}"]:
    """A sequence x x x … for each token x, after ``bos`` where it is given (which is then no x)."""
    content = torch.tensor([token for token in range(d_vocab) if token != bos])
    tokens = content[:, None].repeat(1, length)
    if bos is not None:
        tokens[:, 0] = bos
    return tokens


def random_tokens(
    n: int, d_vocab: int, length: int, *, bos: int | None = None, seed: int = 0
) -> Int[Tensor, "{n} {length}"]:
    """Sequences of independent, uniform tokens, after ``bos`` where it is given (which then occurs nowhere else)."""
    content = torch.tensor([token for token in range(d_vocab) if token != bos])
    tokens = content[torch.randint(len(content), (n, length), generator=torch.Generator().manual_seed(seed))]
    if bos is not None:
        tokens[:, 0] = bos
    return tokens
