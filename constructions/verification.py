"""Every claim, run through the model."""

from collections.abc import Iterable, Sequence

import pandas as pd
import torch

from constructions.construction import Construction, short
from constructions.every import CONSTRUCTIONS
from constructions.propositions import PROPOSITIONS, Proposition
from probe.errors import ProbeError, unknown_name
from probe.progress import OnProgress, Steps, untold

DTYPES = (torch.float64, torch.float32)

# What each level runs: (lengths, dtypes, attention paths). A length beyond a claim, or a dtype it is not made for, is
# left out; "full" adds every construction's longest claim in every dtype, through the fused kernel.
LEVELS: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...], tuple[str, ...]]] = {
    "quick": ((64, 256), (*DTYPES, torch.bfloat16), ("explicit", "fused")),
    "default": ((64, 256, 1024), DTYPES, ("explicit",)),
    "full": ((64, 256, 1024), (*DTYPES, torch.bfloat16), ("explicit", "fused")),
}


def verify(
    constructions: Iterable[str | Construction | Proposition] | None = None,
    lengths: Sequence[int] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    attention: Sequence[str] | None = None,
    level: str = "default",
    on_progress: OnProgress = untold,
    seed: int = 0,
) -> pd.DataFrame:
    """The rows of ``Construction.check`` for each construction, dtype, length and attention path, and of each
    proposition.

    A construction is checked where it claims something: at lengths up to its limit, in dtypes that it is made for, on
    paths that hold what it claims.

    Args:
        constructions: names in ``CONSTRUCTIONS`` and ``PROPOSITIONS``, or what they stand for; all of them by default.
        lengths: tokens in the sequence, ``<bos>`` among them; those of the level by default.
        dtypes: of weights and activations; those of the level by default.
        attention: the paths of ``Decoder.forward``; those of the level by default. A claim about scores or patterns
            has no row for a path that holds none (``Construction.attention_paths``).
        level: "quick" (seconds), "default", or "full", which adds the longest length of each claim (minutes).
        on_progress: called with how many of these checks are done, and how many there are.
        seed: of the tokens that constructions are run on, and of the decoders and tokens of propositions.

    Raises:
        ProbeError: for an unknown name or level, or if no row would come out.
    """
    if level not in LEVELS:
        raise unknown_name("level", level, LEVELS)
    usual_lengths, usual_dtypes, usual_paths = LEVELS[level]
    lengths, dtypes = lengths or usual_lengths, dtypes or usual_dtypes
    attention = attention or usual_paths
    wanted = [*CONSTRUCTIONS, *PROPOSITIONS] if constructions is None else constructions
    named = [_named(each) if isinstance(each, str) else each for each in wanted]
    chosen = [each for each in named if isinstance(each, Construction)]
    propositions = [each for each in named if isinstance(each, Proposition)]
    runs = [
        (construction, length, dtype, path)
        for construction in chosen
        for dtype in dtypes
        for length in lengths
        for path in attention
        if construction.claims(length, dtype) and path in construction.attention_paths
    ]
    if level == "full":
        runs += [
            (construction, longest, dtype, "fused" if "fused" in construction.attention_paths else "explicit")
            for construction in chosen
            for dtype, longest in construction.max_length.items()
            if dtype in dtypes and longest not in lengths
        ]
    if not runs and (chosen or not propositions):
        paths = sorted({path for construction in chosen for path in construction.attention_paths})
        limits = "; ".join(
            f"{each.name}: " + ", ".join(f"{short(dtype)} to {longest}" for dtype, longest in each.max_length.items())
            for each in chosen
        )
        raise ProbeError(
            f"verify wants at least one construction with a claim at these lengths ({list(lengths)}), dtypes "
            f"({[short(dtype) for dtype in dtypes]}) and attention paths ({list(attention)}, of {paths}); claimed: "
            f"{limits or 'nothing'}"
        )
    tables, steps = [], Steps(len(runs) + len(propositions), on_progress)
    for construction, length, dtype, path in runs:
        tokens = construction.tokens(length, seed)
        tables.append(construction.check(length, dtype, tokens=tokens, attention=path))
        steps.step()
    for proposition in propositions:
        tables.append(proposition.check(seed))
        steps.step()
    return pd.concat(tables, ignore_index=True)


def _named(name: str) -> Construction | Proposition:
    known: dict[str, Construction | Proposition] = {**CONSTRUCTIONS, **PROPOSITIONS}
    if name not in known:
        raise unknown_name("construction", name, known)
    return known[name]
