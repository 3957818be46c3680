"""What a family of released models is: how its config becomes ours, and where its files hold our weights."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from probe.errors import ProbeError
from probe.models.config import DecoderConfig
from probe.models.families.fields import Fields

# From one of their tensors, its rows first, and the number of rows of each of ours, to ours.
Split = Callable[[Tensor, list[int]], Sequence[Tensor]]

Shape = tuple[int, ...]


def stacked(theirs: Tensor, rows: list[int]) -> Sequence[Tensor]:
    """Ours stand one after another: all queries, all keys, all values."""
    return theirs.split(rows)


def by_head(n_heads: int) -> Split:
    """Each head has its rows of all of ours together: its query, its key, its value.

    Where queries share keys and values, each of ``n_heads`` heads of those has the queries of its group before it.
    """

    def split(theirs: Tensor, rows: list[int]) -> Sequence[Tensor]:
        heads = theirs.unflatten(0, (n_heads, -1)).split([n // n_heads for n in rows], dim=1)
        return [part.flatten(0, 1) for part in heads]

    return split


@dataclass(frozen=True)
class Weight:
    """One tensor of a file: its key, and those of ours that are in it."""

    key: str  #: in the file
    names: tuple[str, ...]  #: those of ours that are in it
    split: Split = stacked  #: how theirs falls into ours
    transposed: bool = False  #: whether inputs are its rows, as in GPT-2
    #: The key of a tensor with a number for each of so many heads, which multiplies their rows where it is there.
    factor: tuple[str, int] | None = None
    shared: bool = False  #: whether each of ours is the whole of it, where theirs does the work of several
    unused: int = 0  #: rows before the first of ours that are never read

    def shape(self, ours: Mapping[str, Shape]) -> Shape:
        """Its shape, given those of ours."""
        shapes = [ours[name] for name in self.names]
        rows = shapes[0][0] if self.shared else sum(shape[0] for shape in shapes)
        shape = (self.unused + rows, *shapes[0][1:])
        return shape[::-1] if self.transposed else shape

    def parts(self, theirs: Tensor, ours: Mapping[str, Shape], factor: Tensor | None = None) -> dict[str, Tensor]:
        """Ours, as views where that is possible."""
        theirs = (theirs.T if self.transposed else theirs)[self.unused :]
        if self.shared:
            return dict.fromkeys(self.names, theirs)
        if factor is not None:
            heads = theirs.unflatten(0, (len(factor), -1)).float()
            factor = factor.float().reshape(-1, *[1] * theirs.ndim)
            theirs = (heads * factor).flatten(0, 1).to(theirs.dtype)
        rows = [ours[name][0] for name in self.names]
        return dict(zip(self.names, self.split(theirs, rows), strict=True))


class Family:
    """Models with one ``model_type``; an instance is one of them, and may keep what its config says of the key map. To
    add a family: write the class, add it to ``FAMILIES``.

    The key map is two tables from their modules to ours; a weight and, where ours has one, a bias is looked for under
    each. A tuple of ours is fused in theirs, in the way that ``split`` says.
    """

    positions: str  #: where such models have their positions from, in words
    oracle = "transformers' class"  # what logits, patterns and z are compared with in the tests
    prefix = ""  # before all keys but the head's; some files leave it away
    head = "lm_head.weight"
    synonyms: Mapping[str, str] = {}  #: from other names of a key that files have to the one of the key map
    outer: Mapping[str, str]  #: from their modules outside layers to ours
    layers: str  #: before the number of a layer
    layer: Mapping[str, str | tuple[str, ...]]  #: from the modules of their layers to ours
    transposed = False  # whether the matrices of layers have inputs as rows
    ignored = r"(?!)"  # keys, without the prefix, of buffers that follow from the config and of what is never used
    own_code = False  # whether the config may name code of its own: it is never run, and the code is known to be this

    def config(self, fields: Fields) -> DecoderConfig:
        """Our config of such a model.

        Raises:
            ProbeError: naming the file and the key, for what our decoder would not do in the same way.
        """
        raise NotImplementedError

    def split(self, config: DecoderConfig) -> Split:
        """How fused tensors are split."""
        return stacked

    def check(self, fields: Fields) -> None:
        """Refuse what no family here can have."""
        for name in ("quantization_config", "attn_logit_softcapping", "final_logit_softcapping"):
            fields.only(name, None)
        for name in ("is_encoder_decoder", "add_cross_attention", "qk_layernorm", "use_qk_norm"):
            fields.only(name, False)
        fields.only("pruned_heads", {})
        if not self.own_code:
            # A fork under the name of the family may compute anything.
            fields.only("auto_map", None)

    def weights(self, config: DecoderConfig, ours: Mapping[str, Shape]) -> Iterator[Weight]:
        """Their tensors, without the prefix; together they hold each of ours once."""
        split = self.split(config)
        for their, mine in self.outer.items():
            yield from self._of_module(their, (mine,), ours, split, False)
        for layer in range(config.n_layers):
            for their, parts in self.layer.items():
                names = tuple(f"layers.{layer}.{name}" for name in ((parts,) if isinstance(parts, str) else parts))
                yield from self._of_module(f"{self.layers}{layer}.{their}", names, ours, split, self.transposed)

    def _of_module(
        self, their: str, mine: tuple[str, ...], ours: Mapping[str, Shape], split: Split, transposed: bool
    ) -> Iterator[Weight]:
        for leaf in ("weight", "bias"):
            names = tuple(f"{name}.{leaf}" for name in mine)
            if names[0] in ours:
                matrix = len(ours[names[0]]) == 2
                yield Weight(f"{their}.{leaf}", names, split if len(names) > 1 else stacked, transposed and matrix)

    def key(self, stored: str) -> str:
        """The key map's name of a key in a file."""
        short = stored.removeprefix(self.prefix)
        return self.synonyms.get(short, short)

    def is_ignored(self, key: str) -> bool:
        """Whether a key, without the prefix, holds no weight."""
        return re.fullmatch(self.ignored, key) is not None


def full_attention(fields: Fields, n_ctx: int) -> None:
    """Refuse a sliding window that some sequence of n_ctx tokens would feel."""
    window = fields.size("sliding_window", default=None)
    if window is not None and window < n_ctx and fields.flag("use_sliding_window", default=True):
        raise ProbeError(
            f"{fields.path}: 'sliding_window' must be absent or at least the context of {n_ctx} tokens, got {window}"
        )
    kinds = fields.get("layer_types", default=[])
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise ProbeError(f"{fields.path}: 'layer_types' must all be 'full_attention', got {kinds!r}")
