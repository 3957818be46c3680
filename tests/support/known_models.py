"""The models of ``constructions.known`` as the tests see them: built once, looked into, and edited by hand."""

import contextlib
import copy
import functools

import torch
from torch.nn import functional as F

from constructions.known import KNOWN

EACH = [(name, variant) for name, known in KNOWN.items() for variant in known.variants]
#: The head that counts, or averages, where it is not head 0 of layer 0.
CARRIERS = {"bos_counter_behind_previous_used": (1, 1)}


@functools.cache
def _build(name, variant, seed):
    return KNOWN[name].build(seed, variant, n_sequences=24)


def build(name, variant="clean", seed=0):
    return _build(name, variant, seed)


@torch.no_grad()
def run(model, tokens, *sites):
    """Logits, and the values at the sites."""
    seen = {}
    hooks = {site: lambda value, site=site: seen.__setitem__(site, value) for site in sites}
    return (model(tokens, hooks=hooks), *(seen[site] for site in sites))


def values(name, variant="clean", seed=0):
    """Logits and the values at all sites, by name."""
    return _values(name, variant, seed)


@functools.cache
def _values(name, variant, seed):
    known = build(name, variant, seed)
    sites = known.model.config.sites()
    return dict(zip(("logits", *sites), run(known.model, known.tokens, *sites), strict=True))


def loss(logits, known):
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), known.tokens[:, 1:], reduction="none")
    return float(losses[known.scored[:, 1:]].mean())


@contextlib.contextmanager
def without_head(model, layer, head):
    """A head that writes nothing."""
    d_head, weight = model.config.d_head, model.layers[layer].attention.o_proj.weight.data
    columns = slice(head * d_head, (head + 1) * d_head)
    before = weight[:, columns].clone()
    weight[:, columns] = 0
    yield
    weight[:, columns] = before


@contextlib.contextmanager
def without_encoding(model):
    """An encoding that is the same at all positions and distances."""
    encoding, name = model.encoding, model.config.encoding
    before = copy.deepcopy(encoding)
    if name == "learned":
        encoding.weight.data[:] = encoding.weight.data.mean(0)
    elif name == "t5":
        encoding.weight.data[:] = 0
    elif name == "alibi":
        encoding.slopes = torch.zeros_like(encoding.slopes)
    elif name == "rotary":
        encoding.frequencies = torch.zeros_like(encoding.frequencies)
    elif name == "sinusoidal":
        mean = encoding.table(torch.arange(32)).mean(0)
        encoding.table = lambda positions: mean.expand(len(positions), -1)
    yield
    model.encoding = before


def without(mechanism, name, model):
    """The model without what makes a mechanism."""
    return without_encoding(model) if mechanism == "encoding" else without_head(model, *CARRIERS.get(name, (0, 0)))
