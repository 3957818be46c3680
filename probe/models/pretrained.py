"""Released models, from a folder with ``config.json`` and safetensors or by a name on the hub."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from probe.device import find_device
from probe.errors import ProbeError, unknown_name
from probe.files import read_json_object
from probe.models import checkpoint
from probe.models.checkpoint import DTYPES
from probe.models.decoder import Decoder
from probe.models.families import FAMILIES, Family, Fields, Weight
from probe.models.hub import find_folder
from probe.models.open.kinds import KINDS
from probe.models.open.loading import load_transformers
from probe.models.open.wrapping import wrap_transformers
from probe.models.stored import WEIGHTS_FILE, Shape, Stored, stored_tensors, weight_files

if TYPE_CHECKING:
    import pandas as pd


def load_pretrained(
    name_or_folder: str | Path,
    revision: str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    *,
    family: str | None = None,
) -> nn.Module:
    """A model that others trained, or a checkpoint of ours, in evaluation mode: a folder, or a name on the hub.

    >>> load_pretrained("HuggingFaceTB/SmolLM3-3B", device="cuda").config.position_layers
    >>> load_pretrained("EleutherAI/pythia-70m", revision="step1000")

    A ``model_type`` in ``FAMILIES`` becomes a ``Decoder`` by key map, and no code but ours is run; weights are read one
    tensor at a time, so that the peak of memory stays near the size of the model. Any other is transformers' own class,
    seen and edited through its attention function (see ``probe.wrap``), once that has been seen to change nothing.
    Weights keep the dtype in which they are stored unless another is given. No code of a checkpoint's own is ever run.

    Args:
        revision: a branch, tag or commit of a name on the hub.
        device: the first of CUDA, MPS and CPU that is there, where None.
        family: a name in ``FAMILIES``, in place of the config's ``model_type``: a "llama_nope" is called "llama" there.

    Raises:
        ProbeError: before any weight is read, naming the file and the key: for a folder or a file that is not there
            (and, for a name, how to fetch it), a pickle in place of safetensors, an unknown ``model_type``, a config
            that our decoder cannot do exactly, a shard that is missing or truncated, and a key that is missing,
            unknown, or of another shape or type. Behind the weights, for a stored head that is not the embedding to
            which the config ties it, and for a model of transformers whose attention can't be seen exactly.
    """
    device = find_device(None if device is None else str(device))
    folder = find_folder(name_or_folder, revision)
    path = folder / checkpoint.CONFIG_FILE
    values = read_json_object(path)
    if "model_type" not in values and family is None:
        return checkpoint.load(folder, device, dtype)
    name = family or values["model_type"]
    if isinstance(name, str) and name in FAMILIES:
        if family is None:
            _check_name(name_or_folder, folder, values)
        return _load(folder, Fields(values, path), FAMILIES[name](), device, dtype)
    if family is not None:
        raise unknown_name("family", family, FAMILIES)
    return wrap_transformers(load_transformers(folder, device, dtype), str(folder))


def _check_name(name_or_folder: str | Path, folder: Path, values: Mapping[str, Any]) -> None:
    """Refuse a Llama that is called NoPE: its config says nothing of positions, and Llama's are rotary."""
    cached = folder.parent.parent.name if folder.parent.name == "snapshots" else ""
    names = (Path(name_or_folder).name, cached, str(values.get("_name_or_path", "")).split("/")[-1])
    if values["model_type"] == "llama" and any("nope" in name.lower() for name in names):
        raise ProbeError(
            f"{folder / checkpoint.CONFIG_FILE}: 'model_type' is llama, whose positions are rotary, and its name says "
            "NoPE: say which with family='llama_nope' or family='llama' (llama_nope:PLACE on the command line)"
        )


def released_models() -> "pd.DataFrame":
    """The kinds of released models that are known: model_type, positions, how it is loaded, what it is exact against.

    Logits, patterns and every head's z of those that become a decoder of ours are equal to the original's, to 1e-4
    relative and mostly 1e-6, in the tests. Any other kind is compared with itself, seen and unseen, whenever one is
    loaded; those in the table were loaded at a tiny size with the version of transformers that ``KINDS_OF`` says.
    """
    import pandas as pd

    ours = [(name, f.positions, "our decoder, by key map", f.oracle) for name, f in FAMILIES.items()]
    theirs = [(name, layers, "transformers' class, through its attention", "itself") for name, layers in KINDS.items()]
    return pd.DataFrame([*ours, *theirs], columns=["model_type", "positions", "loaded as", "exact against"])


