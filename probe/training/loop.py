"""Training a model, so that a run that is killed and started again ends as if nothing had happened.

Every step is a function of the state before it and of (seed, step, process): its batch, its learning rate and its
dropout. So weights, optimizer moments and the number of the step are all that a checkpoint has to hold.
"""

import contextlib
import hashlib
import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from torch.nn import functional as F

from probe.deprecation import old_arguments
from probe.device import fast_products, find_device, gradients
from probe.errors import ProbeError
from probe.models import checkpoint
from probe.models.decoder import Decoder, DecoderConfig
from probe.models.kinds import ModelConfig, OwnModel, build
from probe.training.config import TrainingConfig
from probe.training.data import BatchOrder, EncodedExamples, Feed
from probe.training.log import OnLog
from probe.training.run_folder import Resumed, RunFolder, load_moments

if TYPE_CHECKING:
    from accelerate import Accelerator


@overload
def train(
    config: DecoderConfig,
    data: EncodedExamples,
    training: TrainingConfig,
    folder: str | Path | None = None,
    *,
    device: str | None = None,
    initial: OwnModel | None = None,
    keep_checkpoints: bool = False,
    on_log: OnLog | None = None,
) -> Decoder: ...
@overload
def train(
    config: ModelConfig,
    data: EncodedExamples,
    training: TrainingConfig,
    folder: str | Path | None = None,
    *,
    device: str | None = None,
    initial: OwnModel | None = None,
    keep_checkpoints: bool = False,
    on_log: OnLog | None = None,
) -> OwnModel: ...
@old_arguments(model="config", config="training")
def train(
    config: ModelConfig,
    data: EncodedExamples,
    training: TrainingConfig,
    folder: str | Path | None = None,
    *,
    device: str | None = None,
    initial: OwnModel | None = None,
    keep_checkpoints: bool = False,
    on_log: OnLog | None = None,
) -> OwnModel:
    """Train a model on the completions of ``data`` and return it, in eval mode.

    With a ``folder``, the run leaves there ``log.jsonl`` (one object every ``log_every`` steps), the newest checkpoint
    under ``checkpoints`` and, at the end, the model under ``final`` (``probe.models.checkpoint.load`` reads it). A run
    that was broken off goes on from its newest checkpoint; one that is finished is loaded. On a CPU the result is the
    same to the last bit. Several GPUs: start the program with ``accelerate launch``.

    Args:
        config: the config of the model.
        data: the examples to train on, as ``encode`` gives them.
        training: steps, batches, learning rate, seed.
        folder: where the run is kept; nothing is written where None.
        device: "cuda", "mps" or "cpu"; found by itself where None.
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
    if initial is not None and initial.config != config:
        raise ProbeError("initial must be a model of the config that is trained, got one of another")
    run = None if folder is None else RunFolder(Path(folder), config, data, training, initial, keep_checkpoints)
    if run is not None and (run.folder / "final").is_dir():
        finished = checkpoint.load(run.folder / "final", device=torch_device)
        if finished.config != config:
            raise ProbeError(f"{run.folder / 'final'}: must be the model that {run.folder} trained, got another's")
        return finished
    with gradients(), torch.random.fork_rng(), fast_products(torch_device):
        decoder = _train(config, data, training, initial, run, torch_device, on_log or (lambda entry: None))
    return decoder.eval()


def _train(
    config: ModelConfig,
    data: EncodedExamples,
    training: TrainingConfig,
    initial: OwnModel | None,
    run: "RunFolder | None",
    device: torch.device,
    on_log: OnLog,
) -> OwnModel:
    accelerator = _accelerator(training, device)
    decoder = build(config, seed=training.seed)
    if initial is not None:
        decoder.load_state_dict(initial.state_dict())
    start = run.resume(decoder) if run is not None else Resumed()
    optimizer = torch.optim.AdamW(_decayed_and_not(decoder, training), lr=training.learning_rate, fused=True)
    wrapped, optimizer = accelerator.prepare(_compiled(decoder.to(accelerator.device), training), optimizer)
    if start.moments:
        load_moments(optimizer, decoder, start.moments)
    feed = Feed(
        data,
        BatchOrder(data.lengths, training.batch_size, training.seed),
        accelerator.device,
        training.accumulation,
        accelerator.process_index,
        accelerator.num_processes,
    )
    log = run.open_log(start.step) if run is not None and accelerator.is_main_process else contextlib.nullcontext()
    wrapped.train()
    with log as file:
        share = feed.share(start.step)
        mark, tokens, in_data = time.perf_counter(), 0, 0.0
        for step in range(start.step, training.steps):
            torch.manual_seed(_step_seed(training.seed, step, accelerator.process_index))
            for group in optimizer.param_groups:
                group["lr"] = training.rate(step)
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
            norm = accelerator.clip_grad_norm_(wrapped.parameters(), training.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            tokens += share.n_tokens
            done = step + 1
            if done < training.steps:  # a GPU is still at work on this step
                started = time.perf_counter()
                share = feed.share(done)
                in_data += time.perf_counter() - started
            if done % training.log_every == 0 or done == training.steps:
                mean = accelerator.reduce(loss, reduction="mean").item()
                if not math.isfinite(mean):
                    raise ProbeError(
                        f"the loss became {mean} at step {done}: a smaller learning_rate than "
                        f"{training.learning_rate:g} is wanted"
                    )
                now = time.perf_counter()
                entry = {
                    "step": done,
                    "loss": mean,
                    "learning_rate": training.rate(step),
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
            if run is not None and done % training.checkpoint_every == 0 and done < training.steps:
                if accelerator.is_main_process:
                    run.save_checkpoint(decoder, optimizer, done)
                accelerator.wait_for_everyone()
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)  # takes mixed precision off the decoder
    if run is not None and accelerator.is_main_process:
        run.finish(decoder)
    accelerator.wait_for_everyone()
    return decoder


def _accelerator(training: TrainingConfig, device: torch.device) -> "Accelerator":
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    # accelerate keeps the first device and precision of a process for good; a notebook trains more than once.
    if PartialState._shared_state and PartialState().num_processes == 1:
        AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(mixed_precision=training.mixed_precision, cpu=device.type == "cpu")


def _compiled(decoder: OwnModel, training: TrainingConfig) -> torch.nn.Module:
    """The decoder itself or, compiled, one beside it that shares its parameters: what is saved and returned is plain.

    The layers are alike, so one of them is compiled for all; and with its lengths left open ("dynamic"), so once for
    batches of every length. The whole decoder in one would be compiled anew for each length by encodings whose bias
    is computed from positions.
    """
    if not training.compile:
        return decoder
    from accelerate.utils import compile_regions

    # Of one function torch keeps eight kinds of kernels, and runs whatever comes after these uncompiled.
    torch.compiler.reset()
    return compile_regions(decoder, dynamic=True)


def _decayed_and_not(decoder: OwnModel, training: TrainingConfig) -> list[dict[str, Any]]:
    """Weight decay for matrices and tables, none for biases and norms."""
    parameters = list(decoder.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": training.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _step_seed(*parts: int) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest())
