"""Arrays that another tool has recorded, as a model that can be looked at on its own sequences."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from probe.errors import NoTwin, ProbeError
from probe.files import check_plain
from probe.models.config import sites_of_layers
from probe.models.protocol import ATTENTION, NO_MIXING, Anatomy, Hook, Layer, Visit
from probe.sequences import checked_lengths, token_ids

#: What stands for values by layer: one array with the layer first, one for each layer, or arrays by layer.
ByLayer = Any

_SITES = {"patterns": "attn.hook_pattern", "scores": "attn.hook_attn_scores", "hidden": "hook_resid_post"}
_BESIDE = ("tokens", "lengths", "sinks", "logits", "n_layers")


class Recorded(nn.Module):
    """What a model did on some sequences, in place of the model.

    It answers whatever can be read off the recorded values. What needs the model itself, such as an edit, other
    sequences or an untrained twin, is refused in one line.
    """

    def __init__(
        self,
        tokens: Tensor,
        lengths: Tensor,
        values: Mapping[str, Tensor],
        n_layers: int,
        sinks: Collection[int] = (),
        logits: Tensor | None = None,
    ) -> None:
        """See ``probe.Trace.from_arrays`` and ``probe.wrap``."""
        super().__init__()
        self.register_buffer("tokens", tokens)
        self.register_buffer("lengths", lengths)
        self.register_buffer("logits", logits)
        self.sites = tuple(site for site in sites_of_layers(n_layers, parallel=False) if site in values)
        for i, site in enumerate(self.sites):
            self.register_buffer(f"value_{i}", values[site])
        self.n_layers, self.sinks = n_layers, tuple(sorted(sinks))

    def value(self, site: str) -> Tensor:
        """The values at a site, of all sequences."""
        found: Tensor = getattr(self, f"value_{self.sites.index(site)}")
        return found

    @property
    def owner(self) -> nn.Module:
        """Itself."""
        return self

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    @property
    def anatomy(self) -> Anatomy:
        """Its layers, sizes and sites, as far as the arrays tell: encodings are "unknown"."""
        layers = []
        for layer in range(self.n_layers):
            names = [f"blocks.{layer}.{_SITES[name]}" for name in ("patterns", "scores")]
            heads = next((self.value(site).shape[1] for site in names if site in self.sites), 0)
            layers.append(Layer(ATTENTION if heads else NO_MIXING, "unknown", heads, sink=layer in self.sinks))
        hidden = [self.value(site) for site in self.sites if self.value(site).ndim == 3]
        tokens = self.get_buffer("tokens")
        n_logits = 0 if self._logits is None else self._logits.shape[-1]
        d_vocab = max(int(tokens.max()) + 1, n_logits)
        return Anatomy(tuple(layers), hidden[0].shape[-1] if hidden else 0, d_vocab, tokens.shape[1], self.sites)

    @property
    def _logits(self) -> Tensor | None:
        found: Tensor | None = getattr(self, "logits", None)
        return found

    def forward(self, tokens: Tensor) -> Float[Tensor, "batch pos d_vocab"]:
        """The recorded logits of recorded sequences."""
        return self.run(token_ids(tokens), {}, explicit=True)

    def run(
        self, tokens: Int[Tensor, "batch pos"], hooks: Mapping[str, Hook], *, explicit: bool = False
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """The recorded logits, while each hook is called with the recorded value at its site.

        Raises:
            ProbeError: for sequences that were not recorded, a hook that puts another value in the place of the
                recorded one, and logits that are needed and were not recorded.
        """
        rows, n = self._rows(tokens), tokens.shape[1]
        for site in self.sites:
            if site in hooks:
                value = self.value(site)[rows]
                value = (
                    value[:, :, :n, :n] if value.ndim == 4 and site.endswith(tuple(_SITES.values())) else value[:, :n]
                )
                if hooks[site](value) is not None:
                    raise ProbeError("this needs the model: recorded arrays can be read, and edits have no effect")
        if self._logits is not None:
            return self._logits[rows, :n]
        if explicit:
            raise ProbeError("this needs the model, or its recorded logits: these arrays hold none")
        return torch.empty(len(rows), n, 0)

    def _rows(self, tokens: Tensor) -> Tensor:
        """Which recorded sequences begin with these tokens."""
        own, n = self.get_buffer("tokens"), tokens.shape[1]
        found = []
        for i, row in enumerate(tokens.cpu()):
            same = (own[:, :n] == row).all(1) if n <= own.shape[1] else torch.zeros(len(own), dtype=torch.bool)
            if not same.any():
                raise ProbeError(f"this needs the model: sequence {i} is none of the {len(own)} that were recorded")
            found.append(int(same.nonzero()[0]))
        return torch.tensor(found)

    def attention_inputs(self, tokens: Int[Tensor, "batch pos"], visit: Visit, layers: Sequence[int]) -> None:
        """Refuse: arrays hold no queries and keys.

        Raises:
            ProbeError: always.
        """
        raise ProbeError("streaming needs the model: recorded arrays hold patterns, no queries and keys")

    def new_cache(self) -> None:
        """None: it makes no tokens."""

    def untrained(self, seed: int) -> nn.Module:
        """Refuse: nobody can draw the model that made the arrays.

        Raises:
            ProbeError: always.
        """
        raise NoTwin("an untrained twin needs the model: recorded arrays don't say what it is made of")


def recorded(
    tokens: Any,
    arrays: Mapping[str, Any],
    *,
    lengths: Any = None,
    sinks: Collection[int] = (),
    logits: Any = None,
    n_layers: int | None = None,
) -> Recorded:
    """Arrays of any tool as ``Recorded``; the names of ``arrays`` and the rest are as in ``Trace.from_arrays``."""
    ids = token_ids(tokens).cpu()
    found: dict[str, Tensor] = {}
    for name, site in _SITES.items():
        for layer, array in _by_layer(name, arrays.get(name)).items():
            found[f"blocks.{layer}.{site}"] = _tensor(f"{name} of layer {layer}", array, ids, name != "hidden")
    for site, array in (arrays.get("values") or {}).items():
        squares = site.endswith((_SITES["patterns"], _SITES["scores"]))
        found[site] = _tensor(f"values at {site!r}", array, ids, squares)
    if not found:
        raise ProbeError("arrays need at least one of patterns, scores, hidden and values, got none")
    last = max((int(site.split(".")[1]) for site in found if site.startswith("blocks.")), default=0)
    if n_layers is not None and n_layers <= last:
        raise ProbeError(f"n_layers must be at least {last + 1}, as the arrays have a layer {last}, got {n_layers}")
    unknown = [site for site in found if site not in sites_of_layers(last + 1, parallel=False)]
    if unknown:
        raise ProbeError(
            f"values must be named as sites, 'hook_embed' or 'blocks.0.hook_resid_post', got {unknown[0]!r}"
        )
    return Recorded(
        ids,
        checked_lengths(lengths, *ids.shape),
        found,
        last + 1 if n_layers is None else n_layers,
        [int(layer) for layer in sinks],
        None if logits is None else _tensor("logits", logits, ids, False),
    )


def read_arrays(path: str | Path) -> Recorded:
    """The arrays in a ``.npz`` or ``.safetensors`` file.

    Its keys are ``tokens``, perhaps ``lengths``, ``logits``, ``sinks`` and ``n_layers``, and values: ``patterns``,
    ``scores`` and ``hidden`` with the layer first, ``patterns.0`` for one layer, or full names of sites.

    Args:
        path: the file.

    Raises:
        ProbeError: for a file that is neither, without tokens, or with arrays that don't fit.
    """
    path = Path(path)
    check_plain(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            arrays: dict[str, Any] = load_file(path)
        else:
            with np.load(path, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
    except OSError:
        raise
    except Exception as error:  # of many kinds, for files that are something else
        raise ProbeError(f"{path}: arrays in the format of .npz or .safetensors are needed: {error}") from None
    if "tokens" not in arrays:
        raise ProbeError(f"{path}: an array 'tokens' is needed, got {', '.join(sorted(arrays)) or 'no arrays'}")
    beside: dict[str, Any] = {name: arrays.pop(name) for name in _BESIDE if name in arrays}
    named: dict[str, Any] = {name: arrays.pop(name) for name in _SITES if name in arrays}
    for name in [*arrays]:
        kind, dot, layer = name.partition(".")
        if kind in _SITES and dot and layer.isdecimal():
            named.setdefault(kind, {})[int(layer)] = arrays.pop(name)
    if "n_layers" in beside:
        beside["n_layers"] = int(beside["n_layers"])
    if "sinks" in beside:
        beside["sinks"] = np.asarray(beside["sinks"]).reshape(-1).tolist()
    try:
        return recorded(beside.pop("tokens"), named | {"values": arrays}, **beside)
    except ProbeError as error:
        raise ProbeError(f"{path}: {error}") from None


def _by_layer(name: str, given: ByLayer) -> dict[int, Any]:
    if given is None:
        return {}
    if isinstance(given, Mapping):
        if not all(isinstance(layer, int) and layer >= 0 for layer in given):
            raise ProbeError(f"{name} by layer need numbers of layers as keys, got {', '.join(map(repr, given))}")
        return dict(given)
    return dict(enumerate(given))


def _tensor(what: str, array: Any, tokens: Tensor, squares: bool) -> Tensor:
    """A float tensor on the CPU, of the shape that its tokens want."""
    try:
        value = torch.as_tensor(np.asarray(array) if isinstance(array, list | tuple) else array).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ProbeError(f"{what} must be an array of numbers: {error}") from None
    batch, n = tokens.shape
    fits = value.ndim == 4 and value.shape[2:] == (n, n) if squares else value.ndim >= 3 and value.shape[1] == n
    if not value.is_floating_point() or value.shape[:1] != (batch,) or not fits:
        wanted = f"({batch}, head, {n}, {n})" if squares else f"({batch}, {n}, …)"
        raise ProbeError(f"{what} must be floats of shape {wanted}, got {value.dtype} {tuple(value.shape)}")
    return value.contiguous()