def _load(folder: Path, fields: Fields, family: Family, device: torch.device, dtype: torch.dtype | None) -> Decoder:
    family.check(fields)
    try:
        config = family.config(fields)
    except ProbeError as error:
        raise error if str(error).startswith(str(fields.path)) else ProbeError(f"{fields.path}: {error}") from None
    decoder = Decoder(config, seed=None, device="meta")
    ours = {name: tuple(tensor.shape) for name, tensor in decoder.state_dict().items()}
    if config.tie_embeddings:
        del ours["head.weight"]
    stored = _by_key(stored_tensors(weight_files(folder)), family)
    weights = [*family.weights(config, ours)]
    embedding = next(weight.key for weight in weights if weight.names == ("token_embedding.weight",))
    if config.tie_embeddings and embedding not in stored and family.head in stored:
        stored[embedding] = stored.pop(family.head)  # of two names of one tensor safetensors keeps the first alone
    _check(weights, stored, ours, family, folder, dtype)
    for weight in weights:
        factor = stored[weight.factor[0]].read() if weight.factor and weight.factor[0] in stored else None
        for name, tensor in weight.parts(stored[weight.key].read(), ours, factor).items():
            _assign(decoder, name, tensor, device, dtype)
    if config.tie_embeddings:
        decoder.head.weight = decoder.token_embedding.weight
        head = stored.get(family.head)
        if head is not None and not torch.equal(head.read().to(decoder.head.weight), decoder.head.weight):
            raise ProbeError(
                f"{head.path}: {head.key!r} must equal the embedding, to which {checkpoint.CONFIG_FILE} ties it"
            )
    return decoder.eval()


def _by_key(tensors: Iterable[Stored], family: Family) -> dict[str, Stored]:
    """The tensors of a family's files by their keys without its prefix."""
    found: dict[str, Stored] = {}
    for stored in tensors:
        short = family.key(stored.key)
        if short in found:
            raise ProbeError(
                f"{stored.path}: key {stored.key!r} is there twice, the other time as {found[short].key!r}"
            )
        if not family.is_ignored(short):
            found[short] = stored
    return found


def _check(
    weights: list[Weight],
    stored: dict[str, Stored],
    ours: dict[str, Shape],
    family: Family,
    folder: Path,
    dtype: torch.dtype | None,
) -> None:
    """Refuse tensors that are not exactly those of the key map, by name, shape and type."""
    wanted = {weight.key: weight.shape(ours) for weight in weights}
    factors = {weight.factor[0]: weight.factor[1:] for weight in weights if weight.factor}
    if any(key in stored for key in factors):
        wanted |= factors
    if family.head in stored:
        wanted.setdefault(family.head, ours["token_embedding.weight"])
    for key, shape in wanted.items():
        if key not in stored:
            name = key if key == family.head else family.prefix + key
            raise ProbeError(f"{folder}: key {name!r} is missing in {WEIGHTS_FILE} and its shards")
        got = stored[key]
        if got.shape != shape:
            raise ProbeError(f"{got.path}: {got.key!r} must have shape {shape}, got {got.shape}")
        if got.dtype not in DTYPES:
            raise ProbeError(f"{got.path}: {got.key!r} must be one of {', '.join(DTYPES)}, got {got.dtype}")
    for key, got in stored.items():
        if key not in wanted:
            raise ProbeError(f"{got.path}: unknown key {got.key!r}")
    kinds = {stored[weight.key].dtype for weight in weights}
    if dtype is None and len(kinds) > 1:
        raise ProbeError(
            f"{folder}: weights of one dtype were wanted, or a dtype to cast to, got {', '.join(sorted(kinds))}"
        )


def _assign(decoder: Decoder, name: str, tensor: Tensor, device: torch.device, dtype: torch.dtype | None) -> None:
    # A copy: what safetensors hands out lies in the mapped file, and parts of it keep the whole alive.
    tensor = tensor.to(device, dtype, copy=True, memory_format=torch.contiguous_format)
    module, _, leaf = name.rpartition(".")
    setattr(decoder.get_submodule(module), leaf, nn.Parameter(tensor))
