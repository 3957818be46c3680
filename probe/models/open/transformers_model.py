"""Any decoder of transformers, seen and edited through its attention function and hooks on its blocks."""

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from probe.errors import ProbeError
from probe.models.layers import Hooks
from probe.models.open.blocks import Block, context_of, find_blocks
from probe.models.open.measured import measured_layers
from probe.models.open.quiet import quiet_transformers
from probe.models.open.seam import EXPLICIT, FUSED, Call, Pass, is_going, watched
from probe.models.protocol import Anatomy, AttentionInputs, Hook, Visit
from probe.sequences import TokenIds, check_ids, token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What of a block is a site, in the order of the computation.
ATTENTION_SITES = (
    *("attn.hook_rot_q", "attn.hook_rot_k", "attn.hook_v", "attn.hook_attn_scores", "attn.hook_pattern"),
    *("attn.hook_z", "hook_attn_out"),
)
_OF_PATTERNS = ("hook_attn_scores", "hook_pattern")


class Enough(Exception):
    """The last layer that was asked for has been seen."""


@dataclass(frozen=True)
class Errors:
    """The largest differences between the seam and transformers' eager attention, relative to the largest number."""

    logits: float
    patterns: float  #: 0 where there are none to compare
    n_patterns: int  #: how many layers' patterns transformers gives out


