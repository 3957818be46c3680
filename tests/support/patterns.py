"""Patterns and traces that come from no model."""

import dataclasses
import math

import torch

from probe.tracing import PATTERN, Trace, block_site


def random_pattern(batch, head, n, seed=0, spread=1.0):
    scores = spread * torch.randn(batch, head, n, n, generator=torch.Generator().manual_seed(seed)).double()
    return scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -math.inf).softmax(-1)


def make_trace(*patterns, lengths=None):
    batch, _, n, _ = patterns[0].shape
    tokens = torch.arange(batch * n).view(batch, n)
    lengths = torch.full((batch,), n) if lengths is None else torch.tensor(lengths)
    return Trace(tokens, lengths, {block_site(i, PATTERN): p for i, p in enumerate(patterns)}, len(patterns))


def with_garbage(t, **changes):
    """The same trace with garbage in the rows (and tokens) of the padding."""
    values = {site: value.clone() for site, value in t.values.items()}
    padded = t.tokens.clone()
    for b, length in enumerate(t.lengths.tolist()):
        padded[b, length:] = 0
        for value in values.values():
            value[b, :, length:] = math.nan
    return dataclasses.replace(t, tokens=padded, values=values, **changes)
