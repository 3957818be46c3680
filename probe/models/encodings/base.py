"""The interface of all position encodings, which is also the encoding that does nothing."""

import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from probe.errors import ProbeError, unknown_name

#: (cos, sin) of the angles by which queries and keys are turned, each "1 pos d_turned": of as many dimensions as are
#: turned, all of d_head or the first of them.
Rotation = tuple[Float[Tensor, "1 pos d_turned"], Float[Tensor, "1 pos d_turned"]]

M = TypeVar("M", bound=nn.Module)

DIMENSIONS = ("d_model", "n_heads", "d_head", "n_ctx", "n_layers")


class PositionEncoding(nn.Module):
    """No position encoding (NoPE), and the interface of all others.

    Positions arrive as integers on the CPU, where what depends on them alone is computed in float64; results are handed
    on in the dtype and on the device of ``like``.
    """

    embeds = False  # whether it acts on the embeddings, and so on the whole model rather than on single layers
    reads_content = False  # whether it has a ``content_bias``
    last_position: int | None = None  #: the largest position that it knows; None: it knows any

    def __init__(self, *, d_model: int, n_heads: int, d_head: int, n_ctx: int, n_layers: int = 1):
        super().__init__()
        self.d_model, self.n_heads, self.d_head = d_model, n_heads, d_head
        self.n_ctx, self.n_layers = n_ctx, n_layers

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the initial parameters; encodings without parameters have none to draw."""

    def positions(self, n: int, *, random: bool) -> Int[Tensor, "n"]:
        """The positions of a sequence of n tokens where the caller names none; ``random`` in training."""
        return torch.arange(n)

    def embed(
        self, x: Float[Tensor, "batch pos d_model"], positions: Int[Tensor, "pos"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """Token embeddings with whatever the encoding adds to them."""
        return x

    def rotation(self, positions: Int[Tensor, "pos"], like: Tensor) -> Rotation | None:
        """(cos, sin) for ``rotate``, or None where nothing is turned."""
        return None

    def decay(self, positions: Int[Tensor, "pos"], like: Tensor) -> Float[Tensor, "pos d_head"] | None:
        """What turned queries are multiplied and turned keys divided by, or None."""
        return None

    def bias(
        self, query: Int[Tensor, "query"], key: Int[Tensor, "key"], like: Tensor
    ) -> Float[Tensor, "head query key"] | None:
        """What is added to the scores of queries at positions ``query`` and keys at ``key``, or None."""
        return None

    def content_bias(
        self,
        layer: int,
        q: Float[Tensor, "batch head query d_head"],
        k: Float[Tensor, "batch head key d_head"],
        query: Int[Tensor, "query"],
        key: Int[Tensor, "key"],
        scale: float,
    ) -> Float[Tensor, "batch head query key"]:
        """What is added to the scores ``scale`` · q·k of a layer and depends on q and k; asked where ``reads_content``.

        The last query stands at the last key. What is found for keys after their query is hidden by the causal mask:
        it may be any number, but a finite one.
        """
        raise NotImplementedError


def options_of(kind: type[nn.Module]) -> list[str]:
    """The options of an encoding or an attention function: its keyword arguments that are no dimensions."""
    parameters = inspect.signature(kind.__init__).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in DIMENSIONS]


def build(kinds: Mapping[str, type[M]], what: str, name: str, options: dict[str, Any], **dimensions: int) -> M:
    """The module of that name among ``kinds``, each a ``what``; an unknown name or option is refused."""
    if not isinstance(name, str) or name not in kinds:
        raise unknown_name(what, name, kinds)
    known = options_of(kinds[name])
    for option in options:
        if option not in known:
            raise ProbeError(f"{what} {name!r} has no option {option!r}; it has: {', '.join(known) or 'none'}")
    return kinds[name](**dimensions, **options)


def consecutive(positions: Int[Tensor, "pos"]) -> bool:
    return bool((positions.diff() == 1).all())


def future_keys(n_query: int, n_key: int, device: torch.device, *, ahead: int = 0) -> Bool[Tensor, "query key"]:
    """True where the key comes more than ``ahead`` positions after the query, the last query standing at the last
    key."""
    return torch.ones(n_query, n_key, dtype=torch.bool, device=device).triu(n_key - n_query + 1 + ahead)
