"""The one door between models and measurements: run a model, keep what was asked for, under one set of names."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from probe.errors import ProbeError
from probe.models.anatomy import n_layers_of, sites_of
from probe.models.build import Model
from probe.models.config import SITES
from probe.models.lens.check import check_once
from probe.models.mode import evaluating
from probe.shown import Shown

EMBED = "hook_embed"
PATTERN = "attn.hook_pattern"
SCORES = "attn.hook_attn_scores"
RESID_POST = "hook_resid_post"


def block_site(layer: int, site: str) -> str:
    """The full name of a site inside a layer: ``block_site(0, PATTERN) == "blocks.0.attn.hook_pattern"``."""
    return f"blocks.{layer}.{site}"


@dataclass(frozen=True)
class Trace(Shown):
    """What a model computed on some sequences. Values are on the CPU, sequences in the order of ``tokens``.

    ``lengths[b]`` is the number of tokens of sequence b that count; what stands to the right of them is padding, which
    a causal model's earlier rows never see. Measurements leave those rows out.
    """

    tokens: Int[Tensor, "batch pos"]
    lengths: Int[Tensor, "batch"]
    values: dict[str, Tensor]  #: what was kept, by full site name; ``trace[site]`` asks for one
    n_layers: int  #: of the model

    def __getitem__(self, site: str) -> Tensor:
        if site not in self.values:
            raise ProbeError(f"the trace holds no {site!r}; it was taken at: {', '.join(self.values) or 'no site'}")
        return self.values[site]

    def pattern(self, layer: int) -> Float[Tensor, "batch head query key"]:
        """The attention pattern of a layer, after the softmax: every row sums to 1."""
        return self[block_site(layer, PATTERN)]

    def scores(self, layer: int) -> Float[Tensor, "batch head query key"]:
        """The scores of a layer, before the softmax; -inf where the key is in the future."""
        return self[block_site(layer, SCORES)]

    def hidden(self, site: str) -> Float[Tensor, "batch pos d_model"]:
        """Hidden states at a site, checked to be finite."""
        value = self[site]
        if value.ndim != 3:
            raise ProbeError(f"{site!r} holds no hidden states (batch, pos, d_model) but {tuple(value.shape)}")
        if not value.isfinite().all():
            raise ProbeError(f"hidden states at {site!r} must be finite, got NaN or infinity")
        return value


def expand_sites(sites: Sequence[str], model: nn.Module) -> list[str]:
    """Full site names; a name without its layer (``"hook_resid_post"``) stands for that site in every layer.

    Raises:
        ProbeError: for a site that the model has not.
    """
    known, n_layers = sites_of(model), n_layers_of(model)
    first = block_site(0, "")
    in_layer = [site.removeprefix(first) for site in known if site.startswith(first)]
    full: list[str] = []
    for site in sites:
        full += [block_site(layer, site) for layer in range(n_layers)] if site in in_layer else [site]
    for site in full:
        if site not in known:
            raise ProbeError(
                f"unknown site {site!r}; known: {', '.join(SITES)}, and in a layer (with or without "
                f"'blocks.<layer>.' before it, layers 0…{n_layers - 1}): {', '.join(in_layer)}"
            )
    return list(dict.fromkeys(full))


@torch.no_grad()
def trace(
    model: nn.Module,
    tokens: Int[Tensor, "batch pos"],
    sites: Sequence[str] = (EMBED, RESID_POST, PATTERN),
    *,
    lengths: Int[Tensor, "batch"] | None = None,
    batch_size: int = 64,
) -> Trace:
    """Run a model on token ids and keep the values at ``sites``.

    Args:
        model: a ``Decoder``, a ``ClockworkRNN`` or a TransformerLens ``TransformerBridge``.
        tokens: ids, right-padded where sequences differ in length.
        sites: TransformerLens names (``"blocks.0.hook_resid_post"``); without its layer, a site of every layer.
        lengths: the number of tokens of each sequence that count; all of them by default.
        batch_size: sequences in one forward pass.

    Raises:
        ProbeError: for an empty batch, an unknown site, or lengths that do not fit the tokens.
    """
    _check_tokens(tokens)
    lengths = checked_lengths(lengths, *tokens.shape)
    kept: dict[str, list[Tensor]] = {}
    n_layers = visit(
        model,
        tokens,
        sites,
        lambda site, value, _: kept.setdefault(site, []).append(value.cpu()),
        batch_size=batch_size,
    )
    # What came in one batch is kept as it is: patterns are large, and a copy takes as long as a layer.
    whole = {site: parts[0].contiguous() if len(parts) == 1 else torch.cat(parts) for site, parts in kept.items()}
    values = {site: whole[site] for site in expand_sites(sites, model)}
    return Trace(tokens.cpu(), lengths.cpu(), values, n_layers)


@torch.no_grad()
def visit(
    model: nn.Module,
    tokens: Int[Tensor, "batch pos"],
    sites: Sequence[str],
    fn: Callable[[str, Tensor, slice], object],
    *,
    batch_size: int = 64,
) -> int:
    """Run a model on token ids and call ``fn(site, value, rows)`` with each value as it is computed; keep nothing.

    ``value`` is that of the sequences ``tokens[rows]``, on the model's device; it must not be changed, and what ``fn``
    returns is not read. Sites and errors are those of ``trace``.

    Returns:
        The number of layers of the model.
    """
    _check_tokens(tokens)
    if batch_size < 1:
        raise ProbeError(f"batch_size must be at least 1, got {batch_size}")
    n_layers = n_layers_of(model)
    full = expand_sites(sites, model)
    with evaluating(model):
        for start in range(0, len(tokens), batch_size):
            rows = slice(start, min(start + batch_size, len(tokens)))
            hooks = {site: _call(fn, site, rows) for site in full}
            if isinstance(model, Model):
                _run_model(model, tokens[rows], hooks)
            else:
                _run_bridge(model, tokens[rows], hooks)
    return n_layers


@torch.no_grad()
def logits_with_edits(
    model: nn.Module, tokens: Int[Tensor, "batch pos"], edits: Mapping[str, Callable[[Tensor], Tensor]] | None = None
) -> Float[Tensor, "batch pos d_vocab"]:
    """The logits of any model that ``trace`` reads while the values at some sites are replaced.

    ``edits`` maps full site names to functions of the value there that return what takes its place. Logits are on the
    CPU, in float32 or better.

    Raises:
        ProbeError: for a site that the model has not.
    """
    edits = edits or {}
    with evaluating(model):
        if isinstance(model, Model):
            # The explicit path always: two runs differ by the edit and not by a kernel.
            logits = model(tokens.to(model.device), hooks=edits, attention="explicit")
        else:
            sites = expand_sites([*edits], model)
            hooks = [(site, lambda value, hook, edit=edits[site]: edit(value)) for site in sites]
            bridge: Any = model  # as expand_sites knows
            check_once(bridge)
            logits = bridge.run_with_hooks(tokens.to(next(model.parameters()).device), fwd_hooks=hooks)
    return logits.cpu().to(torch.promote_types(logits.dtype, torch.float32))


def checked_lengths(lengths: Int[Tensor, "batch"] | None, batch: int, n: int) -> Int[Tensor, "batch"]:
    """The lengths of that many sequences of n tokens; all n where there are none.

    Raises:
        ProbeError: for anything but a number in 1…n for each sequence.
    """
    if lengths is None:
        return torch.full((batch,), n)
    if lengths.shape != (batch,) or int(lengths.min()) < 1 or int(lengths.max()) > n:
        raise ProbeError(f"lengths must be {batch} numbers in 1…{n}, got {lengths.tolist()}")
    return lengths


def valid_rows(lengths: Int[Tensor, "batch"], n_query: int) -> Bool[Tensor, "batch query"]:
    """True where the query row belongs to the sequence, False where it is padding."""
    return torch.arange(n_query, device=lengths.device) < lengths[:, None]


def token_losses(
    logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"]
) -> Float64[Tensor, "batch pos-1"]:
    """The cross entropy, in nats, of every token but the first given those before it.

    Raises:
        ProbeError: for logits of which that cannot be said, NaN among them.
    """
    # In float64 some positions at a time: all of them would double what a long text's logits hold.
    parts = zip(logits[:, :-1].split(1024, dim=1), tokens[:, 1:].split(1024, dim=1), strict=True)
    found = [
        cross_entropy(part.transpose(1, 2).double(), targets.to(part.device), reduction="none")
        for part, targets in parts
    ]
    losses = torch.cat(found, dim=1)
    if losses.isnan().any():
        raise _not_finite()
    return losses


def likeliest(logits: Float[Tensor, "*batch d_vocab"]) -> Int[Tensor, "*batch"]:
    """The token of the highest logit, the first of equal ones.

    Raises:
        ProbeError: where that is NaN or infinite: among NaN some token would be the likeliest, too.
    """
    token = logits.argmax(-1)
    if not logits.gather(-1, token[..., None]).isfinite().all():
        raise _not_finite()
    return token


def _not_finite() -> ProbeError:
    return ProbeError("a model's logits must be finite, got NaN or infinity (half precision may have overflowed)")


def sequence_losses(
    logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"], scored: Bool[Tensor, "batch pos"]
) -> Float64[Tensor, "batch"]:
    """The cross entropy of each sequence's scored tokens given those before them, summed, in nats."""
    return token_losses(logits, tokens).where(scored[:, 1:], 0.0).sum(1)


