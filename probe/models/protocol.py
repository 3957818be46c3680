"""What every model that is looked at can be asked, wherever it came from.

A ``Decoder`` and a ``ClockworkRNN`` answer by themselves; a transformers model, a TransformerBridge and any torch
module answer through the classes in ``probe.models.open``. Nothing above ``probe.models`` asks which of them it has.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

# What is called with the value at a site; what it returns, if anything, takes the value's place.
Hook = Callable[[Tensor], Tensor | None]

# Kinds of layers. A layer that mixes tokens in two ways at once has both, joined by "+": "attention+recurrence".
ATTENTION, RECURRENCE, CONVOLUTION, LINEAR, NO_MIXING = (
    *("attention", "recurrence", "convolution", "linear attention", "mlp"),
)


@dataclass(frozen=True)
class Layer:
    """What one layer of a model is made of."""

    kind: str  #: "attention", "recurrence", "linear attention", "convolution", "mlp", or two of them with "+" between
    encoding: str  #: the position encoding that it sees: "none", "rotary", "learned", …; "unknown" without a name
    n_heads: int = 0  #: heads of its attention; 0 in a layer without attention
    window: int | None = None  #: how many keys a query sees at most, its own included; None: all up to its own
    sink: bool = False  #: whether a learned sink takes a share of each row, so that its pattern sums to less than 1
    temperature: bool = False  #: whether scores are multiplied by a number that depends on the query's position

    @property
    def attends(self) -> bool:
        """Whether the layer has an attention pattern."""
        return self.n_heads > 0


def layers_in_words(layers: Sequence[Layer]) -> str:
    """What layers are, each sort once with its number: "3 rotary with a window, 1 without position"."""
    sorts: dict[str, int] = {}
    for layer in layers:
        if layer.attends:
            position = "without position" if layer.encoding == "none" else layer.encoding
            having = {"a window": layer.window, "a sink": layer.sink, "a temperature": layer.temperature}
            extra = " and ".join(name for name, there in having.items() if there)
            words = f"{position} with {extra}" if extra else position
            words = words if layer.kind == ATTENTION else f"{layer.kind}: {words}"
        else:
            words = layer.kind
        sorts[words] = sorts.get(words, 0) + 1
    return ", ".join(f"{n} {words}" for words, n in sorts.items())


@dataclass(frozen=True)
class Anatomy:
    """What a model is made of."""

    layers: tuple[Layer, ...]  #: in the order in which they are computed
    d_model: int  #: the width of the residual stream
    d_vocab: int  #: how many token ids it takes
    n_ctx: int | None  #: the longest sequence that it takes; None: no limit of its own
    sites: tuple[str, ...]  #: full names of all sites, in the order in which they are computed


@dataclass(frozen=True)
class AttentionInputs:
    """All that a layer's pattern follows from: softmax(scale q_t·k_i + bias[t - i]), t - window < i ≤ t."""

    q: Float[Tensor, "batch head query d_head"]  #: as they enter the scores, after any rotation
    k: Float[Tensor, "batch kv_head query d_head"]  #: likewise
    scale: float  #: what q·k is multiplied with
    bias: Float[Tensor, "head query"] | None = None  #: by distance, in nats
    window: int | None = None  #: how many keys a query sees at most; all up to its own where None


Visit = Callable[[int, AttentionInputs], None]


@runtime_checkable
class Model(Protocol):
    """What measurements ask of a model."""

    @property
    def anatomy(self) -> Anatomy:
        """Its layers, sizes and sites."""

    @property
    def device(self) -> torch.device:
        """Where it takes its tokens."""

    @property
    def owner(self) -> nn.Module:
        """The module that holds the config and the weights: for a view of a model, the model that is viewed."""

    def run(
        self, tokens: Int[Tensor, "batch pos"], hooks: Mapping[str, Hook], *, explicit: bool = False
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """The logits, while each hook is called with the value at its site.

        Hidden keys are -inf in scores.

        Args:
            tokens: ids that the model knows, on any device.
            hooks: by full site name. What a hook returns, if anything, takes the value's place.
            explicit: whether attention always makes scores and patterns. Then two runs of one model differ by their
                edits and not by the kernel. Otherwise that is so only where a hook needs them.
        """

    def attention_inputs(self, tokens: Int[Tensor, "batch pos"], visit: Visit, layers: Sequence[int]) -> None:
        """Call ``visit(layer, inputs)`` at the attention of each of these layers, in order; nothing is kept.

        Raises:
            ProbeError: where a layer's pattern does not follow from its queries and keys.
        """

    def new_cache(self) -> Any:
        """An empty cache for ``model(tokens, cache=cache)``, with a method ``keep(rows)``; None where there is none."""

    def untrained(self, seed: int) -> nn.Module:
        """A model of the same architecture with fresh weights of that seed, on the same device and of the same dtype.

        Raises:
            ProbeError: for a model whose architecture nobody can draw.
        """
