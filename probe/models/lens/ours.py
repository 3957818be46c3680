"""A decoder of ours as a ``TransformerBridge``: a view that shares its parameters and leaves its modules alone."""

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from probe.models.attention_functions import AttentionFunction
from probe.models.decoder import Decoder, check_decoder
from probe.models.layers import Attention, ContentBias
from probe.models.lens.released import bridge_of
from probe.models.open.transformers_model import TransformersModel
from probe.models.scaled import check_not_scaled

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter

ARCHITECTURE = "PositionProbeDecoder"

_NORMALIZATION_TYPES = {"layer": "LN", "rms": "RMS", "none": None}
_ACTIVATIONS = {"swiglu": "silu", "gelu_tanh": "gelu_new"}  # those that have other names there


def to_bridge(model: nn.Module) -> "TransformerBridge":
    """A ``TransformerBridge`` of a model: the same logits, hooks at every site, edits that reach the logits.

    The bridge reads the model's own parameters (training one trains the other); after moving or casting the model, make
    a new one. Tokens are integers: there is no tokenizer. The pattern that the bridge of a decoder of ours holds comes
    from a softmax (or the decoder's attention function) in float32, whatever the decoder's dtype.

    Args:
        model: a ``Decoder``, or a model of transformers as ``load_pretrained`` and ``wrap`` return it. TransformerLens
            knows fewer kinds of those than can be measured here without a bridge.

    Raises:
        ProbeError: for anything else; for a model of transformers that TransformerLens does not know or does not bridge
            exactly; while a ``HeadScale`` is on the model: put it on the bridge instead.
    """
    if isinstance(model, TransformersModel):
        check_not_scaled(model, "a bridge")
        return bridge_of(_sharing(model.inner), f"a {type(model.inner).__name__}")
    check_decoder(model)
    assert isinstance(model, Decoder)
    return _bridge_of_decoder(model)


M = TypeVar("M", bound=nn.Module)


def _sharing(model: M) -> M:
    """A clone that shares every parameter and buffer: wrapping replaces sub-modules in place."""
    shared = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, shared).eval()


def _bridge_of_decoder(decoder: Decoder) -> "TransformerBridge":
    check_not_scaled(decoder, "a bridge")
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    config = decoder.config
    ArchitectureAdapterFactory.register_adapter(ARCHITECTURE, _adapter_class(config.embedding_norm))
    settings = TransformerBridgeConfig(
        d_model=config.d_model,
        d_head=config.d_head,
        n_layers=config.n_layers,
        n_ctx=config.n_ctx,
        n_heads=config.n_heads,
        n_key_value_heads=config.n_kv_heads if config.n_kv_heads != config.n_heads else None,
        d_mlp=config.d_mlp,
        d_vocab=config.d_vocab,
        d_vocab_out=config.d_vocab,
        normalization_type=_NORMALIZATION_TYPES[config.normalization],
        uses_rms_norm=config.normalization == "rms",
        eps=config.norm_eps,
        act_fn=_ACTIVATIONS.get(config.activation, config.activation),
        gated_mlp=config.activation == "swiglu",
        parallel_attn_mlp=config.parallel,
        # Learned positions are part of ``encoding`` here, not a table of TransformerLens's own.
        positional_embedding_type="none",
        default_prepend_bos=False,
        device=str(decoder.device),
    )
    rotation = decoder.encoding.rotation(torch.zeros(1, dtype=torch.long), torch.zeros(()))
    if rotation is not None:  # else a half of the dimensions would be taken for halves of all of them
        settings.rotary_pct = rotation[0].shape[-1] / config.d_head
    return build_bridge_from_module(_sharing(decoder), ARCHITECTURE, tl_config=settings, tokenizer=None)


