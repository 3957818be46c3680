"""Training a model, so that a run that is killed and started again ends as if nothing had happened.

Every step is a function of the state before it and of (seed, step, process): its batch, its learning rate and its
dropout. So weights, optimizer moments and the number of the step are all that a checkpoint has to hold.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from probe.config import check_flag, check_number, check_size
from probe.device import fast_products, find_device, gradients
from probe.digests import check_digests, digest_file, write_digests
from probe.errors import ProbeError
from probe.files import open_plain, read_json_object, write_tensors, write_text
from probe.folders import restore, write_folder
from probe.models import checkpoint
from probe.models.build import Model, ModelConfig, build
from probe.models.decoder import Decoder, DecoderConfig
from probe.runs import check_owner, claim_folder
from probe.training.data import BatchOrder, EncodedExamples, Feed

if TYPE_CHECKING:
    from accelerate import Accelerator


OnLog = Callable[[dict[str, Any]], None]  # of an object of the log

MIXED_PRECISION = ("no", "bf16")
MOMENTS = "optimizer.safetensors"
STEPS = f"step-{'[0-9]' * 9}"  # the folders of checkpoints


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained. The defaults are Kazemnejad et al. 2023, table 2 (lr 3e-5, linear decay).

    ``accumulation`` is for batches that do not fit into memory at once: the gradient stays that of the whole batch.
    ``compile`` takes up to a minute at the start; a CPU gains 0 to 9 % from it.
    """

    steps: int = 40_000  #: of the optimizer, AdamW
    batch_size: int = 64  #: sequences of a step, over all processes
    accumulation: int = 1  #: parts of a batch that go through the model one after the other
    learning_rate: float = 3e-5  #: the highest, at the end of the warm-up
    weight_decay: float = 0.05  #: of matrices; vectors have none
    warmup: float = 0.06  #: share of the steps
    clip_norm: float = 1.0  #: the longest gradient that a step takes
    mixed_precision: str = "no"  #: "no" or "bf16"
    compile: bool = False  #: whether torch.compile makes kernels of the layers
    seed: int = 0  #: of the first weights, the order of the data and dropout
    log_every: int = 50  #: steps between two lines of the log
    checkpoint_every: int = 1000  #: steps between two checkpoints

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "log_every", "checkpoint_every"):
            check_size(name, getattr(self, name))
        check_size("seed", self.seed, least=0, most=2**63 - 1)
        for name in ("learning_rate", "clip_norm"):
            check_number(name, getattr(self, name))
        check_number("weight_decay", self.weight_decay, closed=True)
        check_number("warmup", self.warmup, 0, 1, closed=True)
        if self.batch_size % self.accumulation:
            raise ProbeError(f"batch_size ({self.batch_size}) must be divisible by accumulation ({self.accumulation})")
        check_flag("compile", self.compile)
        if self.mixed_precision not in MIXED_PRECISION:
            raise ProbeError(
                f"mixed_precision must be one of {', '.join(MIXED_PRECISION)}, got {self.mixed_precision!r}"
            )

    def rate(self, step: int) -> float:
        """The learning rate of step 0, 1, …: up to the peak over the warm-up, then linearly to 0."""
        warm = max(1, round(self.warmup * self.steps))
        return self.learning_rate * min((step + 1) / warm, (self.steps - step) / max(1, self.steps - warm))


