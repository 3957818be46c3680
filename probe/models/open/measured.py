"""What the layers of a model are, measured: which of them see position, by what, and how far they see.

Each attention module is fed one state again and again, the last one that it got, so that nothing upstream matters: no
recurrent layer, no sink, no other layer's positions. Then all queries that see no position are the same, and all keys
are, so the scores of a row are equal. What differs is the layer's own position encoding.
"""

import contextlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from probe.models.hidden_keys import sliding_window
from probe.models.layers import Hooks
from probe.models.mode import evaluating
from probe.models.open.blocks import Block, Opened
from probe.models.open.seam import EXPLICIT, Call, Pass
from probe.models.protocol import ATTENTION, CONVOLUTION, LINEAR, NO_MIXING, RECURRENCE, Layer
from probe.models.trial import least_difference

# The names of classes of modules that mix tokens without attention. DeltaNets, lightning attention and Kimi's KDA keep
# a matrix of keys and values, so they are linear attention.
_MIXERS = {
    LINEAR: re.compile(r"Delta|Linear_?Attention|Lightning|KDA"),
    RECURRENCE: re.compile(r"Mamba|Mixer$|SSM|RecurrentBlock|RgLru|Rwkv"),
    CONVOLUTION: re.compile(r"Short_?Conv"),
}


@torch.no_grad()
def measured_layers(model: Opened, run: Callable[..., Tensor], blocks: Sequence[Block]) -> tuple[Layer, ...]:
    """What each block of a model is.

    "rotary" turns queries and keys, whose norms stay. "alibi" adds a number in proportion to the distance to the
    scores, "relative bias" another. "learned" and "sinusoidal" positions come with the embedding, so every layer reads
    them. A temperature multiplies the score of a query with its own key by a number that depends on its position; it is
    looked for at positions up to the model's context, and believed where the module says so.
    """
    seen = _repeated(model, run, blocks)
    far = _repeated(model, run, blocks, stretched=True)
    least = least_difference(model.table.weight.dtype)
    absolute = _absolute(model, run, blocks, least)
    layers = []
    for i, block in enumerate(blocks):
        kind = kind_of(block)
        if not block.n_heads:
            layers.append(Layer(kind, "recurrence" if RECURRENCE in kind else "none"))
            continue
        relative = seen[i].encoding(least)
        named = [name for name in (absolute, relative) if name != "none"]
        layers.append(
            Layer(
                kind,
                "+".join(named) or "none",
                block.n_heads,
                _window(block, seen[i], model.layer_types),
                block.sink,
                seen[i].warms(least) or far.get(i, seen[i]).warms(least) or _tuned(block),
            )
        )
    return tuple(layers)


def kind_of(block: Block) -> str:
    """The kind of a block: its mixers by the names of their classes, and attention where it asked for it."""
    names = [type(module).__name__ for module in block.module.modules()]
    kinds = [kind for kind, pattern in _MIXERS.items() if any(map(pattern.search, names))]
    if block.n_heads:
        kinds = [ATTENTION, *(kind for kind in kinds if kind == RECURRENCE)]
    return "+".join(kinds) or NO_MIXING


def _window(block: Block, seen: "_Seen", types: Sequence[str] | None) -> int | None:
    """The window of a layer. One longer than the trial's sequences is believed as the module says it, unless the config
    calls the layer one of full attention."""
    said, index = block.window, getattr(block.attention, "layer_idx", None)
    if seen.window or not isinstance(said, int) or not seen.scores.shape[-1] <= said:
        return seen.window
    full = types and isinstance(index, int) and index < len(types) and types[index] == "full_attention"
    return None if full else said


def _tuned(block: Block) -> bool:
    """Whether the module says that it has a temperature. Llama 4's begins at position 8,192 and is the only one that
    no positions of the tokens change, so that it can't be seen on short sequences."""
    tuned = bool(getattr(block.attention, "attn_temperature_tuning", False))
    return tuned and not getattr(block.attention, "use_rope", False)


