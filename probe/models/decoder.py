"""The decoder that everything is measured on: a causal, pre-norm transformer in plain torch.

Its residual stream is ``x <- x + Attention(norm(x)); x <- x + MLP(norm(x))``, with a norm before the unembedding; where
the config says so, both are added at once, and a norm stands behind the token embedding.
Intermediate values are reached by hooks under the names that TransformerLens uses (``SITES`` and ``BLOCK_SITES``); the
attention module keeps the calling convention of Hugging Face's Llama, so that ``probe.models.lens`` can wrap it.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from probe.errors import ProbeError
from probe.limits import current
from probe.models.checks import check_call
from probe.models.config import BLOCK_SITES, SITES, DecoderConfig, sites_of_block
from probe.models.encodings.base import future_keys
from probe.models.layers import Block, BlockwiseMask, ContentBias, Hook, Hooks, KVCache
from probe.models.protocol import ATTENTION, Anatomy, Layer, Visit
from probe.models.streamed import visit_layers
from probe.models.undrawn import undrawn
from probe.sequences import TokenIds

__all__ = ["BLOCK_SITES", "SITES", "Decoder", "DecoderConfig", "Hook", "KVCache"]


def check_decoder(model: object) -> None:
    """Refuse what is no decoder of ours.

    Raises:
        ProbeError: for anything else.
    """
    if not isinstance(model, Decoder):
        raise ProbeError(f"model must be a Decoder, got {type(model).__name__}")


class Decoder(nn.Module):
    """A causal decoder with any position encoding: ``decoder(tokens) -> logits``."""

    def __init__(self, config: DecoderConfig, seed: int | None = 0, device: str = "cpu"):
        """A decoder with freshly drawn weights; ``seed=None`` leaves them undrawn, any numbers, to be written over.

        The weights are a function of the seed: torch's global generator is neither read nor moved. On the ``device``
        "meta" undrawn weights have no memory yet.
        """
        super().__init__()
        self.config = config
        with undrawn():
            self.token_embedding = nn.Embedding(config.d_vocab, config.d_model)
            if config.embedding_norm:
                self.embedding_norm = config.make_norm()
            self.encoding = config.make_encoding()
            self.dropout = nn.Dropout(config.dropout)
            blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
            self.layers = cast("Sequence[Block]", blocks)  # torch's list does not say of what it is
            self.final_norm = config.make_norm()
            self.head = nn.Linear(config.d_model, config.d_vocab, bias=False)
        # In float32 whatever torch's default is, so that the seed alone decides which numbers are drawn.
        self.to(torch.float32).to_empty(device=device)
        if config.tie_embeddings:
            self.head.weight = self.token_embedding.weight
        if seed is not None:
            self.reset_parameters(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw all weights: linear maps N(0, 1/d_in), those that write into the stream divided by sqrt(2 n_layers)
        (Radford et al. 2019), embeddings N(0, 1) (N(0, 1/d_model) where the head is tied to them), biases 0."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                std = module.in_features**-0.5
                if name.endswith(("o_proj", "down_proj")):
                    std /= math.sqrt(2 * self.config.n_layers)
                nn.init.normal_(module.weight, std=std, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
                module.reset_parameters()
        embedding_std = self.config.d_model**-0.5 if self.config.tie_embeddings else 1.0
        nn.init.normal_(self.token_embedding.weight, std=embedding_std, generator=generator)
        self.encoding.reset_parameters(generator)
        for block in self.layers:
            block.attention.function.reset_parameters(generator)

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.token_embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """That of its weights."""
        return self.token_embedding.weight.dtype

    @property
    def owner(self) -> "Decoder":
        """The decoder itself, which holds its config and weights."""
        return self

    @property
    def anatomy(self) -> Anatomy:
        """Its layers, sizes and sites, as its config says."""
        config = self.config
        layers = tuple(
            Layer(
                ATTENTION,
                config.encoding if config.sees_position(layer) else "none",
                config.n_heads,
                config.window(layer),
                temperature=config.has_temperature,
            )
            for layer in range(config.n_layers)
        )
        return Anatomy(layers, config.d_model, config.d_vocab, config.n_ctx, tuple(config.sites()))

    def run(
        self, tokens: Int[Tensor, "batch pos"], hooks: Mapping[str, Hook], *, explicit: bool = False
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """See ``probe.models.protocol.Model.run``."""
        return self(tokens.to(self.device), hooks=hooks, attention="explicit" if explicit else "auto")

    def attention_inputs(self, tokens: Int[Tensor, "batch pos"], visit: Visit, layers: Sequence[int]) -> None:
        """See ``probe.models.protocol.Model.attention_inputs``."""

        def run(hooks: Mapping[str, Hook]) -> Tensor:
            return self(tokens.to(self.device), hooks=hooks, attention="fused")

        visit_layers(run, self.config, self.encoding, visit, layers)

    def untrained(self, seed: int) -> "Decoder":
        """A decoder of the same config with the weights from which a training with that seed starts."""
        return Decoder(self.config, seed).to(self.device, self.dtype).eval()

    def own_positions(self, n: int) -> Int[Tensor, "pos"]:
        """The positions of n tokens where the caller names none, outside training."""
        return self.encoding.positions(n, random=False)

    def new_cache(self) -> KVCache:
        """An empty cache, for calls that go on from where the one before ended."""
        return KVCache()

    def forward(
        self,
        tokens: TokenIds,
        *,
        positions: Int[Tensor, "all_positions"] | None = None,
        cache: KVCache | None = None,
        hooks: Mapping[str, Hook] | None = None,
        attention: str = "auto",
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits before the softmax, each row from the tokens up to and with its own.

        Args:
            tokens: ids in 0…d_vocab-1, "batch pos", integers of any kind.
            positions: the 0-based position of each column; by default the encoding's own, nearly always 0, 1, 2, …
                (after what the cache holds).
            cache: keys and values of an earlier prefix; this call's are appended to it.
            hooks: functions by site name. Each is called with the value at its site; what it returns, if anything,
                replaces the value.
            attention: "fused" (one kernel, no pattern is ever held), "explicit" (scores, softmax, product), or
                "auto": explicit where a hook wants scores or patterns, at short lengths on a CPU, or where the
                attention function is no softmax, which alone has the kernel.

        Raises:
            ProbeError: for an empty batch, ids outside the vocabulary, a site that does not exist, or a position
                beyond a learned table.
        """
        ids = check_call(
            tokens, hooks or (), attention, self.config, "a decoder's", sites_of_block(self.config.parallel)
        )
        past = 0 if cache is None else cache.length
        n_query, n_key = ids.shape[1], past + ids.shape[1]
        if positions is None:
            key_positions = self.encoding.positions(n_key, random=self.training and cache is None)
        else:
            key_positions = positions.cpu()
        if len(key_positions) != n_key:
            raise ProbeError(f"positions must name all {n_key} positions (cached ones too), got {len(key_positions)}")
        query_positions = key_positions[past:]
        sees_scores = hooks is not None and any(s.endswith(("hook_attn_scores", "hook_pattern")) for s in hooks)
        if attention == "auto":
            short_on_cpu = ids.device.type == "cpu" and n_key <= current().explicit_length
            explicit = sees_scores or short_on_cpu or not self.config.is_softmax
            attention = "explicit" if explicit else "fused"
        fused = attention == "fused"
        if fused and not self.config.is_softmax:
            name = self.config.attention_function
            raise ProbeError(f"fused attention wants a softmax, got attention function {name!r}")
        if fused and sees_scores:
            raise ProbeError("fused attention holds no scores and no pattern: hook them with attention='explicit'")

        at = Hooks(hooks) if hooks else None
        x = self.token_embedding(ids)
        if self.config.embedding_norm:
            x = self.embedding_norm(x)
        if at is not None:
            x = at("hook_embed", x)
        x = self.dropout(self.encoding.embed(x, query_positions))
        has_bias = self.encoding.bias(query_positions[:1], key_positions[:1], x) is not None

        @functools.cache
        def mask(seen: bool, window: int | None) -> "Tensor | BlockwiseMask | None":
            """None stands for the plain causal mask, which the fused kernel knows by itself."""
            biased = seen and has_bias
            written = n_query > 1 and (n_query < n_key or not fused or (seen and self.encoding.reads_content))
            if not (written or biased or window):
                return None
            return self._mask(query_positions, key_positions, x, fused, biased, window)

        rotation = self.encoding.rotation(query_positions, x)
        # Handed on only where there is something: nobody else has to know of them.
        in_attention: dict[str, Any] = {}
        decay = self.encoding.decay(query_positions, x)
        if decay is not None:
            in_attention["decay"] = decay
        extra: dict[str, Any] = {"fused": True} if fused else {}
        if cache is not None:
            extra["cache"] = cache
        for layer, block in enumerate(self.layers):
            seen, window = self.config.sees_position(layer), self.config.window(layer)
            if self.encoding.reads_content:
                in_attention["content_bias"] = self._content_bias(layer, key_positions)
            x = block(
                x,
                attention_mask=mask(seen, window if window is not None and window < n_key else None),
                position_embeddings=rotation if seen else None,
                hooks=at and at.under(f"blocks.{layer}."),
                **(in_attention if seen else {}),
                **extra,
            )
        if cache is not None:
            cache.length = n_key
        logits = self.head(self.final_norm(x))
        return logits if self.config.logit_scale == 1 else logits * self.config.logit_scale

    def _mask(
        self, query: Tensor, key: Tensor, like: Tensor, fused: bool, biased: bool, window: int | None
    ) -> Float[Tensor, "1 #head query key"] | BlockwiseMask:
        """The causal mask of queries at the last of the keys, with the encoding's bias or without, and with a sliding
        window or without."""

        def rows(start: int, end: int) -> Tensor:
            visible = key[: len(key) - len(query) + end]
            future = future_keys(end - start, len(visible), like.device)
            if window is not None:
                future = future | ~future_keys(end - start, len(visible), like.device, ahead=-window)
            bias = self.encoding.bias(query[start:end], visible, like) if biased else None
            return (like.new_zeros(1, *future.shape) if bias is None else bias)[None].masked_fill(future, -math.inf)

        row = len(key) * (self.config.n_heads if biased else 1)
        if self.encoding.reads_content:  # its bias is added to the mask, and differs from sequence to sequence
            row = len(key) * self.config.n_heads * len(like)
        if fused and len(query) * row > current().whole_mask:
            return BlockwiseMask(rows, max(1, current().mask_block // row))
        return rows(0, len(query))

    def _content_bias(self, layer: int, positions: Int[Tensor, "key"]) -> ContentBias:
        """The encoding's bias of a layer, for keys at the first of these positions and queries at the last of those."""

        def bias(q: Tensor, k: Tensor) -> Tensor:
            key = positions[: k.shape[2]]
            return self.encoding.content_bias(layer, q, k, key[-q.shape[2] :], key, self.config.score_scale)

        return bias
