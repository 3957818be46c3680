"""Where the blocks of a model are, and what in each of them can be reached: found by running it once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from probe.errors import ProbeError
from probe.models.layers import Hooks
from probe.models.mode import evaluating
from probe.models.open.seam import Call, Pass
from probe.models.trial import random_tokens


@dataclass(frozen=True)
class Block:
    """One block of a forward pass. A module that runs twice in it is two blocks."""

    module: nn.Module
    width: int  #: the size of its hidden states "batch pos d_model", or 0 where its input is of another shape
    attention: nn.Module | None = None  #: the module that asks for attention
    n_heads: int = 0  #: heads of its attention, 0 without
    n_calls: int = 0  #: how often it asks
    window: int | None = None  #: as the module says it
    sink: bool = False  #: whether a learned sink takes a share of each row
    mid: nn.Module | None = None  #: the first module that reads the stream between attention and MLP
    inputs: bool = True  #: whether queries, keys and values of its attention are seen, and not scores alone


def context_of(text_config: Any) -> int | None:
    """The longest sequence that a config says a model takes, if it says so."""
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        length = getattr(text_config, name, None)
        if isinstance(length, int) and length > 0:
            return length
    return None


@dataclass(frozen=True)
class Opened:
    """A model that is looked at for the first time: its parts, and how it is run."""

    inner: nn.Module
    table: Any  #: the embedding of tokens
    n_ctx: int | None  #: the longest sequence that it takes
    forward: Any  #: is called with a module, tokens and a pass; no closure, so that a copy runs the copy
    n_layers: int | None = None  #: as its config says
    layer_types: Sequence[str] | None = None  #: likewise
    lists: Sequence[Sequence[nn.Module]] | None = None  #: the blocks, where somebody has named them

    def run(self, tokens: Tensor, going: Pass, *kind: str, **inputs: Any) -> Tensor:
        """The logits of tokens under a pass, without hooks on blocks."""
        logits: Tensor = self.forward(self.inner, tokens, going, *kind, **inputs)
        return logits

    def tokens(self) -> Tensor:
        """Random tokens on which it is tried."""
        return random_tokens(self.table.num_embeddings, self.n_ctx, self.table.weight.device)


@torch.no_grad()
def find_blocks(model: Opened) -> tuple[Block, ...]:
    """The blocks of a model in the order in which they run; none of them attends where none was seen to.

    Blocks are the elements of the outermost lists of modules in which attention is asked for, and of those as long as
    the config says that the model has layers.

    Raises:
        ProbeError: for a model that asks for attention over something else than tokens, or has two attentions in a
            block.
    """
    tokens = model.tokens()
    lists = [*_outermost_lists(model.inner)] if model.lists is None else model.lists
    running: list[_Running] = []

    def on_call(_: int, call: Call) -> None:
        if running and running[-1].runs:
            running[-1].calls.append(call)

    going = Pass(Hooks({}), on_call)
    handles = []
    for modules in lists:
        for module in modules:
            watch = _Watch(running)
            handles.append(module.register_forward_pre_hook(watch.enter, with_kwargs=True))
            handles.append(module.register_forward_hook(watch.leave))
            for child in module.children():
                handles.append(child.register_forward_hook(watch.child, with_kwargs=True))
    try:
        with evaluating(model.inner):
            model.run(tokens, going)
    finally:
        for handle in handles:
            handle.remove()
    attending = {id(one.module) for one in running if one.calls}
    chosen = {
        id(m)
        for ms in lists
        if model.lists is not None or len(ms) == model.n_layers or any(id(m) in attending for m in ms)
        for m in ms
    }
    for one in running:
        _check_calls(one.calls, tokens.shape[1], type(model.inner).__name__)
    return tuple(one.block() for one in running if id(one.module) in chosen)


def _check_calls(calls: Sequence[Call], n_tokens: int, name: str) -> None:
    for call in calls:
        if (call.query.shape[-2], call.key.shape[-2]) != (n_tokens, n_tokens):
            raise ProbeError(f"attention must go from tokens to tokens, but a {name}'s also goes over something else")
    n_modules = len({id(call.module) for call in calls})
    if n_modules > 1:
        raise ProbeError(f"a block must have one attention, but a {name}'s has {n_modules}")


def _outermost_lists(model: nn.Module) -> Iterator[nn.ModuleList | nn.Sequential]:
    names: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential) and not any(
            name.startswith(f"{other}.") for other in names
        ):
            names.append(name)
            yield module


class _Running:
    """What was seen of one run of a block."""

    def __init__(self, module: nn.Module, x: Tensor | None) -> None:
        self.module, self.x, self.runs = module, x, True
        self.calls: list[Call] = []
        self.children: list[tuple[nn.Module, Tensor | None, Tensor | None, bool]] = []

    def block(self) -> Block:
        width = self.x.shape[-1] if self.x is not None and self.x.ndim == 3 else 0
        if not self.calls:
            return Block(self.module, width)
        call = self.calls[0]
        inside = any(call.module is module for module in self.module.modules())
        return Block(
            self.module,
            width,
            call.module if inside else next((child for child, _, _, attended in self.children if attended), None),
            call.query.shape[1],
            len(self.calls),
            call.window,
            call.sink,
            self._middle() if width else None,
            call.query.shape[-1] > 0,
        )

    def _middle(self) -> nn.Module | None:
        """The first child behind attention that reads neither the block's input nor what a child put out.

        A pre-norm block hands its second norm x + attention(…), which no module put out; one with norms behind
        attention does so to its MLP or to its third norm. A parallel block has no such child.
        """
        seen = [x for x in (self.x,) if x is not None]
        past = False
        for child, read, put_out, attended in self.children:
            known = read is None or any(x.shape == read.shape and torch.equal(x, read) for x in seen)
            if past and not known:
                return child
            past = past or attended
            if put_out is not None:
                seen.append(put_out)
        return None


class _Watch:
    """Hooks that write down the runs of a block and of its children."""

    def __init__(self, running: list[_Running]) -> None:
        self.running = running
        self.calls_before = 0

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = _first(args, kwargs)
        self.running.append(_Running(module, None if x is None else x.clone()))
        self.calls_before = 0

    def leave(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        self.running[-1].runs = False

    def child(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        run = self.running[-1]
        x, put_out = _first(args, kwargs), _first(out if isinstance(out, tuple) else (out,), {})
        attended = len(run.calls) > self.calls_before
        self.calls_before = len(run.calls)
        clones = [None if value is None else value.clone() for value in (x, put_out)]
        run.children.append((module, clones[0], clones[1], attended))


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    x = args[0] if args else kwargs.get("hidden_states")
    return x if isinstance(x, Tensor) else None
