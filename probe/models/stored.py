"""The tensors in the files of a checkpoint: their names, shapes and types are read before any of their numbers."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from probe.errors import ProbeError
from probe.files import open_plain, read_json_object
from probe.limits import current

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ENDING = ".safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


Shape = tuple[int, ...]


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    path: Path
    key: str
    shape: Shape
    dtype: str  # in the words of safetensors

    def read(self) -> Tensor:
        # The file is opened anew: all that is read through one handle stays in memory until it is closed.
        with open_tensors(self.path) as file:
            return file.get_tensor(self.key)


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """A safetensors file, opened by its library once it is known to be a plain file with a header of some size.

    Raises:
        ProbeError: for anything else, and for what is not whole.
    """
    with open_plain(path) as file:
        size = int.from_bytes(file.read(8), "little")
    if size > (most := current().header_bytes):
        raise ProbeError(f"{path}: not a whole safetensors file (a header of at most {most} bytes, got {size})")
    try:
        with safe_open(path, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ProbeError(f"{path}: not a whole safetensors file ({error})") from None


def weight_files(folder: Path) -> Mapping[Path, list[str] | None]:
    """The files with the weights, each with the keys that the index says are in it. None of them is opened.

    Raises:
        ProbeError: where there are none, or where the index names what is no safetensors file in that folder.
    """
    whole, index = folder / WEIGHTS_FILE, folder / INDEX_FILE
    if os.path.lexists(whole):
        return {whole: None}
    if not os.path.lexists(index):
        pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        got = f", got {pickles[0]}: a pickle can run code, convert it to safetensors" if pickles else ""
        raise ProbeError(f"{whole}: no such file, and no {INDEX_FILE}{got}")
    places = read_json_object(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ProbeError(f"{index}: 'weight_map' must be a JSON object of file names, got {places!r:.60}")
    files: dict[Path, list[str]] = {}
    for key, name in places.items():
        if Path(name).name != name or "\\" in name:
            raise ProbeError(f"{index}: {key!r} must lie in a file of the same folder, got {name!r}")
        if not name.endswith(ENDING):
            raise ProbeError(f"{index}: {key!r} must lie in a file that ends in {ENDING}, got {name!r}")
        files.setdefault(folder / name, []).append(key)
    return files


def stored_tensors(files: Mapping[Path, list[str] | None]) -> Iterator[Stored]:
    """All tensors of some files; only the headers are read.

    Raises:
        ProbeError: for a file that is not plain, missing or broken, and a key that the index says is there and is not.
    """
    for path, listed in files.items():
        with open_tensors(path) as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  (no mapping)
            found = {key: Stored(path, key, tuple(s.get_shape()), s.get_dtype()) for key, s in slices.items()}
        for key in listed or ():
            if key not in found:
                raise ProbeError(f"{path}: key {key!r} is missing, which {INDEX_FILE} says is there")
        yield from found.values()
