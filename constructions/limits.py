"""How far each construction goes: the first position that fails, searched for, and tabled in ``limits.csv``.

The table is made by

    OMP_NUM_THREADS=1 python -m constructions.limits

which takes about half an hour on one core; with names of constructions behind it, only their rows are made anew. Its
columns are those of ``Construction.check``, and ``length`` the number
of tokens that were run, claimed or not: ``holds`` says that no position up to it failed, ``first_failure`` is the first
that did. Where ``positions_checked`` is smaller than ``length`` the positions were sampled.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from constructions.construction import Construction, StreamConstruction
from constructions.every import CONSTRUCTIONS
from constructions.observing import observe
from probe.errors import ProbeError, unknown_name
from probe.models.decoder import Decoder, KVCache

TABLE = Path(__file__).with_name("limits.csv")


def first_failure(
    construction: Construction,
    dtype: torch.dtype,
    most: int = 2**17,
    least: int = 64,
    attention: str | None = None,
) -> pd.DataFrame:
    """Rows for the shortest of the lengths ``least``, 2 ``least``, 4 ``least``, … ``most`` at which the construction
    fails, or for ``most`` if it fails nowhere; in any dtype, claimed or not.

    The construction is built anew for each length T, so that "fails at t" means that the weights made for T tokens are
    wrong at position t (1 at ``<bos>``) and right before. A position in one row of the stream fails when rounding it to
    an integer does; what is claimed without error, when there is any; other quantities by their tolerance. The
    attention path is the fused one where the claim can be looked at on it.

    Raises:
        ProbeError: if ``least`` or ``most`` is below 1.
    """
    if not least >= 1 or not most >= 1:
        raise ProbeError(f"least and most must be at least 1, got {least} and {most}")
    attention = attention or construction.attention_paths[-1]
    length = min(least, most)
    while True:
        decoder = construction.build_unclaimed(length, dtype)
        t, errors = construction.errors(decoder, construction.tokens(length), attention)
        rows = _rows(construction, t, errors, length, dtype, attention, decoder)
        if not rows.holds.all() or length >= most:
            return rows
        length = min(2 * length, most)


def first_failure_sampled(
    construction: Construction,
    dtype: torch.dtype,
    length: int,
    window: int = 32,
    per_octave: int = 4,
) -> pd.DataFrame:
    """The rows of ``first_failure`` at one length that is too long for all rows, from windows of positions,
    ``per_octave`` to a doubling and one at the end.

    For constructions that attend in layer 0 only: there keys and values are functions of the token alone, so the cache
    of everything before a window can be filled without running it. The window itself goes through ``Decoder.forward``,
    and its queries attend to all keys before them.

    Raises:
        ProbeError: for a construction that attends in more than one layer, or claims nothing of the stream.
    """
    if not isinstance(construction, StreamConstruction):
        raise ProbeError(f"sampling wants what a construction leaves in the stream, got {construction.name}")
    if construction.attention_layers != 1:
        raise ProbeError(f"sampling wants one attention layer, got {construction.attention_layers}")
    decoder = construction.build_unclaimed(length, dtype)
    tokens = construction.tokens(length)
    sites = ("hook_embed", f"blocks.{construction.layers - 1}.hook_resid_post")
    positions: list[Tensor] = []
    found: dict[str, list[Tensor]] = {}
    for start in _starts(length, window, per_octave):
        part = tokens[:, start : start + window]
        seen = observe(decoder, part, sites, cache=_prefix(decoder, tokens[:, :start]), attention="explicit")
        t = torch.arange(start + 1, start + part.shape[1] + 1)
        errors = construction.stream_errors(seen[sites[0]][0], seen[sites[1]][0], t, length)
        new = t > (positions[-1][-1] if positions else 0)  # the first windows overlap
        positions.append(t[new])
        for quantity, error in errors.items():
            found.setdefault(quantity, []).append(error[new])
    t, errors = torch.cat(positions), {quantity: torch.cat(parts) for quantity, parts in found.items()}
    return _rows(construction, t, errors, length, dtype, "explicit", decoder)


def _rows(
    construction: Construction,
    t: Tensor,
    errors: Mapping[str, Tensor],
    length: int,
    dtype: torch.dtype,
    attention: str,
    decoder: Decoder,
) -> pd.DataFrame:
    known = construction.tolerance
    tolerance = dict(known[dtype if dtype in known else min(known, key=lambda each: each.itemsize)])
    if tolerance.get("position", 0) > 0:
        tolerance["position"] = 0.4999  # nearer to t than to any other integer
    rows = construction.rows(t, errors, length, dtype, attention, decoder.config.d_mlp, tolerance)
    return pd.DataFrame(rows).astype({"first_failure": "Int64"})


def _starts(length: int, window: int, per_octave: int) -> list[int]:
    ends, end = [], float(window)
    while end < length:
        ends.append(int(end))
        end *= 2 ** (1 / per_octave)
    return sorted({max(0, end - window) for end in (*ends, length)})


@torch.no_grad()
def _prefix(decoder: Decoder, tokens: Int[Tensor, "1 pos"]) -> KVCache:
    """The cache of those tokens: layer 0's keys and values, and zeros for the layers that do not attend."""
    cache, attention = KVCache(), decoder.layers[0].attention
    cache.length = tokens.shape[1]
    if cache.length:
        x = decoder.layers[0].attention_norm(decoder.token_embedding(tokens))
        for layer in range(decoder.config.n_layers):
            k, v = (
                projection(x).unflatten(-1, (-1, decoder.config.d_head)).transpose(1, 2)
                for projection in (attention.k_proj, attention.v_proj)
            )
            cache.extend(layer, *((k, v) if layer == 0 else (torch.zeros_like(k), torch.zeros_like(v))))
    return cache


