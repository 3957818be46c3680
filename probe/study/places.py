"""What the command line, and a study's settings, call models: folders, seeds of one model, names on the hub."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from probe.errors import ProbeError
from probe.files import check_plain, is_text, read_json_object
from probe.models.families import FAMILIES
from probe.models.hub import find_folder
from probe.models.open.wrapping import wrap
from probe.models.pretrained import load_pretrained
from probe.study.config import StudyConfig, run_name
from probe.tracing import Trace

MOST_NAME = 150  # bytes: file systems take 255, and a stage's name and an ending stand beside it


class Place(NamedTuple):
    """Where a model is: a folder, and the family that its config does not tell."""

    folder: Path  # or a file of arrays
    family: str | None = None
    said: str = ""  # in a user's words

    def load(self, device: str | torch.device | None = None) -> nn.Module:
        """The model, a checkpoint of ours or a released one; of a file of arrays what stands for the model."""
        if self.folder.is_file():
            model: nn.Module = wrap(Trace.from_file(self.folder))
            return model
        return load_pretrained(self.folder, device=device, family=self.family)


def locate(place: str | Path) -> Place:
    """What a place is: a folder with a checkpoint or a run with a finished one, or a name on the hub, fetched where
    need be, OWNER/MODEL or OWNER/MODEL@REVISION. ``llama_nope:PLACE`` says the family of what is there."""
    said = str(place)
    before, colon, rest = said.partition(":")
    family: str | None = before
    if not colon or before not in FAMILIES or Path(said).exists():
        family, rest = None, said
    if Path(rest).exists():
        folder = Path(rest)
    else:
        name, _, revision = rest.partition("@")
        folder = find_folder(name, revision or None)
    return Place(folder / "final" if (folder / "final").exists() else folder, family, said)


def find_checkpoints(places: Sequence[str]) -> tuple[dict[str, list[Place]], StudyConfig | None]:
    """What the command line names: checkpoints by the name of their model, several of one name being its seeds.

    Each is a study's folder (all of its models), one place (``locate``), called by the name of its folder, or
    ``NAME=PLACE,PLACE,…``. A path that exists is a path, whatever signs its name has. The second result is the settings
    of a study among them.

    Raises:
        ProbeError: where there is none, or a name comes twice.
    """
    found: dict[str, list[Place]] = {}
    study = None
    for place in places:
        if (Path(place) / "study.json").exists():
            study = StudyConfig.from_dict(read_json_object(Path(place) / "study.json"))
            models = Path(place) / "models"
            new = {
                e: [locate(study.load.get(e, models / run_name(e, r))) for r in range(study.n_seeds(e))]
                for e in study.encodings
            }
        else:
            name, folders = _named(place)
            new = {name: [locate(folder) for folder in folders]}
        for model in new:
            if model in found:
                raise ProbeError(f"two models are called {model!r}: give them names of their own, NAME=FOLDER")
        found |= new
    return found, study


def _named(place: str) -> tuple[str, list[str]]:
    """The name of a model and the places of its seeds, from what was typed. A path that is there is a path, whatever
    signs it has in it (``runs/lr=0.1,seed=1``); only what is none is read as ``NAME=PLACE,PLACE,…``."""
    name, equals, rest = place.partition("=")
    if Path(place).exists() or not equals:
        # The absolute path has a name where the path itself has none: ".", "..".
        return Path(os.path.abspath(place) if Path(place).exists() else place).name, [place]
    folders, parts = [], rest.split(",")
    while parts:
        longest = next((n for n in range(len(parts), 0, -1) if Path(",".join(parts[:n])).exists()), 1)
        folders.append(",".join(parts[:longest]))
        parts = parts[longest:]
    return name, folders


def check_file_names(names: Iterable[str]) -> None:
    """Refuse names of models that files could not have, or that lead out of a folder."""
    for name in names:
        if not name or "/" in name or name.startswith(".") or not is_text(name) or len(name.encode()) > MOST_NAME:
            raise ProbeError(
                f"a model's name becomes that of a file: one of at most {MOST_NAME} bytes without '/' was wanted, got "
                f"{name!r}"
            )


def load_all(checkpoints: Mapping[str, Sequence[Place]], device: str) -> dict[str, list[nn.Module]]:
    """The models, by name."""
    return {name: [place.load(device) for place in places] for name, places in checkpoints.items()}


def read_tokens(path: str | Path) -> torch.Tensor:
    """Token ids "sequence pos" from a ``.npy`` file.

    Raises:
        ProbeError: where it holds anything else.
    """
    check_plain(path)
    try:
        # Mapped: a header may claim any shape, of which no more is read than the file has.
        with np.errstate(over="raise"):  # a shape whose size is no integer of 64 bits
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # of many kinds: it reads a header as Python's literals, or an archive
        raise ProbeError(f"{path}: token ids in numpy's format were wanted: {error}") from None
    if not isinstance(tokens, np.ndarray):
        raise ProbeError(f"{path}: token ids in numpy's format were wanted, got an archive")
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
        raise ProbeError(f"{path}: integers of shape (sequence, pos) were wanted, got {tokens.dtype} {tokens.shape}")
    if not tokens.size:
        raise ProbeError(f"{path}: at least one sequence of one token was wanted, got shape {tokens.shape}")
    return torch.as_tensor(tokens.astype(np.int64))
