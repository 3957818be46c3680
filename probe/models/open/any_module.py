"""Any torch module as a model: its attention is seen where it calls torch for it.

A module computes attention by ``scaled_dot_product_attention``, or by a softmax over scores "batch head query key".
Both are calls of torch's, which a ``TorchFunctionMode`` sees and may answer. Hidden states are seen by hooks on the
modules that are named as blocks.
"""

import copy
import fnmatch
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from probe.errors import NoTwin, ProbeError
from probe.models.mode import evaluating
from probe.models.open.blocks import Opened
from probe.models.open.hooked import HookedModel
from probe.models.open.seam import EXPLICIT, FUSED, Call, Pass, attend, going_on
from probe.models.protocol import Hook
from probe.models.trial import agree

#: Runs a module on token ids and returns its logits "batch pos d_vocab".
CallModule = Callable[[nn.Module, Tensor], Tensor]

_SDPA_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_SOFTMAXES = (F.softmax, torch.softmax, Tensor.softmax)


class _Watcher(TorchFunctionMode):
    """Answers a module's calls for attention by ``attend``, for the hooks of a pass."""

    def __init__(self, going: Pass, n_tokens: int, fused: bool) -> None:
        super().__init__()
        self.going, self.n_tokens, self.fused = going, n_tokens, fused
        self.module = nn.Module().eval()  # stands for the one that asks, which a call of torch's does not name

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            given = dict(zip(_SDPA_ARGUMENTS, args, strict=False)) | kwargs
            if given["query"].ndim == 4:
                return self._attention(given)
        elif func in _SOFTMAXES and args and self._are_scores(args[0]):
            return self._softmax(func, args, kwargs)
        return func(*args, **kwargs)

    def _attention(self, given: dict[str, Any]) -> Tensor:
        z, _ = attend(
            self.module,
            given["query"],
            given["key"],
            given["value"],
            given.get("attn_mask"),
            scaling=given.get("scale"),
            is_causal=bool(given.get("is_causal", False)),
            fused=self.fused,
        )
        return z.transpose(1, 2)

    def _are_scores(self, x: Any) -> bool:
        square = (self.n_tokens, self.n_tokens)
        return isinstance(x, Tensor) and x.ndim == 4 and tuple(x.shape[2:]) == square and x.is_floating_point()

    def _softmax(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        scores = args[0]
        hidden = scores < torch.finfo(scores.dtype).min / 2
        if self.going.on_call is not None:
            nothing = scores.new_zeros(*scores.shape[:3], 0)
            call = Call(self.module, nothing, nothing, 1.0, hidden, False, None, False, None)
            self.going.on_call(self.going.layer, call)
        scores = self.going.at("hook_attn_scores", scores.masked_fill(hidden, -torch.inf))
        pattern: Tensor = func(scores, *args[1:], **kwargs)
        return self.going.at("hook_pattern", pattern)


class ModuleModel(HookedModel):
    """Any module under the names that every model here has: see ``probe.wrap``."""

    def __init__(
        self,
        module: nn.Module,
        blocks: str | None = None,
        embed: str | None = None,
        call: CallModule | None = None,
        n_ctx: int | None = None,
        untrained: Callable[[int], nn.Module] | None = None,
    ):
        """See ``probe.wrap``, which checks the model too."""
        lists = None if blocks is None else [_matching(module, blocks)]
        opened = Opened(module, _embedding(module, embed), n_ctx, _Forward(call), lists=lists)
        super().__init__(opened)
        self._make = untrained
        self._named: dict[str, Any] = {"blocks": blocks, "embed": embed, "call": call, "n_ctx": n_ctx}
        if not any(block.n_heads for block in self._blocks):
            where = "a list of modules" if blocks is None else f"the modules {blocks!r}"
            raise ProbeError(
                f"a {type(module).__name__} must call scaled_dot_product_attention, or a softmax over scores "
                f"(batch, head, query, key), inside {where}; none was seen: name its blocks by blocks='transformer.h.*'"
            )

    def unwatched(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_vocab"]:
        """The logits as the module computes them by itself."""
        return _logits(self._named["call"], self.inner, tokens)

    def new_cache(self) -> None:
        """None: a module's cache can't be had."""

    def untrained(self, seed: int) -> "ModuleModel":
        """A module of the same kind with fresh weights: what ``untrained=`` of ``probe.wrap`` makes, or a copy of which
        every part has drawn its weights anew.

        Raises:
            ProbeError: for a module that holds parameters of its own, which nothing can draw.
        """
        if self._make is not None:
            fresh = self._make(seed)
        else:
            fresh = copy.deepcopy(self.inner)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                for name, part in fresh.named_modules():
                    if hasattr(part, "reset_parameters"):
                        part.reset_parameters()
                    elif any(True for _ in part.parameters(recurse=False)):
                        raise NoTwin(
                            f"an untrained twin needs wrap(…, untrained=function of a seed): {name or 'the module'} "
                            f"({type(part).__name__}) has parameters and no reset_parameters"
                        )
        parameter = next(self.inner.parameters())
        return ModuleModel(fresh.to(parameter.device, parameter.dtype).eval(), **self._named, untrained=self._make)


class _Forward:
    """Runs a module under a pass. An object and no closure, so that a copy of a model runs the copy."""

    def __init__(self, call: CallModule | None) -> None:
        self.call = call

    def __call__(self, module: nn.Module, tokens: Tensor, going: Pass, kind: str = EXPLICIT) -> Tensor:
        with going_on(going), _Watcher(going, tokens.shape[1], kind == FUSED):
            return _logits(self.call, module, tokens)


def _logits(call: CallModule | None, module: nn.Module, tokens: Tensor) -> Float[Tensor, "batch pos d_vocab"]:
    out: Any = module(tokens) if call is None else call(module, tokens)
    logits = getattr(out, "logits", out)
    logits = logits[0] if isinstance(logits, tuple | list) and logits else logits
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != tokens.shape:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ProbeError(
            f"a {type(module).__name__} called with token ids must return logits (batch, pos, d_vocab), got {got}: say "
            "how by call=, such as call=lambda model, ids: model(ids, targets=ids)[0]"
        )
    return logits


def _matching(module: nn.Module, pattern: str) -> list[nn.Module]:
    """The modules whose names match a pattern; ``*`` stands for one part of a name."""
    depth = pattern.count(".")
    names = {n: m for n, m in module.named_modules() if n.count(".") == depth and fnmatch.fnmatchcase(n, pattern)}
    if not names:
        raise ProbeError(
            f"blocks={pattern!r} must match the names of some modules; the lists of modules are: "
            f"{', '.join(_lists(module)) or 'none'}"
        )
    return [*names.values()]


def _lists(module: nn.Module) -> Iterable[str]:
    return (f"{name}.*" for name, m in module.named_modules() if isinstance(m, nn.ModuleList | nn.Sequential))


def _embedding(module: nn.Module, name: str | None) -> nn.Embedding:
    """The embedding of tokens: the one that is named, or the first."""
    tables = {n: m for n, m in module.named_modules() if isinstance(m, nn.Embedding)}
    if name is not None and name not in tables:
        raise ProbeError(f"embed must name an nn.Embedding, got {name!r}; there are: {', '.join(tables) or 'none'}")
    if not tables:
        raise ProbeError(f"a {type(module).__name__} must embed its tokens by an nn.Embedding, and has none")
    return tables[name] if name is not None else next(iter(tables.values()))


@torch.no_grad()
def check_module(model: ModuleModel) -> None:
    """Hold a module's seam against the module: its logits are the same when it is looked at, and scores that are edited
    give the same logits as the pattern that they make.

    Args:
        model: the module under the seam.

    Raises:
        ProbeError: for what does not hold.
    """
    whose, tokens = f"a {type(model.inner).__name__}", model.tokens()
    with evaluating(model.inner):
        plain = model(tokens)
        for explicit in (True, False):
            agree(
                model.run(tokens, {}, explicit=explicit), plain, f"{whose}: the logits of the module, watched and not"
            )
        patterns: dict[str, Tensor] = {}
        by_scores: dict[str, Hook] = {}
        for i, layer in enumerate(model.anatomy.layers):
            if layer.attends:
                by_scores[f"blocks.{i}.attn.hook_attn_scores"] = _equal
                by_scores[f"blocks.{i}.attn.hook_pattern"] = _keep(patterns, f"blocks.{i}.attn.hook_pattern")
        edited = model.run(tokens, by_scores, explicit=True)
        again = model.run(tokens, {site: _put(value) for site, value in patterns.items()}, explicit=True)
        agree(again, edited, f"{whose}: logits with edited scores and with an edited pattern")


def _equal(scores: Float[Tensor, "batch head query key"]) -> Tensor:
    return torch.zeros_like(scores).masked_fill(scores == -torch.inf, -torch.inf)


def _keep(into: dict[str, Tensor], site: str) -> Hook:
    return lambda value: into.__setitem__(site, value)


def _put(value: Tensor) -> Hook:
    return lambda _: value