@dataclass(frozen=True)
class _Seen:
    """What the attention of a layer did with one state repeated. ``hidden`` is True where a key is hidden."""

    q: Tensor
    k: Tensor
    scores: Tensor
    hidden: Tensor
    capped: bool

    @property
    def window(self) -> int | None:
        """How many keys a query sees at most, where that is fewer than all up to its own."""
        window = sliding_window(~self.hidden[0, 0])
        return None if window == self.hidden.shape[-1] else window

    def encoding(self, least: float) -> str:
        """The name of the layer's own encoding, "none" where the scores of every row are equal."""
        half = self.scores.shape[-1] // 2  # what a convolution before attention makes of the first states is past
        row, visible = self.scores[:, :, -1, half:].float(), ~self.hidden[:, :, -1, half:]
        size = row.where(visible, 0.0).abs().amax().clamp(min=1e-30)
        spread = row.where(visible, -torch.inf).amax(-1) - row.where(visible, torch.inf).amin(-1)
        if not float(spread.amax()) > least * float(size):
            return "none"
        alike = [F.cosine_similarity(x[..., -1:, :], x[..., half:, :], dim=-1) for x in (self.q, self.k)]
        if self.q.shape[-1] and any(float(1 - x.amin()) > least for x in alike):
            return "rotary"
        away = torch.arange(row.shape[-1] - 1, -1, -1, device=row.device).float()
        y = row - row[..., -1:]
        off = (y - _line(y, away, visible)).where(visible, 0.0)
        if float(off.abs().amax()) < least * float(size):
            return "alibi"
        return "relative bias" if self.q.shape[-1] else "unknown"

    def warms(self, least: float) -> bool:
        """Whether the score of a query with its own key is multiplied by a number that depends on its position.

        The number is the same in every head. A norm whose weights act on turned queries and keys makes these scores
        depend on the position too, but otherwise in every head.
        """
        own = self.scores.diagonal(dim1=-2, dim2=-1)[..., self.scores.shape[-1] // 2 :].float()
        size = own.abs().amax(-1, keepdim=True).clamp(min=1e-30)
        by = own / (size * own[..., -1:].sign())
        varies = float((by.amax(-1) - by.amin(-1)).amax())
        return not self.capped and varies > least and float((by - by[:, :1]).abs().amax()) < varies / 4


def _line(y: Tensor, x: Tensor, visible: Tensor) -> Tensor:
    """The least-squares line through the origin of y over x, where visible."""
    slope = (y * x).where(visible, 0.0).sum(-1) / x.square().where(visible, 0.0).sum(-1).clamp(min=1e-30)
    return slope[..., None] * x


def _repeated(
    model: Opened, run: Callable[..., Tensor], blocks: Sequence[Block], *, stretched: bool = False
) -> dict[int, _Seen]:
    """What each layer's attention does with one state repeated. ``stretched`` puts the tokens far apart, at positions
    up to the model's context; a model that takes no positions gives nothing."""
    found: dict[int, _Seen] = {}
    calls: dict[int, Call] = {}
    n_ctx, tokens = model.n_ctx, model.tokens()
    n = tokens.shape[1]

    def scores_at(layer: int) -> Callable[[Tensor], None]:
        def hook(scores: Tensor) -> None:
            call = calls[layer]
            hidden = scores == -torch.inf
            found[layer] = _Seen(call.query.float(), call.key.float(), scores, hidden, call.softcap is not None)

        return hook

    def on_call(layer: int, call: Call) -> None:
        calls.setdefault(layer, call)

    hooks = {f"blocks.{i}.attn.hook_attn_scores": scores_at(i) for i, block in enumerate(blocks) if block.n_heads}
    modules = {id(block.attention): block.attention for block in blocks if block.attention is not None}
    inputs = {}
    if stretched:
        if n_ctx is None or n_ctx <= n:
            return {}
        inputs["position_ids"] = torch.linspace(0, n_ctx - 1, n, device=tokens.device).long().expand(2, n)
    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluating(model.inner))
        for module in modules.values():
            handle = module.register_forward_pre_hook(_one_state, with_kwargs=True)
            stack.callback(handle.remove)
        try:
            run(tokens, Pass(Hooks(hooks), on_call), EXPLICIT, **inputs)
        except Exception:  # of many kinds: models that take no positions, or not these, say so in many ways
            if not stretched:
                raise
            return {}
    return found


def _one_state(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The input of an attention module with its last state at every position."""
    x = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(x, Tensor) or x.ndim != 3:
        return None
    shape = x.shape  # a module may take the same states more than once, to make queries, keys and values of each

    def same(value: Any) -> Any:
        alike = isinstance(value, Tensor) and value.shape == shape
        return value[:, -1:].expand_as(value).contiguous() if alike else value

    return tuple(map(same, args)), {name: same(value) for name, value in kwargs.items()}


def _absolute(model: Opened, run: Callable[..., Tensor], blocks: Sequence[Block], least: float) -> str:
    """The encoding that comes with the embedding: of one token repeated the first block's input differs then.

    "learned" where the model has another table of parameters than that of its tokens, "sinusoidal" otherwise.
    """
    seen: list[Tensor] = []
    tokens = model.tokens()
    same = tokens[:, :1].expand_as(tokens[:, :8]).contiguous()
    first = next((i for i, block in enumerate(blocks) if block.width), None)
    if first is None:
        return "none"
    hooks = {f"blocks.{first}.hook_resid_pre": lambda x: seen.append(x.float())}
    with evaluating(model.inner):
        run(same, Pass(Hooks(hooks)))
    (x,) = seen
    if first != 0 or not float((x - x[:, :1]).abs().max()) > least * float(x.abs().max()):
        return "none"
    tables = [m for m in model.inner.modules() if isinstance(m, nn.Embedding)]
    return "learned" if any(m is not model.table for m in tables) else "sinusoidal"
