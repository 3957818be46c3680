"""Sequences for language models."""

import torch

from probe.training import EncodedExamples


def of_text(tokens):
    """Sequences of which every token but the first is learned."""
    n = torch.full((len(tokens),), tokens.shape[1])
    return EncodedExamples(tokens, torch.ones_like(n), n)