@overload
def train(
    model: DecoderConfig,
    data: EncodedExamples,
    config: TrainingConfig,
    folder: str | Path | None = None,
    *,
    device: str | None = None,
    initial: Model | None = None,
    keep_checkpoints: bool = False,
    on_log: OnLog | None = None,
) -> Decoder: ...
@overload
def train(
    model: ModelConfig,
    data: EncodedExamples,
    config: TrainingConfig,
    folder: str | Path | None = None,
    *,
    device: str | None = None,
    initial: Model | None = None,
    keep_checkpoints: bool = False,
    on_log: OnLog | None = None,
) -> Model: ...
def train(
    model: ModelConfig,
    data: EncodedExamples,
    config: TrainingConfig,
    folder: str | Path | None = None,
    *,
    device: str | None = None,
    initial: Model | None = None,
    keep_checkpoints: bool = False,
    on_log: OnLog | None = None,
) -> Model:
    """Train a model on the completions of ``data`` and return it, in eval mode.

    With a ``folder``, the run leaves there ``log.jsonl`` (one object every ``log_every`` steps), the newest checkpoint
    under ``checkpoints`` and, at the end, the model under ``final`` (``probe.models.checkpoint.load`` reads it). A run
    that was broken off goes on from its newest checkpoint; one that is finished is loaded. On a CPU the result is the
    same to the last bit. Several GPUs: start the program with ``accelerate launch``.

    Args:
        initial: the weights to begin with, of a model of this config; drawn from the seed where None.
        keep_checkpoints: leave the weights of every checkpoint in the folder, and those before the first step, for
            ``checkpoints_of``.
        on_log: called with each object that goes into the log.

    Raises:
        ProbeError: where the folder holds a run of other settings or data, ``initial`` is of another config, or the
            loss stops being finite.
    """
    EncodedExamples.check(data)
    torch_device = find_device(device)
    if initial is not None and initial.config != model:
        raise ProbeError("initial must be a model of the config that is trained, got one of another")
    run = None if folder is None else _RunFolder(Path(folder), model, data, config, initial, keep_checkpoints)
    if run is not None and (run.folder / "final").is_dir():
        finished = checkpoint.load(run.folder / "final", device=torch_device)
        if finished.config != model:
            raise ProbeError(f"{run.folder / 'final'}: must be the model that {run.folder} trained, got another's")
        return finished
    with gradients(), torch.random.fork_rng(), fast_products(torch_device):
        decoder = _train(model, data, config, initial, run, torch_device, on_log or (lambda entry: None))
    return decoder.eval()


def _train(
    model: ModelConfig,
    data: EncodedExamples,
    config: TrainingConfig,
    initial: Model | None,
    run: "_RunFolder | None",
    device: torch.device,
    on_log: OnLog,
) -> Model:
    accelerator = _accelerator(config, device)
    decoder = build(model, seed=config.seed)
    if initial is not None:
        decoder.load_state_dict(initial.state_dict())
    start = run.resume(decoder) if run is not None else _Resumed()
    optimizer = torch.optim.AdamW(_decayed_and_not(decoder, config), lr=config.learning_rate, fused=True)
    wrapped, optimizer = accelerator.prepare(_compiled(decoder.to(accelerator.device), config), optimizer)
    if start.moments:
        _load_moments(optimizer, decoder, start.moments)
    feed = Feed(
        data,
        BatchOrder(data.lengths, config.batch_size, config.seed),
        accelerator.device,
        config.accumulation,
        accelerator.process_index,
        accelerator.num_processes,
    )
    log = run.open_log(start.step) if run is not None and accelerator.is_main_process else contextlib.nullcontext()
    wrapped.train()
    with log as file:
        share = feed.share(start.step)
        mark, tokens, in_data = time.perf_counter(), 0, 0.0
        for step in range(start.step, config.steps):
            torch.manual_seed(_step_seed(config.seed, step, accelerator.process_index))
            for group in optimizer.param_groups:
                group["lr"] = config.rate(step)
            # Every process knows what the whole batch counts, so the mean is over all of its scored tokens; the
            # gradients are averaged over processes, hence the factor.
            scale = accelerator.num_processes / share.n_scored
            loss = torch.zeros((), device=accelerator.device)
            for i, part in enumerate(share.micro_batches, start=1):
                last = i == len(share.micro_batches)
                with contextlib.nullcontext() if last else accelerator.no_sync(wrapped):
                    logits = wrapped(part.inputs).flatten(0, 1).index_select(0, part.scored).float()
                    part_loss = F.cross_entropy(logits, part.targets, reduction="sum") * scale
                    accelerator.backward(part_loss)
                loss += part_loss.detach()
            norm = accelerator.clip_grad_norm_(wrapped.parameters(), config.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            tokens += share.n_tokens
            done = step + 1
            if done < config.steps:  # a GPU is still at work on this step
                started = time.perf_counter()
                share = feed.share(done)
                in_data += time.perf_counter() - started
            if done % config.log_every == 0 or done == config.steps:
                mean = accelerator.reduce(loss, reduction="mean").item()
                if not math.isfinite(mean):
                    raise ProbeError(
                        f"the loss became {mean} at step {done}: a smaller learning_rate than "
                        f"{config.learning_rate:g} is wanted"
                    )
                now = time.perf_counter()
                entry = {
                    "step": done,
                    "loss": mean,
                    "learning_rate": config.rate(step),
                    "gradient_norm": float(norm),
                    "tokens_per_second": tokens / (now - mark),
                    "data_share": in_data / (now - mark),
                }
                mark, tokens, in_data = now, 0, 0.0
                if file is not None:
                    file.write(json.dumps(entry) + "\n")
                    file.flush()
                if accelerator.is_main_process:
                    on_log(entry)
            if run is not None and done % config.checkpoint_every == 0 and done < config.steps:
                if accelerator.is_main_process:
                    run.save_checkpoint(decoder, optimizer, done)
                accelerator.wait_for_everyone()
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)  # takes mixed precision off the decoder
    if run is not None and accelerator.is_main_process:
        run.finish(decoder)
    accelerator.wait_for_everyone()
    return decoder


