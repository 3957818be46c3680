"""Sequences of token ids: the one door through which they come in, and the one rule of which of them count.

The rule: a measurement counts each distinct sequence once. A sequence that is given twice is the same observation, so
it makes no interval narrower, and no sequence is both fitted to and measured. ``n`` is the number that counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from probe.errors import ProbeError


@runtime_checkable
class HasTokens(Protocol):
    """What holds token ids, as ``EncodedExamples`` and ``Trace`` do."""

    @property
    def tokens(self) -> Tensor: ...


#: What public functions take for token ids "batch pos": a tensor or an array of integers of any kind, lists of equal
#: length, or what holds such a tensor as its ``tokens``.
TokenIds = Tensor | np.ndarray | Sequence[Any] | HasTokens
#: Likewise for lengths and indices.
Integers = Tensor | np.ndarray | Sequence[Any]


def token_ids(tokens: TokenIds, what: str = "tokens") -> Int[Tensor, "batch pos"]:
    """Token ids as int64, one row per sequence, on the device where they were.

    Args:
        tokens: integers of any kind: a tensor, a numpy array, lists of equal length, or what has such a tensor as its
            ``tokens`` (``EncodedExamples``, ``Trace``).
        what: what the caller calls them, for the error.

    Raises:
        ProbeError: for anything else: floats, booleans, a tensor without values, lists of different lengths, no token.
    """
    ids = _integers(getattr(tokens, "tokens", tokens), what, "pad them on the right and pass lengths=")
    if ids.ndim != 2 or not ids.numel():
        raise ProbeError(f"{what} must hold at least one sequence of one token, got shape {tuple(ids.shape)}")
    return ids


def check_ids(ids: Int[Tensor, "*shape"], d_vocab: int) -> None:
    """Refuse ids that a model of so many tokens does not know.

    Raises:
        ProbeError: for an id outside 0…d_vocab - 1.
    """
    least, most = (int(x) for x in torch.aminmax(ids))
    if least < 0 or most >= d_vocab:
        raise ProbeError(f"token ids must lie in 0…{d_vocab - 1}, got {least}…{most}")


def checked_lengths(lengths: Integers | None, batch: int, n: int) -> Int[Tensor, "batch"]:
    """The lengths of that many sequences of n tokens, as int64; all n where there are none.

    Raises:
        ProbeError: for anything but an integer in 1…n for each sequence.
    """
    if lengths is None:
        return torch.full((batch,), n)
    numbers = _integers(lengths, "lengths", "one number for each sequence is needed")
    if numbers.shape != (batch,) or int(numbers.min()) < 1 or int(numbers.max()) > n:
        given = numbers.tolist() if numbers.numel() <= 20 else f"shape {tuple(numbers.shape)}"
        raise ProbeError(f"lengths must be {batch} numbers in 1…{n}, got {given}")
    return numbers


def _integers(given: Any, what: str, ragged: str) -> Int[Tensor, "..."]:
    """Integers of any kind as int64."""
    if isinstance(given, Tensor):
        if given.is_meta or given.is_nested or given.layout != torch.strided or given.is_quantized:
            kinds = {"meta": given.is_meta, "nested": given.is_nested, "quantized": given.is_quantized}
            kind = next((name for name, holds in kinds.items() if holds), str(given.layout).removeprefix("torch."))
            raise ProbeError(f"{what} must be a dense tensor with values, got a {kind} tensor")
        if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
            raise ProbeError(f"{what} must be integers, got {given.dtype}")
        return given.long()
    if isinstance(given, np.ma.MaskedArray):
        raise ProbeError(f"{what} must be integers without a mask, got a masked array: pass lengths= for padding")
    try:
        array = np.asarray([each.tolist() if isinstance(each, Tensor) else each for each in given])
    except (TypeError, ValueError):  # nothing to iterate over, or rows of different lengths
        if not isinstance(given, (list, tuple)):
            raise ProbeError(f"{what} must be integers, got {type(given).__name__}") from None
        raise ProbeError(f"{what} must be lists of integers of equal length: {ragged}") from None
    if array.size and array.dtype.kind not in "iu":
        raise ProbeError(f"{what} must be integers, got {_kind(given, array)}")
    return torch.from_numpy(array.astype(np.int64))


def _kind(given: Any, array: np.ndarray) -> str:
    if isinstance(given, np.ndarray) or array.dtype.kind not in "OUS":
        return str(array.dtype)
    return type(given).__name__


def valid_rows(lengths: Int[Tensor, "batch"], n_query: int) -> Bool[Tensor, "batch query"]:
    """True where the query row belongs to the sequence, False where it is padding."""
    return torch.arange(n_query, device=lengths.device) < lengths[:, None]


def first_of_each(
    tokens: Int[Tensor, "batch pos"], lengths: Int[Tensor, "batch"] | None = None, *marks: Tensor | None
) -> Int[Tensor, "kept"]:
    """The rows of the sequences that are not like an earlier one, in order: what counts, by the rule above. Arguments
    are those of ``first_like_each``."""
    return first_like_each(tokens, lengths, *marks).unique()


def first_like_each(
    tokens: Int[Tensor, "batch pos"], lengths: Int[Tensor, "batch"] | None = None, *marks: Tensor | None
) -> Int[Tensor, "batch"]:
    """For each sequence, the row of the first one that is like it: its own, unless it has been there before.

    Args:
        tokens: ids, right-padded.
        lengths: how many tokens of each sequence count; padding is not compared.
        marks: what else must be equal for two sequences to be the same observation, a row per sequence (which tokens
            are scored, say).
    """
    rows = tokens
    if lengths is not None:
        rows = torch.cat((tokens.where(valid_rows(lengths, tokens.shape[1]), -1), lengths[:, None]), dim=1)
    rows = torch.cat([rows, *(mark.reshape(len(rows), -1).to(rows) for mark in marks if mark is not None)], dim=1)
    _, number = rows.unique(dim=0, return_inverse=True)
    first = torch.full((int(number.max()) + 1,), len(rows), device=rows.device)
    at = torch.arange(len(rows), device=rows.device)
    return first.scatter_reduce(0, number, at, "amin")[number]


def marked(name: str, marks: Bool[Tensor, "..."] | None, tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
    """A mark for each token, on the CPU; all are marked where None.

    Raises:
        ProbeError: for anything but booleans of the tokens' shape.
    """
    if marks is None:
        return torch.ones(tokens.shape, dtype=torch.bool)
    if not isinstance(marks, Tensor) or marks.dtype != torch.bool or marks.shape != tokens.shape:
        got = f"{marks.dtype} {tuple(marks.shape)}" if isinstance(marks, Tensor) else type(marks).__name__
        raise ProbeError(f"{name} must be booleans of the tokens' shape {tuple(tokens.shape)}, got {got}")
    return marks.cpu()


@dataclass(frozen=True)
class Sequences:
    """Token ids, right-padded, on the CPU, with the number that counts in each."""

    tokens: Int[Tensor, "batch pos"]
    lengths: Int[Tensor, "batch"]

    @classmethod
    def of(cls, tokens: TokenIds, lengths: Integers | None = None, what: str = "tokens") -> "Sequences":
        """Sequences as they were given; the lengths of what has ``lengths`` itself, where none are given.

        Raises:
            ProbeError: for anything but integer ids "sequence pos" (``token_ids``), or lengths that do not fit.
        """
        ids = token_ids(tokens, what).cpu()
        lengths = getattr(tokens, "lengths", None) if lengths is None else lengths
        return cls(ids, checked_lengths(lengths, *ids.shape).cpu())

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, which: Tensor) -> "Sequences":
        return Sequences(self.tokens[which], self.lengths[which])

    def first(self, n: int) -> "Sequences":
        return Sequences(self.tokens[:n], self.lengths[:n])

    def keys(self) -> list[tuple[int, ...]]:
        """What makes two sequences the same."""
        pairs = zip(self.tokens.tolist(), self.lengths.tolist(), strict=True)
        return [tuple(sequence[:length]) for sequence, length in pairs]

    def distinct(self) -> "Sequences":
        """Those that are not like an earlier one."""
        return self[first_of_each(self.tokens, self.lengths)]

    def cut(self, length: int) -> "Sequences":
        """The first tokens of each."""
        return Sequences(self.tokens[:, :length], self.lengths.clamp(max=length))
