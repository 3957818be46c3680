"""Perturbing weights one by one."""

from collections.abc import Iterable

import pytest
import torch

from constructions import Construction


def needed(
    construction: Construction,
    length: int,
    weights: Iterable[tuple[str, tuple[int, ...]]],
    factors: Iterable[float],
    dtype: torch.dtype = torch.float64,
) -> list[tuple[str, tuple[int, ...]]]:
    """Those of the weights for which the check fails under every one of the factors."""
    decoder, tokens = construction.build(length, dtype), construction.tokens(length)
    parameters = dict(decoder.named_parameters())
    found = []
    for name, index in weights:
        weight = parameters[name].data
        before = weight[index].clone()
        fails = []
        for factor in factors:
            weight[index] = before * factor
            fails.append(not construction.check(length, dtype, decoder=decoder, tokens=tokens).holds.all())
        weight[index] = before
        if all(fails):
            found.append((name, index))
    return found


def nonzero(construction: Construction, length: int, content: slice) -> list[tuple[str, tuple[int, ...]]]:
    """Every non-zero weight but those of the content, and the embeddings of all tokens but <bos> and the second."""
    found, tokens = [], construction.tokens(length)[0, :2].tolist()
    for name, parameter in construction.written(length, torch.float64).named_parameters():
        for index in parameter.nonzero().tolist():
            embedding = name == "token_embedding.weight"
            of_content = len(index) == 2 and content.start <= index[1] < content.stop
            if not (embedding and (of_content or index[0] not in tokens)):
                found.append((name, tuple(index)))
    return found


@pytest.fixture(name="needed")
def _needed():
    return needed


@pytest.fixture(name="nonzero")
def _nonzero():
    return nonzero
