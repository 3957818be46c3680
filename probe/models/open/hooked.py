"""A model that is seen through its attention calls and hooks on its blocks: what all such models have in common."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from probe.errors import ProbeError
from probe.models.hidden_keys import window_of
from probe.models.layers import Hooks
from probe.models.open.blocks import Block, Opened, find_blocks
from probe.models.open.measured import measured_layers
from probe.models.open.seam import EXPLICIT, FUSED, Call, Pass, is_going
from probe.models.protocol import Anatomy, AttentionInputs, Hook, Visit
from probe.models.streamed import Enough
from probe.sequences import TokenIds, check_ids, token_ids

# What of a block is a site, in the order of the computation.
ATTENTION_SITES = (
    *("attn.hook_rot_q", "attn.hook_rot_k", "attn.hook_v", "attn.hook_attn_scores", "attn.hook_pattern"),
    *("attn.hook_z", "hook_attn_out"),
)
_OF_PATTERNS = ("hook_attn_scores", "hook_pattern")


class HookedModel(nn.Module):
    """A module under the names that every model here has: ``model(tokens) -> logits``.

    Its modules and weights are the module's own, which stays as it was; hooks are there only while it runs.
    """

    def __init__(self, opened: Opened):
        """Find the blocks.

        Args:
            opened: the module, its parts, and how it is run under a pass without hooks on its blocks.

        Raises:
            ProbeError: as ``find_blocks``.
        """
        super().__init__()
        self.inner = opened.inner
        self._opened = opened
        self._blocks = find_blocks(opened)
        self._anatomy: Anatomy | None = None
        self.fused = FUSED  #: the kind of attention that makes no pattern

    @property
    def owner(self) -> nn.Module:
        """The module itself."""
        return self.inner

    def tokens(self) -> Int[Tensor, "batch pos"]:
        """Random tokens on which the model is tried."""
        return self._opened.tokens()

    @property
    def _table(self) -> Any:
        return self._opened.table

    @property
    def device(self) -> torch.device:
        """Where its tokens go."""
        device: torch.device = self._table.weight.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """That of its weights."""
        dtype: torch.dtype = self._table.weight.dtype
        return dtype

    @property
    def anatomy(self) -> Anatomy:
        """Its layers, sizes and sites. What its layers are is measured once, see ``probe.models.open.measured``."""
        if self._anatomy is None:
            blocks = self._blocks
            self._anatomy = Anatomy(
                measured_layers(self._opened, self.passed, blocks),
                d_model=next((block.width for block in blocks if block.width), self._table.embedding_dim),
                d_vocab=self._table.num_embeddings,
                n_ctx=self._opened.n_ctx,
                sites=("hook_embed", *(f"blocks.{i}.{site}" for i, b in enumerate(blocks) for site in sites_of(b))),
            )
        return self._anatomy

    def forward(
        self, tokens: TokenIds, *, hooks: Mapping[str, Hook] | None = None
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits before the softmax.

        Args:
            tokens: ids "batch pos", integers of any kind.
            hooks: functions by site name. Each is called with the value at its site; what it returns, if anything,
                replaces the value. Without hooks the module runs by itself.

        Raises:
            ProbeError: for an empty batch, ids outside the vocabulary, or a site that does not exist.
        """
        ids = self._ids(tokens)
        if not hooks:
            return self.unwatched(ids)
        for site in hooks:
            if site not in self.anatomy.sites:
                kinds = dict.fromkeys(site.split(".", 2)[-1] for site in self.anatomy.sites)
                raise ProbeError(f"unknown site {site!r}; a {type(self.inner).__name__} has {', '.join(kinds)}")
        return self.run(ids, hooks)

    def _ids(self, tokens: TokenIds) -> Int[Tensor, "batch pos"]:
        """Ids that the model knows, on its device. Elsewhere than on a CPU a check would wait for the device."""
        ids = token_ids(tokens)
        if ids.device.type == "cpu":
            check_ids(ids, self._table.num_embeddings)
        return ids.to(self.device)

    def unwatched(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_vocab"]:
        """The logits as the module computes them by itself."""
        raise NotImplementedError

    def run(
        self, tokens: Int[Tensor, "batch pos"], hooks: Mapping[str, Hook], *, explicit: bool = False
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """See ``probe.models.protocol.Model.run``."""
        explicit = explicit or any(site.endswith(_OF_PATTERNS) for site in hooks)
        return self.passed(tokens, Pass(Hooks(hooks)), EXPLICIT if explicit else self.fused)

    def passed(
        self, tokens: Tensor, going: Pass, implementation: str = EXPLICIT, **inputs: Any
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """The logits of a pass that is watched."""
        with self._hooked(going):
            return self._opened.run(tokens.to(self.device), going, implementation, **inputs)

    @contextlib.contextmanager
    def _hooked(self, going: Pass) -> Iterator[None]:
        """Hooks on the modules: which block runs, and the states before, in and after it."""
        handles = []
        if going.hooks.has("hook_embed"):
            handles.append(self._table.register_forward_hook(_out_of_table(going)))
        before, after = _before(going, self._blocks), _after(going, "hook_resid_post")
        for module in {id(block.module): block.module for block in self._blocks}.values():
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after))
        wanted = {site.split(".", 2)[-1] for site in going.hooks.hooks if site.startswith("blocks.")}
        if "hook_attn_out" in wanted:
            modules = {id(block.attention): block.attention for block in self._blocks if block.attention is not None}
            handles += [module.register_forward_hook(_after(going, "hook_attn_out")) for module in modules.values()]
        if "hook_resid_mid" in wanted:
            mids = {id(block.mid): block.mid for block in self._blocks if block.mid is not None}
            handles += [m.register_forward_pre_hook(_middle(going), with_kwargs=True) for m in mids.values()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def attention_inputs(self, tokens: Int[Tensor, "batch pos"], visit: Visit, layers: Sequence[int]) -> None:
        """See ``probe.models.protocol.Model.attention_inputs``. Nothing is run behind the last of these layers."""
        left = {layer for layer in layers if self._blocks[layer].n_heads}

        def on_call(layer: int, call: Call) -> None:
            if layer in left:
                left.remove(layer)
                visit(layer, streamed_inputs(call, layer))
            if not left:
                raise Enough

        if left:
            with contextlib.suppress(Enough):
                self.passed(tokens, Pass(Hooks({}), on_call), self.fused)


def sites_of(block: Block) -> list[str]:
    """The sites of a block, in the order of the computation."""
    sites = ["hook_resid_pre"] if block.width else []
    if block.n_heads:
        unseen = [] if block.inputs and block.n_calls == 1 else ["attn.hook_v", "attn.hook_z"]
        unseen += [] if block.inputs else ["attn.hook_rot_q", "attn.hook_rot_k"]
        sites += [s for s in ATTENTION_SITES if s not in unseen and (s != "hook_attn_out" or block.attention)]
    if block.mid is not None:
        sites.append("hook_resid_mid")
    return [*sites, "hook_resid_post"] if block.width else sites


def streamed_inputs(call: Call, layer: int) -> AttentionInputs:
    """What a layer's pattern follows from, where it follows from queries and keys alone.

    Raises:
        ProbeError: for a layer with a bias, a cap, a sink, or a mask that is neither causal nor a sliding window.
    """
    if not call.query.shape[-1]:
        raise ProbeError(f"streaming needs queries and keys, but of layer {layer} only scores are seen")
    why = "a bias" if call.added else "a learned sink" if call.sink else "a cap on scores" if call.softcap else None
    if why is not None:
        raise ProbeError(f"streaming needs scores of q·k alone, but layer {layer} has {why}")
    window = None if call.mask is None else window_of(~call.mask, layer)
    return AttentionInputs(call.query, call.key, float(call.scale), window=window)


def _out_of_table(going: Pass) -> Callable[..., Any]:
    def hook(_: nn.Module, __: tuple[Any, ...], out: Tensor) -> Tensor | None:
        return going.hooks("hook_embed", out) if is_going(going) else None

    return hook


def _before(going: Pass, blocks: Sequence[Block]) -> Callable[..., Any]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not is_going(going):
            return None
        going.layer += 1
        if blocks[going.layer].width:
            return _edited(going, "hook_resid_pre", args, kwargs)
        return None

    return hook


def _after(going: Pass, name: str) -> Callable[..., Any]:
    def hook(_: nn.Module, __: tuple[Any, ...], out: Any) -> Any:
        site = f"blocks.{going.layer}.{name}"
        return with_first(out, lambda x: going.hooks(site, x)) if is_going(going) and going.hooks.has(site) else None

    return hook


def _middle(going: Pass) -> Callable[..., Any]:
    """An edit is written into the tensor itself: the stream goes on past the module that reads it here."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        site = f"blocks.{going.layer}.hook_resid_mid"
        if is_going(going) and going.hooks.has(site):
            x = args[0] if args else kwargs["hidden_states"]
            new = going.hooks(site, x)
            if new is not x:
                x.copy_(new)

    return hook


def _edited(going: Pass, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    site = f"blocks.{going.layer}.{name}"
    if not going.hooks.has(site):
        return None
    if args:
        return (going.hooks(site, args[0]), *args[1:]), kwargs
    return args, kwargs | {"hidden_states": going.hooks(site, kwargs["hidden_states"])}


def with_first(out: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """What a module put out, its first tensor replaced by what a function makes of it."""
    return fn(out) if isinstance(out, Tensor) else (fn(out[0]), *out[1:])