def _accelerator(config: TrainingConfig, device: torch.device) -> "Accelerator":
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    # accelerate keeps the first device and precision of a process for good; a notebook trains more than once.
    if PartialState._shared_state and PartialState().num_processes == 1:
        AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(mixed_precision=config.mixed_precision, cpu=device.type == "cpu")


def _compiled(decoder: Model, config: TrainingConfig) -> torch.nn.Module:
    """The decoder itself or, compiled, one beside it that shares its parameters: what is saved and returned is plain.

    The layers are alike, so one of them is compiled for all; and with its lengths left open ("dynamic"), so once for
    batches of every length. The whole decoder in one would be compiled anew for each length by encodings whose bias
    is computed from positions.
    """
    if not config.compile:
        return decoder
    from accelerate.utils import compile_regions

    # Of one function torch keeps eight kinds of kernels, and runs whatever comes after these uncompiled.
    torch.compiler.reset()
    return compile_regions(decoder, dynamic=True)


def _decayed_and_not(decoder: Model, config: TrainingConfig) -> list[dict[str, Any]]:
    """Weight decay for matrices and tables, none for biases and norms."""
    parameters = list(decoder.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _step_seed(*parts: int) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest())


@dataclass(frozen=True)
class _Resumed:
    step: int = 0
    moments: dict[str, Tensor] = dataclasses.field(default_factory=dict)


def _moments(optimizer: torch.optim.Optimizer, decoder: Model) -> dict[str, Tensor]:
    return {
        f"{moment}.{name}": optimizer.state[parameter][moment]
        for name, parameter in decoder.named_parameters()
        for moment in ("step", "exp_avg", "exp_avg_sq")
    }


def _expected_moments(decoder: Model) -> dict[str, Tensor]:
    """Tensors of the shapes that ``_moments`` has."""
    named = dict(decoder.named_parameters())
    return {
        **{f"step.{name}": torch.zeros(()) for name in named},
        **{f"{moment}.{name}": parameter for moment in ("exp_avg", "exp_avg_sq") for name, parameter in named.items()},
    }


