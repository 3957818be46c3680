"""The folder of one training run: its identity, its checkpoints, its log, and the model at the end."""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from probe.config import check_size
from probe.digests import check_digests, digest_file, sha256_of, write_digests
from probe.errors import ProbeError
from probe.files import read_json_object, write_tensors, write_text
from probe.folders import restore, write_folder
from probe.models import checkpoint
from probe.models.kinds import ModelConfig, OwnModel
from probe.models.stored import WEIGHTS_FILE
from probe.runs import check_owner, claim_folder
from probe.training.config import TrainingConfig
from probe.training.data import EncodedExamples
from probe.training.log import lines_of, logged_step

MOMENTS = "optimizer.safetensors"
STEPS = f"step-{'[0-9]' * 9}"  # the folders of checkpoints


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on: the step, and the moments of the optimizer, none before the first step."""

    step: int = 0
    moments: dict[str, Tensor] = dataclasses.field(default_factory=dict)


def _moments(optimizer: torch.optim.Optimizer, decoder: OwnModel) -> dict[str, Tensor]:
    return {
        f"{moment}.{name}": optimizer.state[parameter][moment]
        for name, parameter in decoder.named_parameters()
        for moment in ("step", "exp_avg", "exp_avg_sq")
    }


def _expected_moments(decoder: OwnModel) -> dict[str, Tensor]:
    """Tensors of the shapes that ``_moments`` has."""
    named = dict(decoder.named_parameters())
    return {
        **{f"step.{name}": torch.zeros(()) for name in named},
        **{f"{moment}.{name}": parameter for moment in ("exp_avg", "exp_avg_sq") for name, parameter in named.items()},
    }


def load_moments(optimizer: torch.optim.Optimizer, decoder: OwnModel, moments: dict[str, Tensor]) -> None:
    """Give the optimizer the moments of a checkpoint."""
    for name, parameter in decoder.named_parameters():
        optimizer.state[parameter] = {
            moment: moments[f"{moment}.{name}"].to(parameter.device) for moment in ("step", "exp_avg", "exp_avg_sq")
        }


def is_first_process() -> bool:
    """Whether this process writes the files of a run: the first one, where several train one model."""
    # Without LOCAL_RANK, accelerate takes this process for the only one, too.
    return "LOCAL_RANK" not in os.environ or os.environ.get("RANK", os.environ["LOCAL_RANK"]) == "0"


class RunFolder:
    """The files of one run."""

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        data: EncodedExamples,
        training: TrainingConfig,
        initial: OwnModel | None,
        keep: bool,
    ):
        self.folder, self.keep = folder, keep
        identity = {
            "model": json.loads(config.to_json()),
            "training": dataclasses.asdict(training),
            "data": _digest(data.tokens, data.prompt_lengths),
        }
        if initial is not None:
            identity["initial"] = _digest(*(weight.float() for weight in initial.state_dict().values()))
        if is_first_process():  # the others wait for it before they train
            check_owner(folder, "train")
            claim_folder(folder, "run.json", identity)
            restore(folder / "final")

    def resume(self, decoder: OwnModel) -> Resumed:
        """Load the newest checkpoint into the decoder; return its step and its moments."""
        newest = max((self.folder / "checkpoints").glob(STEPS), default=None)
        if newest is None or not (newest / MOMENTS).exists():  # the weights before the first step have no moments
            if self.keep and is_first_process():
                self._write("checkpoints/step-000000000", lambda place: checkpoint.write_into(decoder, place))
            return Resumed()
        loaded = checkpoint.load(newest)
        if loaded.config != decoder.config:
            raise ProbeError(f"{newest}: a checkpoint of the model that {self.folder} trains was wanted, got another's")
        decoder.load_state_dict(loaded.state_dict())
        check_digests(newest, (MOMENTS,))
        moments = checkpoint.read_tensors(newest / MOMENTS)
        checkpoint.check_tensors(newest / MOMENTS, moments, _expected_moments(decoder))
        return Resumed(int(newest.name.removeprefix("step-")), moments)

    def save_checkpoint(self, decoder: OwnModel, optimizer: torch.optim.Optimizer, step: int) -> None:
        def write(folder: Path) -> None:
            checkpoint.write_into(decoder, folder)
            moments = {name: tensor.cpu().contiguous() for name, tensor in _moments(optimizer, decoder).items()}
            write_tensors(folder / MOMENTS, moments)

        newest = self._write(f"checkpoints/step-{step:09d}", write)
        for older in (self.folder / "checkpoints").glob(STEPS):
            if older != newest:
                self._outlived(older)

    def _outlived(self, checkpoint_folder: Path) -> None:
        """Nothing goes on from this checkpoint any more."""
        if self.keep:
            (checkpoint_folder / MOMENTS).unlink(missing_ok=True)
        else:
            # The digests go first: a checkpoint that a kill leaves behind is found again, its digests alone never.
            digest_file(checkpoint_folder).unlink(missing_ok=True)
            shutil.rmtree(checkpoint_folder)

    def _write(self, name: str, write: Callable[[Path], object]) -> Path:
        """Write a checkpoint and its digests, which are there before it. Return where it is."""
        path = self.folder / name

        def with_digests(temporary: Path) -> None:
            write(temporary)
            write_digests(path, temporary)

        write_folder(path, with_digests)
        return path

    def open_log(self, step: int) -> TextIO:
        """The log for appending, without what a broken run wrote after the checkpoint that it goes on from."""
        path = self.folder / "log.jsonl"
        if os.path.lexists(path):  # also where it is a link, which is then replaced: nothing is written through it
            lines = [line for line in lines_of(path) if logged_step(line) <= step]
            write_text(path, "".join(f"{line}\n" for line in lines))
        return open(path, "a", encoding="utf-8")

    def finish(self, decoder: OwnModel) -> None:
        self._write("final", lambda place: checkpoint.write_into(decoder, place))
        for outlived in (self.folder / "checkpoints").glob(STEPS):
            self._outlived(outlived)
        with contextlib.suppress(OSError):  # not there, or not empty
            digest_file(self.folder / "checkpoints" / "any").parent.rmdir()
            (self.folder / "checkpoints").rmdir()


def checkpoint_digests(folder: str | Path) -> dict[str, str]:
    """The SHA-256 of the weights of each checkpoint that a run kept, by the name of its folder, and of the final ones.

    Args:
        folder: of the run.
    """
    folder = Path(folder)
    places = [*sorted((folder / "checkpoints").glob(STEPS)), folder / "final"]
    found = {}
    for place in places:
        if (place / WEIGHTS_FILE).exists():
            found[place.name] = sha256_of(place / WEIGHTS_FILE)
    return found


def checkpoints_of(folder: str | Path, device: str = "cpu") -> Iterator[tuple[int, OwnModel]]:
    """The steps and models of a finished run that kept its checkpoints, one at a time, from step 0 to the last.

    Raises:
        ProbeError: where the run is not finished or kept none.
    """
    folder = Path(folder)
    kept = sorted((folder / "checkpoints").glob(STEPS))
    if not kept or not (folder / "final").is_dir():
        raise ProbeError(
            f"{folder}: a finished run that kept its checkpoints was wanted (train(…, keep_checkpoints=True))"
        )
    for path in kept:
        yield int(path.name.removeprefix("step-")), checkpoint.load(path, device=device)
    training = read_json_object(folder / "run.json").get("training")
    steps: Any = training.get("steps") if isinstance(training, dict) else None
    check_size(f"{folder / 'run.json'}: steps of training", steps)
    yield steps, checkpoint.load(folder / "final", device=device)