def _adapter_class(embedding_norm: bool) -> "type[ArchitectureAdapter]":
    from transformer_lens.hook_points import HookPoint
    from transformer_lens.model_bridge import generalized_components as parts
    from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

    class TurnedHookPoint(HookPoint):
        """Hooks see what enters times ``factor()``; what they hand on is kept in ``value``."""

        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]  # TransformerLens has no types there
            self.factor: Callable[[], Tensor | None] | None = None
            self.value: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            factor = self.factor() if self.factor is not None else None
            return x if factor is None else x * factor

        def __call__(self, x: Tensor) -> Tensor:
            self.value = handed_on = super().__call__(x)
            return handed_on

    class AttentionBridge(parts.PositionEmbeddingsAttentionBridge):
        rope_optional = True  # most encodings turn nothing
        hook_in: TurnedHookPoint
        hook_rot_q: TurnedHookPoint
        hook_rot_k: TurnedHookPoint
        content_bias: ContentBias | None

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            # TransformerLens makes these two for rotary models only; its forward pass calls them wherever they are.
            self.hook_rot_q, self.hook_rot_k = TurnedHookPoint(), TurnedHookPoint()
            # What hooks make of the hidden states decides the scale of the queries.
            self.hook_in = TurnedHookPoint()
            self.content_bias = None

        @property
        def function(self) -> AttentionFunction:
            ours = self.original_component
            assert isinstance(ours, Attention)
            return ours.function

        def forward(
            self, *args: Any, decay: Tensor | None = None, content_bias: ContentBias | None = None, **kwargs: Any
        ) -> Any:
            # Its forward pass knows rotations and masks only, so the rest is done where it calls what is ours.
            self.content_bias = content_bias
            self.hook_rot_q.factor = lambda: self._query_factor(decay)
            if decay is not None:
                self.hook_rot_k.factor = lambda: 1 / decay
            try:
                return super().forward(*args, **kwargs)
            finally:
                self.content_bias = None
                for point in (self.hook_in, self.hook_rot_q, self.hook_rot_k):
                    point.factor, point.value = None, None

        def _query_factor(self, decay: Tensor | None) -> Tensor | None:
            assert self.hook_in.value is not None  # the hidden states come by before queries do
            scale = self.function.query_scale(self.hook_in.value, 0)
            if scale is None:
                return decay
            scale = scale.transpose(1, 2)[..., None]
            return scale if decay is None else decay * scale

        def _apply_reconstruct_attention_mask(self, attn_scores: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if self.content_bias is not None:
                q, k = self.hook_rot_q.value, self.hook_rot_k.value
                assert q is not None and k is not None  # scores are made of them
                k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
                attn_scores = attn_scores + self.content_bias(q, k)
            return super()._apply_reconstruct_attention_mask(attn_scores, *args, **kwargs)

        def _masked_softmax(self, attn_scores: Tensor, dtype: torch.dtype | None = None) -> Tensor:
            if self.function.is_softmax:
                return super()._masked_softmax(attn_scores, dtype)
            return self.function.normalise(attn_scores.to(dtype or attn_scores.dtype))

    class DecoderAdapter(ArchitectureAdapter):
        supports_kv_cache = False

        def __init__(self, cfg: Any) -> None:
            super().__init__(cfg)
            self.weight_processing_conversions = {**self._qkvo_weight_conversions(include_biases=True)}
            projections = {slot: parts.LinearBridge(name=f"{slot}_proj") for slot in "qkvo"}
            self.component_mapping = {
                "embed": parts.EmbeddingBridge(name="token_embedding"),
                **({"embed_ln": _norm(cfg, "embedding_norm")} if embedding_norm else {}),
                "blocks": (parts.ParallelBlockBridge if cfg.parallel_attn_mlp else parts.BlockBridge)(
                    name="layers",
                    config=cfg,
                    submodules={
                        "ln1": _norm(cfg, "attention_norm"),
                        "attn": AttentionBridge(name="attention", config=cfg, submodules=projections),
                        "ln2": _norm(cfg, "mlp_norm"),
                        "mlp": _mlp(cfg),
                    },
                ),
                "ln_final": _norm(cfg, "final_norm"),
                "unembed": parts.UnembeddingBridge(name="head", config=cfg),
            }

    def _norm(cfg: Any, name: str) -> GeneralizedComponent:
        if cfg.normalization_type is None:
            return GeneralizedComponent(name=name, config=cfg)
        kind = parts.RMSNormalizationBridge if cfg.uses_rms_norm else parts.NormalizationBridge
        return kind(name=name, config=cfg)

    def _mlp(cfg: Any) -> GeneralizedComponent:
        slots = {"in": "up_proj", "out": "down_proj"} | ({"gate": "gate_proj"} if cfg.gated_mlp else {})
        submodules: dict[str, GeneralizedComponent] = {
            slot: parts.LinearBridge(name=name) for slot, name in slots.items()
        }
        kind = parts.GatedMLPBridge if cfg.gated_mlp else parts.MLPBridge
        return kind(name="mlp", config=cfg, submodules=submodules)

    return DecoderAdapter
