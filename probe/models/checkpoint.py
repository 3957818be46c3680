"""Models on disk: a folder with ``config.json`` and ``model.safetensors``. Never pickle."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from probe.digests import check_digests
from probe.errors import ProbeError
from probe.files import read_json_object, write_tensors, write_text
from probe.folders import check_replaced, restore, write_folder
from probe.models.kinds import OwnModel, build, config_from_dict
from probe.models.scaled import check_not_scaled
from probe.models.stored import WEIGHTS_FILE, open_tensors

# The dtypes of weights, by their names in safetensors.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

CONFIG_FILE = "config.json"


def save(model: OwnModel, folder: str | Path) -> None:
    """Write a model to a folder, whole or not at all. An older checkpoint there is replaced in one step (see
    ``probe.folders.write_folder``), so that at every moment one whole checkpoint is at this path.

    Args:
        model: the model.
        folder: a new folder, or that of an older checkpoint.

    Raises:
        ProbeError: where the model is no ``Decoder`` or ``ClockworkRNN`` (a bridge, say), the folder has other files
            than a checkpoint's, or the model has a scale on its attention.
    """
    if not isinstance(model, OwnModel):
        raise ProbeError(f"model must be a Decoder or a ClockworkRNN, got {type(model).__name__}; nothing was written")
    folder = Path(folder)
    if os.path.lexists(folder):
        check_replaced(folder, {CONFIG_FILE, WEIGHTS_FILE})
    write_folder(folder, lambda temporary: write_into(model, temporary))


def write_into(model: OwnModel, folder: Path) -> None:
    """Write a model's two files into a folder that is there."""
    check_not_scaled(model, "saving")
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_embeddings:
        del state["head.weight"]  # the embedding's own memory
    write_tensors(folder / WEIGHTS_FILE, state)
    write_text(folder / CONFIG_FILE, model.config.to_json())


def load(folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> OwnModel:
    """The model in a folder, in the dtype in which it was saved unless another is asked for.

    Raises:
        ProbeError: naming the file, and the key where there is one: a missing or truncated file, a file that is no
            safetensors (a pickle, say), an unknown kind of model, an unknown or missing key, a wrong shape, a file of a
            training's checkpoint that is not as the training wrote it.
    """
    folder = Path(folder)
    restore(folder)
    check_digests(folder, (CONFIG_FILE, WEIGHTS_FILE))
    path = folder / CONFIG_FILE
    try:
        config = config_from_dict(read_json_object(path))
    except ProbeError as error:
        raise error if str(error).startswith(str(path)) else ProbeError(f"{path}: {error}") from None
    state = read_tensors(folder / WEIGHTS_FILE)
    model = build(config, seed=None, device="meta")  # no memory for what a config claims and no file holds
    expected = model.state_dict()
    if config.tie_embeddings:
        del expected["head.weight"]
    check_tensors(folder / WEIGHTS_FILE, state, expected)
    kinds = {tensor.dtype for tensor in state.values()}
    if len(kinds) > 1:
        raise ProbeError(f"{folder / WEIGHTS_FILE}: one dtype was wanted, got {', '.join(sorted(map(str, kinds)))}")
    if config.tie_embeddings:
        state["head.weight"] = state["token_embedding.weight"]
    model.load_state_dict(state, assign=True)
    if config.tie_embeddings:
        model.head.weight = model.token_embedding.weight
    return model.to(device=device, dtype=dtype).eval()


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of tensors: of their names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; an error names the file."""
    with open_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)


def check_tensors(path: Path, state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Refuse tensors that are not exactly those expected, by name and shape."""
    for name, tensor in expected.items():
        if name not in state:
            raise ProbeError(f"{path}: key {name!r} is missing")
        if state[name].shape != tensor.shape:
            raise ProbeError(f"{path}: {name!r} must have shape {tuple(tensor.shape)}, got {tuple(state[name].shape)}")
    for name, tensor in state.items():
        if name not in expected:
            raise ProbeError(f"{path}: unknown key {name!r}")
        if tensor.dtype not in DTYPES.values():
            raise ProbeError(f"{path}: {name!r} must be {expected[name].dtype}, got {tensor.dtype}")
