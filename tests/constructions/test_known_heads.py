"""What the suite says of heads: patterns against literal ones, shares against another decomposition."""

import functools

import numpy as np
import pytest
import torch
from known_models import EACH, build, run, values
from torch.nn import functional as F

from constructions.known import KNOWN

T = torch.arange(1, 33).double()
DISTANCE = (T[:, None] - T).clamp(min=0)

of_each = pytest.mark.parametrize(("name", "variant"), EACH)


def differs(patterns):
    """How far the patterns of two sequences are apart."""
    return float((patterns - patterns[0]).abs().max())


def missed(patterns, where):
    """The largest share of a row outside of ``where``, over the rows in which that is not empty."""
    return float((1 - (patterns * where).sum(-1))[where.any(-1).expand(patterns.shape[:-1])].max())


def toeplitz(patterns, tokens):
    """How far log-odds against the place that the last query attends most are from a function of the distance alone, or
    both from nothing; queries to which that place is not there yet attend most to the first token."""
    top = 31 - int(patterns[0, -1].argmax())
    rows = patterns[0, top:].clamp(min=1e-30).log()
    logs = (rows - rows.diagonal()[:, None]).clamp(min=-14)  # row top + j has its place at key j
    spread = max(float(logs.diagonal(top - d).max() - logs.diagonal(top - d).min()) for d in range(32))
    early = patterns[0, :top].argmax(-1).any() if top else False
    return max(spread / 2, differs(patterns), float(early))  # scores of a thousand come in float32


def falls_as(feature):
    def error(patterns, tokens):
        logs, at = patterns[0, -1].log(), feature(31 - torch.arange(32).double())
        line = np.polyfit(at.numpy(), logs.numpy(), 1)
        return max(float(np.abs(np.polyval(line, at) - logs.numpy()).max()), toeplitz(patterns, tokens), line[0])

    return error


def on_key(key):
    return lambda patterns, tokens: missed(patterns, F.one_hot(key, 32).bool())


def window(patterns, tokens):
    width = round(1 / float(patterns[0, -1].max()))
    literal = (width > DISTANCE).double().tril()
    return float((patterns - literal / literal.sum(-1, keepdim=True)).abs().max()) + (width > 8)


def sink_template(patterns, tokens):
    """The odds of the first key times t - 1 are one number, and the others are even."""
    rows = patterns[:, 1:]
    odds = rows[..., 0] / (1 - rows[..., 0]) * (T[1:] - 1)
    others = (rows[..., 1:] - rows[..., 1:2]).tril()
    # Of a share near 1 float32 leaves few digits of what it lacks.
    return max(float((odds / odds.mean() - 1).abs().max()) / 10, float(others.abs().max()))


def alibi_of(head, n_heads):
    slope = 2.0 ** (-8 * (head + 1) / n_heads)
    return (-slope * DISTANCE).masked_fill(torch.ones(32, 32).triu(1) > 0, -torch.inf).softmax(-1)


def follows(patterns, tokens):
    where = torch.zeros(patterns.shape, dtype=torch.bool)
    for key in range(1, 32):
        where[:, key:, key] = tokens[:, key:] == tokens[:, key - 1 : key]
    return missed(patterns, where)


LITERAL = {
    "uniform": lambda patterns, tokens: float((patterns - torch.ones(32, 32).tril() / T[:, None]).abs().max()),
    "sink": lambda patterns, tokens: float((1 - patterns[..., 0]).max()) / 50,  # more than .9 of every row
    "first_token": on_key(torch.zeros(32, dtype=torch.long)),
    "previous_token": on_key((T.long() - 2).clamp(min=0)),
    "diagonal": on_key(T.long() - 1),
    "window": window,
    "decay": lambda patterns, tokens: max(float((patterns[0, -1].diff() < 0).any()), toeplitz(patterns, tokens)),
    "relative": toeplitz,
    "t5_fitted": toeplitz,
    "power_law": falls_as(torch.log1p),
    "alibi_fitted": falls_as(lambda distance: distance),
    "first_token_sink": sink_template,
    "induction": follows,
    "duplicate": lambda patterns, tokens: missed(patterns, (tokens[:, :, None] == tokens[:, None]).tril(-1)),
}