FLOAT64, FLOAT32, BFLOAT16 = torch.float64, torch.float32, torch.bfloat16

# What the table holds: the longest length at which all positions are run, by construction and dtype …
SEARCHES: tuple[tuple[str, torch.dtype, int], ...] = (
    ("absolute_position", FLOAT64, 16384),
    ("absolute_position", FLOAT32, 16384),
    ("absolute_position", BFLOAT16, 1024),
    ("closed_form", FLOAT64, 16384),
    ("closed_form", FLOAT32, 16384),
    ("closed_form", BFLOAT16, 1024),
    ("chords", FLOAT64, 32768),
    ("chords", FLOAT32, 131072),
    ("chords", BFLOAT16, 1024),
    ("exact_position", FLOAT64, 32768),
    ("exact_position", FLOAT32, 131072),
    ("newton", FLOAT64, 32768),
    ("newton", FLOAT32, 131072),
    ("newton", BFLOAT16, 1024),
    ("counting_head", FLOAT64, 131072),
    ("counting_head", FLOAT32, 131072),
    ("odometer_two", FLOAT32, 8448),
    ("odometer_two", BFLOAT16, 8448),
    ("odometer_three", BFLOAT16, 131200),
    ("relative_position", FLOAT32, 2048),
    ("exact_alibi", FLOAT64, 8192),
    ("exact_alibi", FLOAT32, 32768),
    ("logarithmic_bias", FLOAT32, 2048),
    ("t5_bias", FLOAT32, 2048),
    ("rotary_kernel", FLOAT32, 4096),
    ("positional_heads", FLOAT32, 65535),
    ("positional_heads_odometer", BFLOAT16, 8448),
    ("exact_position_through_rms_norm", FLOAT32, 131071),
    ("exact_position_through_layer_norm", FLOAT32, 131071),
    ("odometer_two_through_rms_norm", BFLOAT16, 8193),
    ("odometer_two_through_layer_norm", BFLOAT16, 8193),
    ("positional_heads_through_rms_norm", FLOAT32, 8192),
    ("positional_heads_through_layer_norm", FLOAT32, 8192),
    ("positional_heads_odometer_through_rms_norm", BFLOAT16, 8193),
    ("positional_heads_odometer_through_layer_norm", BFLOAT16, 8193),
)
# … and the lengths at which windows of positions are.
SAMPLES: tuple[tuple[str, torch.dtype, int], ...] = (
    ("closed_form", FLOAT32, 2**20),
    ("chords", FLOAT64, 2**20),
    ("chords", FLOAT32, 2**20),
    ("exact_position", FLOAT64, 2**20),
    ("exact_position", FLOAT32, 2**20),
    ("newton", FLOAT64, 2**20),
    ("newton", FLOAT32, 2**20),
    ("counting_head", FLOAT64, 2**20),
    ("counting_head", FLOAT32, 2**20),
)


def main(names: Sequence[str] = ()) -> None:
    """Make the table, or only the rows of the named constructions, and write it."""
    for name in names:
        if name not in {named for named, *_ in (*SEARCHES, *SAMPLES)}:
            raise unknown_name("construction in the table", name, {named for named, *_ in SEARCHES})
    torch.set_num_threads(1)
    tables = []
    for run, cases in ((first_failure_sampled, SAMPLES), (first_failure, SEARCHES)):
        for name, dtype, length in cases:
            if name in names or not names:
                tables.append(run(CONSTRUCTIONS[name], dtype, length))
                print(_summary(tables[-1]), flush=True)
    rows = pd.concat(tables, ignore_index=True).drop(columns=["claim", "source"])
    if names:
        kept = pd.read_csv(TABLE).astype({"first_failure": "Int64"})
        rows = pd.concat([kept[~kept["construction"].isin(names)], rows], ignore_index=True)
    rows.sort_values(["construction", "dtype", "length"], kind="stable").to_csv(TABLE, index=False)


def _summary(rows: pd.DataFrame) -> str:
    return rows[["construction", "dtype", "length", "quantity", "largest_error", "first_failure"]].to_string(
        header=False
    )


if __name__ == "__main__":
    main(sys.argv[1:])
