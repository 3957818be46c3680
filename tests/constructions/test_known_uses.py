"""What the suite says heads follow and are used for, by edits of weights and states; ``probe`` is not asked."""

import contextlib
import functools

import pytest
import torch
from known_models import EACH, build, loss, run, values, without_head
from torch.nn import functional as F

from constructions.known import KNOWN, USES
from constructions.known.reading import first_reader

RAISES = 0.05  # nats by which a use shows
of_each = pytest.mark.parametrize(("name", "variant"), EACH)


@contextlib.contextmanager
def with_even_attention(model, layer, head):
    """A head whose scores are all 0: its queries and its biases are."""
    attention, d_head, encoding = model.layers[layer].attention, model.config.d_head, model.encoding
    changed = [(attention.q_proj.weight.data, slice(head * d_head, (head + 1) * d_head))]
    if model.config.encoding == "t5":
        changed.append((encoding.weight.data.T, head))
    before = [tensor[at].clone() for tensor, at in changed]
    slopes = getattr(encoding, "slopes", None)
    for tensor, at in changed:
        tensor[at] = 0
    if slopes is not None:
        encoding.slopes = torch.where(torch.arange(len(slopes)) == head, 0.0, slopes)
    yield
    for (tensor, at), value in zip(changed, before, strict=True):
        tensor[at] = value
    if slopes is not None:
        encoding.slopes = slopes


def check_use(name, variant, seed, layer, head, use):
    known, seen = build(name, variant, seed), values(name, variant, seed)
    with without_head(known.model, layer, head):
        (silent,) = run(known.model, known.tokens)
    if use == "nothing":
        assert (silent - seen["logits"]).abs().max() < 1e-4
        return
    plain = loss(seen["logits"], known)
    pattern = seen[f"blocks.{layer}.attn.hook_pattern"][:, head].double()
    even = float((pattern - (torch.ones(32, 32).tril() / torch.arange(1, 33)[:, None])).abs().max()) < 1e-4
    with with_even_attention(known.model, layer, head):
        (spread,) = run(known.model, known.tokens)
    assert loss(silent if even else spread, known) - plain > RAISES / (4 if even else 1)
    goes_by = (seen[f"blocks.{layer}.attn.hook_z"][:, :, head] if even else pattern).double()
    varies = float((goes_by - goes_by[:1]).abs().max() / goes_by.abs().max())
    assert (varies < 1e-3) == (use == "position")  # it is the same in all sequences
    # An induction head goes by neighbours; ``test_known_heads`` has its pattern from the tokens alone.
    if use == "content" and known.answer.heads.get((layer, head)) != "induction":
        check_no_place(known, seen, layer, head)


def check_no_place(known, seen, layer, head):
    """Content alone: where the tokens between the first and the last stand in another order, the last query gets the
    same from the head."""
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0)) + 1
    order = torch.cat((torch.tensor([0]), order, torch.tensor([31])))
    site = f"blocks.{layer}.attn.hook_z"
    (_, z) = run(known.model, known.tokens[:, order], site)
    assert (z[:, -1, head] - seen[site][:, -1, head]).abs().max() < 1e-3 * seen[site].abs().max()


@of_each
def test_heads_are_used_for_what_they_are_used_for(name, variant):
    for (layer, head), use in build(name, variant).answer.used_for.items():
        check_use(name, variant, 0, layer, head, use)


@pytest.mark.parametrize("name", KNOWN)
def test_in_another_seed_too(name):
    variant = KNOWN[name].variants[-1]
    for (layer, head), use in build(name, variant, 1).answer.used_for.items():
        check_use(name, variant, 1, layer, head, use)


def test_what_is_used_for_both_goes_by_both():
    """Without its bias, the head finds the query's own token; without its queries, it finds nothing."""
    known, plain = build("head_duplicate"), values("head_duplicate")["logits"]
    weight = known.model.encoding.weight.data
    before = weight.clone()
    weight[:] = 0
    (unbiased,) = run(known.model, known.tokens)
    weight[:] = before
    assert loss(unbiased, known) - loss(plain, known) > RAISES
    assert known.answer.used_for[0, 0] == "both"


@functools.cache
def moved_attention(name, variant, seed):
    """By (layer, head), how far the mean attended place of the middle query moves, among the keys before it, where its
    state at the site holds the position two tokens further back.

    What a position adds to a state beside its token is that of a least squares fit to one-hot tokens and positions.
    """
    known = build(name, variant, seed)
    layers = known.model.config.n_layers
    site = known.answer.site or f"blocks.{layers - 1}.hook_resid_pre"
    x = values(name, variant, seed)[site][:, 1:].flatten(0, 1).double()
    tokens = F.one_hot(known.tokens[:, 1:].flatten()).double()
    positions = F.one_hot(torch.arange(31).repeat(len(known.tokens))).double()
    fit = torch.linalg.lstsq(torch.cat((tokens, positions), 1), x, driver="gelsd").solution[tokens.shape[1] :]
    query, back = 16, 2
    step = (fit[query - 1 - back] - fit[query - 1]).float()  # row p of the fit is position p + 1

    def attended(edit):
        found = {}

        def watch(layer):
            return lambda pattern: found.__setitem__(layer, pattern[:, :, query, :query].double())

        hooks = {f"blocks.{layer}.attn.hook_pattern": watch(layer) for layer in range(layers)}
        with torch.no_grad():
            known.model(known.tokens, hooks={site: edit} | hooks)
        place = torch.arange(query).double()
        return {
            layer: (each @ place) / each.sum(-1).clamp(min=1e-300) for layer, each in found.items()
        }  # "sequence head"

    def move(value):
        value = value.clone()
        value[:, query] += step
        return value

    before, after = attended(lambda value: value), attended(move)
    return {
        (layer, h): after[layer][:, h] - before[layer][:, h] for layer in before for h in range(before[layer].shape[1])
    }


@of_each
def test_attention_follows_where_the_answer_says_so(name, variant):
    known = build(name, variant)
    assert known.answer.follows
    for head, follows in known.answer.follows.items():
        moved = moved_attention(name, variant, 0)[head]
        if follows:
            assert (moved + 2).abs().max() < 0.05, head
        elif name == "place_mirrored_used" and moved.abs().max() > 0.5:
            assert (moved - 2).abs().max() < 0.05, head  # the other way
        else:
            assert moved.abs().max() < 0.02, head


def test_answers_speak_of_heads_that_read_the_site():
    for name, variant in EACH:
        known = build(name, variant)
        answer, config = known.answer, known.model.config
        assert set(answer.used_for.values()) <= set(USES)
        assert all(layer >= first_reader(answer, config.n_layers) for layer, _ in answer.follows)
        assert all(i < config.n_layers and h < config.n_heads for i, h in {**answer.used_for, **answer.follows})
    uses = {use for name, variant in EACH for use in build(name, variant).answer.used_for.values()}
    assert uses == set(USES)
    assert {follows for name, variant in EACH for follows in build(name, variant).answer.follows.values()} == {
        True,
        False,
    }