@functools.cache
def of_reversed(name, variant, seed):
    """Patterns where all tokens but the last stand in reverse order, by layer."""
    known = build(name, variant, seed)
    back = torch.cat((known.tokens[:, :-1].flip(1), known.tokens[:, -1:]), dim=1)
    return run(known.model, back, *(f"blocks.{i}.attn.hook_pattern" for i in range(known.model.config.n_layers)))[1:]


def check_patterns(name, variant, seed):
    """Heads attend as their labels and templates say."""
    known, seen = build(name, variant, seed), values(name, variant, seed)
    for (layer, head), label in {*known.answer.heads.items(), *known.answer.templates.items()}:
        pattern = seen[f"blocks.{layer}.attn.hook_pattern"][:, head].double()
        if label == "alibi":
            error = float((pattern - alibi_of(head, build(name, seed=seed).model.config.n_heads)).abs().max())
        elif label == "content":
            # The pattern goes with the tokens, and it is another in other sequences.
            other = of_reversed(name, variant, seed)[layer][:, head, -1].double()
            error = float((other[:, :-1].flip(1) - pattern[:, -1, :-1]).abs().max()) + (differs(pattern) < 0.1)
        else:
            error = LITERAL[label](pattern, known.tokens)
        assert error < 2e-3, (layer, head, label)


@functools.cache
def columns(*parts):
    """An orthonormal basis of what a number for each value of these parts can fit."""
    query, key = np.tril_indices(32)
    one_hot = {"row": np.eye(32)[query], "key": np.eye(32)[key], "distance": np.eye(32)[query - key]}
    if "distance" not in parts:  # a trend in the key is the distance's: what fits the keys is orthogonal to it
        cells, at = one_hot["key"].sum(0), np.arange(32)
        trend = np.where(at > 0, cells * (at - np.average(at[1:], weights=cells[1:])), 0)
        one_hot["key"] = one_hot["key"] - np.outer(one_hot["key"] @ trend, trend) / (trend @ trend)
    basis, size, _ = np.linalg.svd(np.hstack([one_hot[part] for part in ("row", *parts)]), full_matrices=False)
    return basis[:, size > 1e-9]


def check_shares(name, variant, seed):
    """The shares are those of squares of projections; the suite solves least squares."""
    for (layer, head), split in build(name, variant, seed).answer.split.items():
        scores = values(name, variant, seed)[f"blocks.{layer}.attn.hook_attn_scores"][:, head].double()
        y = scores[0].numpy()[np.tril_indices(32)]
        none, key, distance, both = (
            float(np.square(columns(*parts).T @ y).sum())
            for parts in ((), ("key",), ("distance",), ("key", "distance"))
        )
        whole = float(np.square(y).sum()) - none
        assert split["residual"] == pytest.approx(1 - (both - none) / whole, abs=1e-4)
        assert split["key"] == pytest.approx((key - none + both - distance) / 2 / whole, abs=1e-3)
        assert split["distance"] == pytest.approx((distance - none + both - key) / 2 / whole, abs=1e-3)
        assert split["residual"] < 1e-6 and sum(split.values()) == pytest.approx(1)
        assert (scores - scores[0]).nan_to_num(0).abs().max() < 1e-4 * np.abs(y).max()  # in every sequence


@of_each
def test_patterns_and_shares(name, variant):
    check_patterns(name, variant, 0)
    check_shares(name, variant, 0)


@pytest.mark.parametrize("name", sorted({name for name, _ in EACH}))
def test_those_of_another_seed(name):
    variant = KNOWN[name].variants[-1]
    check_patterns(name, variant, 1)
    check_shares(name, variant, 1)


def test_every_kind_of_label_and_template_is_there():
    answers = [build(name).answer for name, variant in EACH if variant == "clean"]
    labels = {label for answer in answers for label in answer.heads.values()}
    assert labels == set(LITERAL) & labels | {"content"} and len(labels) == 10
    assert len({label for answer in answers for label in answer.templates.values()}) == 10