def _load_moments(optimizer: torch.optim.Optimizer, decoder: Model, moments: dict[str, Tensor]) -> None:
    for name, parameter in decoder.named_parameters():
        optimizer.state[parameter] = {
            moment: moments[f"{moment}.{name}"].to(parameter.device) for moment in ("step", "exp_avg", "exp_avg_sq")
        }


def is_first_process() -> bool:
    """Whether this process writes the files of a run: the first one, where several train one model."""
    # Without LOCAL_RANK, accelerate takes this process for the only one, too.
    return "LOCAL_RANK" not in os.environ or os.environ.get("RANK", os.environ["LOCAL_RANK"]) == "0"


class _RunFolder:
    """The files of one run."""

    def __init__(
        self,
        folder: Path,
        model: ModelConfig,
        data: EncodedExamples,
        config: TrainingConfig,
        initial: Model | None,
        keep: bool,
    ):
        self.folder, self.keep = folder, keep
        identity = {
            "model": json.loads(model.to_json()),
            "training": dataclasses.asdict(config),
            "data": _digest(data.tokens, data.prompt_lengths),
        }
        if initial is not None:
            identity["initial"] = _digest(*(weight.float() for weight in initial.state_dict().values()))
        if is_first_process():  # the others wait for it before they train
            check_owner(folder, "train")
            claim_folder(folder, "run.json", identity)
            restore(folder / "final")

    def resume(self, decoder: Model) -> _Resumed:
        """Load the newest checkpoint into the decoder; return its step and its moments."""
        newest = max((self.folder / "checkpoints").glob(STEPS), default=None)
        if newest is None or not (newest / MOMENTS).exists():  # the weights before the first step have no moments
            if self.keep and is_first_process():
                self._write("checkpoints/step-000000000", lambda place: checkpoint.write_into(decoder, place))
            return _Resumed()
        loaded = checkpoint.load(newest)
        if loaded.config != decoder.config:
            raise ProbeError(f"{newest}: a checkpoint of the model that {self.folder} trains was wanted, got another's")
        decoder.load_state_dict(loaded.state_dict())
        check_digests(newest, (MOMENTS,))
        moments = checkpoint.read_tensors(newest / MOMENTS)
        checkpoint.check_tensors(newest / MOMENTS, moments, _expected_moments(decoder))
        return _Resumed(int(newest.name.removeprefix("step-")), moments)

    def save_checkpoint(self, decoder: Model, optimizer: torch.optim.Optimizer, step: int) -> None:
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
            lines = [line for line in _lines(path) if _logged_step(line) <= step]
            write_text(path, "".join(f"{line}\n" for line in lines))
        return open(path, "a", encoding="utf-8")

    def finish(self, decoder: Model) -> None:
        self._write("final", lambda place: checkpoint.write_into(decoder, place))
        for outlived in (self.folder / "checkpoints").glob(STEPS):
            self._outlived(outlived)
        with contextlib.suppress(OSError):  # not there, or not empty
            digest_file(self.folder / "checkpoints" / "any").parent.rmdir()
            (self.folder / "checkpoints").rmdir()


def checkpoints_of(folder: str | Path, device: str = "cpu") -> Iterator[tuple[int, Model]]:
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


def newest_log_entry(folder: Path) -> dict[str, Any] | None:
    """The last whole entry in a run's log, while it is being written, too; None before the first."""
    path = folder / "log.jsonl"
    if not path.exists():
        return None
    return next((json.loads(line) for line in reversed(_lines(path)) if _logged_step(line) < math.inf), None)


def _lines(path: Path) -> list[str]:
    with open_plain(path) as file:
        return file.read().decode("utf-8", "replace").split("\n")


def _logged_step(line: str) -> float:
    """Infinite for what is no entry: the half line that a kill leaves, or what somebody else wrote."""
    try:
        entry = json.loads(line)
        check_size("step", entry["step"])
        check_number("loss", entry["loss"], -math.inf)
    except (ValueError, RecursionError, TypeError, KeyError, IndexError):
        return math.inf
    return entry["step"]