class TransformersModel(nn.Module):
    """A decoder of transformers under the names that every model here has: ``model(tokens) -> logits``.

    Its modules and weights are the model's own, which stays as it was; hooks are there only while it runs.
    """

    def __init__(self, model: "PreTrainedModel"):
        """See ``probe.wrap``, which checks the model too.

        Args:
            model: a causal language model of transformers.

        Raises:
            ProbeError: for a model in which no blocks or no attention are found.
        """
        super().__init__()
        self.inner = model
        self._blocks = find_blocks(model)
        self._anatomy: Anatomy | None = None
        self.errors: Errors | None = None  #: what the check found; None before it
        self.fused = FUSED  #: the name in the registry under which its fused attention runs

    @property
    def config(self) -> Any:
        """The config of the transformers model."""
        return self.inner.config

    @property
    def owner(self) -> nn.Module:
        """The transformers model."""
        return self.inner

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
    def _table(self) -> Any:
        return self.inner.get_input_embeddings()

    @property
    def anatomy(self) -> Anatomy:
        """Its layers, sizes and sites. What its layers are is measured once, see ``probe.models.open.measured``."""
        if self._anatomy is None:
            text = self.inner.config.get_text_config()
            blocks = self._blocks
            self._anatomy = Anatomy(
                measured_layers(self.inner, self.passed, blocks),
                d_model=next((block.width for block in blocks if block.width), text.hidden_size),
                d_vocab=self._table.num_embeddings,
                n_ctx=context_of(text),
                sites=("hook_embed", *(f"blocks.{i}.{site}" for i, b in enumerate(blocks) for site in sites_of(b))),
            )
        return self._anatomy

    def forward(
        self, tokens: TokenIds, *, hooks: Mapping[str, Hook] | None = None, cache: "TransformersCache | None" = None
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits before the softmax.

        Args:
            tokens: ids "batch pos", integers of any kind.
            hooks: functions by site name. Each is called with the value at its site; what it returns, if anything,
                replaces the value. Without hooks the model runs by its own attention function.
            cache: what was computed of an earlier prefix; this call's is added to it. Not together with hooks.

        Raises:
            ProbeError: for an empty batch, ids outside the vocabulary, or a site that does not exist.
        """
        ids = token_ids(tokens)
        if ids.device.type == "cpu":
            check_ids(ids, self._table.num_embeddings)
        if cache is not None:
            if hooks:
                raise ProbeError("hooks and a cache can't be given together to a model of transformers")
            return cache.next(self.inner, ids.to(self.device))
        if not hooks:
            return self.inner(input_ids=ids.to(self.device), use_cache=False).logits
        for site in hooks:
            if site not in self.anatomy.sites:
                raise ProbeError(f"unknown site {site!r}; a {type(self.inner).__name__} has {', '.join(self._kinds())}")
        return self.run(ids, hooks)

    def _kinds(self) -> list[str]:
        return list(dict.fromkeys(site.split(".", 2)[-1] for site in self.anatomy.sites))

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
        with watched(self.inner, going, implementation), self._hooked(going):
            return self.inner(input_ids=tokens.to(self.device), use_cache=False, **inputs).logits

    @contextlib.contextmanager
    def _hooked(self, going: Pass) -> Iterator[None]:
        """Hooks on the modules: which block runs, and the states before, in and after it."""
        handles = []
        if going.hooks.has("hook_embed"):
            handles.append(self._table.register_forward_hook(_out_of_table(going)))
        before, after = _before(going, self._blocks), _after(going)
        for module in {id(block.module): block.module for block in self._blocks}.values():
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after))
        wanted = {site.split(".", 2)[-1] for site in going.hooks.hooks if site.startswith("blocks.")}
        if "hook_attn_out" in wanted:
            modules = {id(block.attention): block.attention for block in self._blocks if block.attention is not None}
            handles += [module.register_forward_hook(_out_of_attention(going)) for module in modules.values()]
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

    def new_cache(self) -> "TransformersCache":
        """An empty cache, for calls that go on from where the one before ended."""
        return TransformersCache()

    def untrained(self, seed: int) -> "TransformersModel":
        """The same architecture with fresh weights, as transformers draws them."""
        return TransformersModel(drawn_like(self.inner, seed))


class TransformersCache:
    """transformers' own cache of a model, of whatever kind it is, and the tokens that it holds."""

    def __init__(self) -> None:
        self._tokens: Tensor | None = None
        self._inner: Any = None

    def next(self, model: "PreTrainedModel", tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_vocab"]:
        """The logits of tokens that follow those before."""
        new = tokens.shape[1]
        self._tokens = tokens if self._tokens is None else torch.cat((self._tokens, tokens), 1)
        given = tokens if self._inner is not None else self._tokens
        name = _cache_name(model)
        out: Any = model(input_ids=given, use_cache=True, **{name: self._inner})
        self._inner = getattr(out, name, None)
        logits: Tensor = out.logits[:, -new:]
        return logits

    def keep(self, rows: Tensor) -> None:
        """Keep only those sequences of the batch. Some kinds of caches can't, so the next call makes it anew."""
        self._tokens, self._inner = None if self._tokens is None else self._tokens[rows], None


def _cache_name(model: "PreTrainedModel") -> str:
    """What a class calls its cache: transformers changed that in 5.24."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def drawn_like(model: "PreTrainedModel", seed: int) -> "PreTrainedModel":
    """A transformers model of the same class and config with weights that transformers draws with this seed."""
    parameter = next(model.parameters())
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(seed)
        fresh: Any = type(model)(copy.deepcopy(model.config))
    return fresh.to(parameter.device, parameter.dtype).eval()


def sites_of(block: Block) -> list[str]:
    """The sites of a block, in the order of the computation."""
    sites = ["hook_resid_pre"] if block.width else []
    if block.n_heads:
        sites += [s for s in ATTENTION_SITES if block.n_calls == 1 or s not in ("attn.hook_v", "attn.hook_z")]
    if block.mid is not None:
        sites.append("hook_resid_mid")
    return [*sites, "hook_resid_post"] if block.width else sites


def streamed_inputs(call: Call, layer: int) -> AttentionInputs:
    """What a layer's pattern follows from, where it follows from queries and keys alone.

    Raises:
        ProbeError: for a layer with a bias, a cap, a sink, or a mask that is neither causal nor a sliding window.
    """
    why = "a bias" if call.added else "a learned sink" if call.sink else "a cap on scores" if call.softcap else None
    if why is not None:
        raise ProbeError(f"streaming needs scores of q·k alone, but layer {layer} has {why}")
    window = None
    if call.mask is not None:
        seen = ~call.mask[:1, :1]
        n_visible = seen[0, 0].sum(-1)
        window = int(n_visible.max())
        n = len(n_visible)
        wanted = torch.arange(1, n + 1, device=n_visible.device).clamp(max=window)
        alike = torch.equal(call.mask, ~seen.expand_as(call.mask)) and torch.equal(n_visible, wanted)
        if not alike or bool(seen[0, 0].triu(1).any()):
            raise ProbeError(f"streaming needs a causal mask or a sliding window, but layer {layer} hides other keys")
        window = None if window == n else window
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


def _after(going: Pass) -> Callable[..., Any]:
    def hook(_: nn.Module, __: tuple[Any, ...], out: Any) -> Any:
        site = f"blocks.{going.layer}.hook_resid_post"
        return with_first(out, lambda x: going.hooks(site, x)) if is_going(going) and going.hooks.has(site) else None

    return hook


def _out_of_attention(going: Pass) -> Callable[..., Any]:
    def hook(_: nn.Module, __: tuple[Any, ...], out: Any) -> Any:
        site = f"blocks.{going.layer}.hook_attn_out"
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