def _check_tokens(tokens: Tensor) -> None:
    if tokens.ndim != 2 or tokens.numel() == 0:
        raise ProbeError(f"tokens must hold at least one sequence of one token, got shape {tuple(tokens.shape)}")


def _call(fn: Callable[[str, Tensor, slice], object], site: str, rows: slice) -> Callable[[Tensor], None]:
    def hook(value: Tensor) -> None:
        fn(site, value, rows)

    return hook


def _run_model(model: Model, tokens: Tensor, hooks: Mapping[str, Callable[[Tensor], None]]) -> None:
    model(tokens.to(model.device), hooks=hooks)


def _run_bridge(model: Any, tokens: Tensor, hooks: Mapping[str, Callable[[Tensor], None]]) -> None:
    def at(site: str) -> Callable[[Tensor, Any], None]:
        def hook(value: Tensor, hook: Any) -> None:
            if site.endswith(SCORES):  # the bridge hides future keys by the lowest finite number
                future = torch.ones(value.shape[-2:], dtype=torch.bool, device=value.device).triu(1)
                value = value.masked_fill(future, -torch.inf)
            hooks[site](value)

        return hook

    check_once(model)
    device = next(model.parameters()).device
    model.run_with_hooks(tokens.to(device), fwd_hooks=[(site, at(site)) for site in hooks])
