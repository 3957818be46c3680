"""Any decoder of transformers, seen and edited through its attention function and hooks on its blocks."""

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probe.errors import ProbeError
from probe.models.open.blocks import Opened, context_of
from probe.models.open.hooked import HookedModel
from probe.models.open.quiet import quiet_transformers
from probe.models.open.seam import EXPLICIT, Pass, watched
from probe.models.protocol import Hook
from probe.sequences import TokenIds

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _forward(
    model: "PreTrainedModel", tokens: Tensor, going: Pass, implementation: str = EXPLICIT, **inputs: Any
) -> Float[Tensor, "batch pos d_vocab"]:
    with watched(model, going, implementation):
        logits: Tensor = model(input_ids=tokens, use_cache=False, **inputs).logits
    return logits


@dataclass(frozen=True)
class Errors:
    """The largest differences between the seam and transformers' eager attention, relative to the largest number."""

    logits: float
    patterns: float  #: 0 where there are none to compare
    n_patterns: int  #: how many layers' patterns transformers gives out


class TransformersModel(HookedModel):
    """A decoder of transformers under the names that every model here has: ``model(tokens) -> logits``.

    Its modules and weights are the model's own, which stays as it was; hooks are there only while it runs.
    """

    inner: "PreTrainedModel"

    def __init__(self, model: "PreTrainedModel"):
        """See ``probe.wrap``, which checks the model too.

        Args:
            model: a causal language model of transformers.

        Raises:
            ProbeError: for a model that never asks transformers' registry for attention, or as ``find_blocks``.
        """
        text = model.config.get_text_config()
        n_layers, types = (getattr(text, name, None) for name in ("num_hidden_layers", "layer_types"))
        super().__init__(Opened(model, model.get_input_embeddings(), context_of(text), _forward, n_layers, types))
        if not any(block.n_heads for block in self._blocks):
            raise ProbeError(
                f"a model whose attention goes through transformers' registry is needed, but a {type(model).__name__} "
                "never asks it for attention"
            )
        self.errors: Errors | None = None  #: what the check found; None before it

    @property
    def config(self) -> Any:
        """The config of the transformers model."""
        return self.inner.config

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
        if cache is None:
            return super().forward(tokens, hooks=hooks)
        if hooks:
            raise ProbeError("hooks and a cache can't be given together to a model of transformers")
        return cache.next(self.inner, self._ids(tokens))

    def unwatched(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_vocab"]:
        """The logits by the attention function that the model's config names."""
        logits: Tensor = self.inner(input_ids=tokens, use_cache=False).logits
        return logits

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
