"""How much is computed, held or read at once: block sizes, memory limits and step limits, in one place.

Blocks bound memory and fit a cache; a number that is measured depends on them by rounding at the most. The exception is
in the names that begin with ``dense_``: they decide which measurements hold whole attention patterns.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from probe.config import check_number, check_size
from probe.errors import unknown_name

__all__ = ["Limits", "current", "limits"]


@dataclass(frozen=True)
class Limits:
    """All limits, with their defaults; ``with limits(...):`` changes some of them.

    Raises:
        ProbeError: for a limit that is no integer of at least 1, or no positive number of seconds.
    """

    #: Numbers in each intermediate result of ``pattern_distance``, for the cache. They are half a MiB in float64.
    distance_block: int = 2**16
    #: Numbers in a buffer of ``head_pair_distances``. A few of 256 KiB stay in the cache.
    head_pair_block: int = 2**15
    #: Numbers in a block of rows of a streamed pattern, 16 MiB in float32. A handful of blocks is held at a time.
    pattern_block: int = 2**22
    #: Rows in such a block. Distances are counted from its first row, and rounded as numbers of this size.
    pattern_rows: int = 256
    #: Nearest distances of a template that the fused path takes as a band; more are no cheaper than the whole pattern.
    fused_band: int = 512
    #: Rows in a block of the fused path's running mean and band, few enough for the cache and enough for a product of
    #: matrices.
    fused_block: int = 64
    #: Keys in a stretch, by which the fused path names positions. The rounding of a mean position is that of a place in
    #: its stretch.
    fused_stretch: int = 1200
    #: Queries in a block of the sum of squared scores.
    squares_block: int = 256
    #: Entries of the curves of split scores whose bootstrap is drawn at a time.
    curve_block: int = 2**11
    #: Steps of Newton's method for templates by distance; a descent that needs more is an error.
    descent_steps: int = 500
    #: Steps of Newton's method for the log-odds of windows and sinks.
    log_odds_steps: int = 200

    #: Tokens up to which a CPU holds the pattern. Two batched products and a softmax are then faster than the fused
    #: kernel.
    explicit_length: int = 512
    #: Numbers in a mask of the fused path (256 MiB in float32); a larger one is made for some queries at a time.
    whole_mask: int = 2**26
    #: Numbers in a part of such a mask.
    mask_block: int = 2**22
    #: Numbers in FIRE's hidden layer, 64 MiB in float32.
    fire_block: int = 2**24
    #: Logits, half a GiB in float32. Of the vocabularies of released models, those are a few thousand tokens'.
    logits_at_once: int = 2**27
    #: Tokens in one forward pass of ``perplexity``, where that is more than one window.
    window_tokens: int = 2**13

    #: Tokens of a sequence up to which measurements hold whole patterns. Attention is streamed beyond.
    dense_length: int = 1024
    #: Numbers in all patterns of a model up to which they are held, 1 GiB in float32.
    dense_numbers: int = 2**28

    #: Rows that are centred and multiplied at once for a linear probe. Their copy stays in a core's cache, and in
    #: float32 the rounding is that of sums over this many rows.
    moment_rows: int = 2048
    #: Rows that go through the loss of a softmax probe at once.
    loss_rows: int = 2048

    #: Bytes of a JSON file. The largest is the index of a released model, whose 150,000 tensors take 15 MB.
    json_bytes: int = 2**25
    #: Values in a JSON file. Even the smallest value takes a hundred bytes of memory.
    json_values: int = 2**20
    #: Bytes of the header of a file of weights. Ten thousand tensors take a tenth of that.
    header_bytes: int = 2**24
    #: Bytes of a model's tables that are in no file, such as masks and angles.
    table_bytes: int = 2**30
    #: Bytes of a tokenizer's file. Gemma's vocabulary of 262,144 tokens takes half of that.
    tokenizer_bytes: int = 2**26
    #: How many times as long a tokenizer's steps may make a text, together. A normal tokenizer's is below 100.
    tokenizer_growth: int = 2**12
    #: Ids of a tokenizer. They may have gaps, and every id gets a string.
    tokenizer_ids: int = 2**22

    #: Bytes of a page that is written; rows that would make it larger stay in their file.
    page_bytes: int = 6_000_000
    #: Bytes of a page whose figures are read, ten times as large as those that are written.
    read_page_bytes: int = 2**26
    #: Bytes of the JSON of a figure that is read.
    figure_bytes: int = 2**24
    #: Figures of a page that is read.
    figures: int = 500
    #: Figures that a browser is given at once, before progress is reported.
    figures_at_once: int = 8

    #: Draws of the keys of a passkey prompt; a prompt that needs more is an error.
    passkey_draws: int = 1000
    #: Seconds in which a Ray cluster must answer. A new worker takes some seconds to start.
    cluster_seconds: float = 30.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is float:
                check_number(field.name, value)
            else:
                check_size(field.name, value, most=2**62)

    def changed(self) -> dict[str, Any]:
        """The limits that are not at their defaults, by name."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}


_CURRENT = ContextVar("limits", default=Limits())  # noqa: B039  # it is frozen


def current() -> Limits:
    """The limits that hold here. A loop reads them once, before it begins."""
    return _CURRENT.get()


@contextlib.contextmanager
def limits(**changes: Any) -> Iterator[Limits]:
    """Change some limits for a ``with`` block, and give all that hold there.

    They hold in this thread, and in the processes that studies, sweeps and benchmarks start from it. A thread that is
    started in the block has the defaults, unless it runs in a copy of the context (``contextvars.copy_context().run``).

    Args:
        **changes: new values, by the names of the fields of ``Limits``.

    Raises:
        ProbeError: for an unknown name, or a value that the limit cannot have.
    """
    known = [field.name for field in dataclasses.fields(Limits)]
    for name in changes:
        if name not in known:
            raise unknown_name("limit", name, known)
    token = _CURRENT.set(dataclasses.replace(current(), **changes))
    try:
        yield current()
    finally:
        _CURRENT.reset(token)


def adopt(given: Mapping[str, Any]) -> None:
    """Let the limits that another process had changed hold in this one from now on: what its first line calls.

    Args:
        given: what ``changed`` gave there.
    """
    _CURRENT.set(Limits(**given))
