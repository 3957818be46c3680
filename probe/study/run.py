"""The whole experiment: train or load, evaluate, probe, compare, verify, and put it all on one page.

A study lives in one folder. Each finished stage is a file there (a checkpoint, or rows in parquet) under its final
name, and is not done again when the study is run again; what was half done is done anew or resumed.

    study.json                  the settings; another study is refused
    models/<encoding>/final     the decoders
    rows/<stage>.parquet        what each stage measured
    rows.parquet                all of it, one row a number
    figures/*.html, report.html what it looks like
"""

import contextlib
import dataclasses
import functools
import multiprocessing
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from probe.device import find_device, share_cores, use_threads
from probe.errors import ProbeError, unknown_name
from probe.extrapolation import ScaleTraining
from probe.files import write_rows
from probe.limits import adopt, current
from probe.measure.plan import Missing
from probe.measure.run import measure_between, measure_case
from probe.models.anatomy import d_vocab_of, layer_encodings
from probe.models.decoder import Decoder
from probe.models.encodings import ENCODINGS
from probe.models.identity import weights_digest
from probe.processes import deaf_to_interrupts, end, end_with_parent
from probe.progress import OnProgress, untold
from probe.provenance import environment
from probe.runs import RunFolder, at_work, claim_folder, working_in
from probe.study.beyond import DROPPED_SHARE, Beyond, beyond_stages, drop_encoding, drops
from probe.study.config import StudyConfig, StudyData, run_name
from probe.study.places import locate
from probe.study.results import case_of, models_of, plan_of, results_of, write_report
from probe.tasks.passkey import Passkey
from probe.training import train
from probe.training.log import newest_log_entry
from probe.training.run_folder import is_first_process

OPTIONS = {"use": {"patterns": True}}  # of the measurements
_WORK = contextlib.ExitStack()  # what a process of a study is in from its beginning to its end
OnLog = Callable[[str, dict[str, Any]], None]  # of a model's name, and an object of its training's log


def run_study(
    config: StudyConfig,
    folder: str | Path,
    *,
    device: str | None = None,
    jobs: int | None = None,
    say: Callable[[str], None] = lambda line: None,
    on_log: OnLog = lambda name, entry: None,
    on_progress: OnProgress = untold,
) -> pd.DataFrame:
    """Run a study in a folder, or what is left of it, and return its rows.

    Args:
        device: "cuda", "mps" or "cpu"; found by itself where None.
        jobs: models worked on at once; by default one a core on a CPU, one on an accelerator.
        say: called with a line whenever a model, or another stage, is finished.
        on_log: called with a model's name and the newest entry of its training's log, now and then.
        on_progress: called with how many models and stages are finished, those of an earlier run included, and how many
            there are.

    Raises:
        ProbeError: where the folder is another command's or holds a study of other settings, or another process is at
            work in it.
        KeyboardInterrupt: on Ctrl-C. Processes have ended by then, and whatever was finished is in the folder, whole.
    """
    folder = Path(folder)
    torch_device = find_device(device)
    jobs, threads = share_cores(torch_device, jobs, len(config.encodings))
    data = StudyData.of(config)
    identity = dataclasses.asdict(config) | {"data": data.digests(config)}  # refuses what cannot work
    with RunFolder.open(folder, "study", identity) as run:
        return _run(config, run, data, torch_device, jobs, threads, say, on_log, on_progress)


def _run(
    config: StudyConfig,
    run: RunFolder,
    data: StudyData,
    device: torch.device,
    jobs: int,
    threads: int,
    say: Callable[[str], None],
    on_log: OnLog,
    on_progress: OnProgress,
) -> pd.DataFrame:
    """What is left of a study in a folder that is its own."""
    planned = _planned(config, run, data)
    total = sum(map(len, planned.values())) + 1  # the report
    finished: set[str] = set()
    missing: list[Missing] = []

    def tell(piece: str | None = None) -> None:
        if piece is not None:
            finished.add(piece)
        on_progress(
            sum(len(files) if of in finished else sum(map(Path.exists, files)) for of, files in planned.items()), total
        )

    tell()
    if jobs == 1:
        for encoding in config.encodings:
            told, failed = _study_model(config, run, encoding, str(device), on_log, tell)
            missing += failed
            say(f"{encoding}: {told}")
            tell(encoding)
        say(f"constructions: {_study_constructions(config, run)[0]}")
        tell("constructions")
    else:
        missing += _study_models_side_by_side(config, run, str(device), jobs, threads, say, on_log, tell)
    started = time.perf_counter()
    models = models_of(config, run.path)
    cases = [case_of(config, data, encoding, of) for encoding, of in models.items()]
    for name in plan_of(cases).between:
        missing += measure_between(run, cases, [name], {})
        tell()
    rows, results = results_of(config, run, cases, missing)
    made_with = environment(device)
    write_rows(run.path / "rows.parquet", rows, made_with)
    write_report(config, run.path, rows, results, device, made_with)
    on_progress(total, total)
    say(f"model distances, figures and report: {time.perf_counter() - started:.0f} s")
    return rows


def _planned(config: StudyConfig, run: RunFolder, data: StudyData) -> dict[str, list[Path]]:
    """The files that each piece of a study will leave, before any of its models is there.

    Which stages there are is asked of decoders of the same shape, which are never run, so they have no weights (but
    those of text, which are tried). Of models that are loaded in their place it is a guess.
    """
    weights = (0, "cpu") if isinstance(data.task, Passkey) else (None, "meta")
    alike = {e: [Decoder(config.decoder(data.task, e, data.n_ctx), *weights)] for e in config.encodings}
    cases = [case_of(config, data, encoding, of) for encoding, of in alike.items()]
    plan = plan_of(cases)
    planned = {"constructions": [run.file_of("constructions")]}
    for case in cases:
        encoding = case.name
        names = [run_name(encoding, r) for r in range(config.n_seeds(encoding))] if encoding not in config.load else []
        stages = [*plan.of[encoding], *_beyond(config, run, encoding, case.model, data, "cpu")]
        planned[encoding] = [run.path / "models" / name / "final" for name in names]
        planned[encoding] += [run.file_of(f"{stage}-{encoding}") for stage in stages]
    planned["pairs"] = [run.file_of(stage) for stage in plan.between]
    return planned


def _study_models_side_by_side(
    config: StudyConfig,
    run: RunFolder,
    device: str,
    jobs: int,
    threads: int,
    say: Callable[[str], None],
    on_log: OnLog,
    on_stage: Callable[..., None],
) -> list[Missing]:
    """The models and the constructions in processes of their own, one core or a few each. Returns what failed."""
    missing: list[Missing] = []
    with ProcessPoolExecutor(
        jobs,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_begin,
        initargs=(threads, run.path, current().changed()),
    ) as pool:
        others = set(multiprocessing.active_children())
        with deaf_to_interrupts():
            names = {pool.submit(_study_model, config, run, e, device): e for e in config.encodings}
            names[pool.submit(_study_constructions, config, run)] = "constructions"
        workers = set(multiprocessing.active_children()) - others
        waiting = set(names)
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in sorted(done, key=list(names).index):
                    told, failed = _result(future)
                    missing += failed
                    say(f"{names[future]}: {told}")
                    on_stage(names[future])
                on_stage()
                for name in (run_name(e, r) for e in config.encodings for r in range(config.n_seeds(e))):
                    entry = newest_log_entry(run.path / "models" / name)
                    if entry is not None:
                        on_log(name, entry)
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(error, KeyboardInterrupt):
                end(workers)
            raise  # an error of one model lets the others that are worked on come to their end
    return missing


def _result(future: Future[tuple[str, list[Missing]]]) -> tuple[str, list[Missing]]:
    try:
        return future.result()
    except BrokenProcessPool:
        raise ProbeError(
            "a process of this study was killed, perhaps for want of memory; what is finished is kept, and the same "
            "command goes on from there (fewer --jobs need less memory)"
        ) from None


def _begin(threads: int, folder: Path, given: Mapping[str, Any]) -> None:
    adopt(given)
    end_with_parent()
    use_threads(threads)
    _WORK.enter_context(working_in(folder))


def _study_model(
    config: StudyConfig,
    run: RunFolder,
    encoding: str,
    device: str,
    on_log: OnLog | None = None,
    on_stage: Callable[[], None] = lambda: None,
) -> tuple[str, list[Missing]]:
    """Train or load the models of one encoding and measure them. Returns how long it took, and what failed."""
    data = StudyData.of(config)
    started = time.perf_counter()
    decoders = [_decoder(config, run.path, encoding, r, data, device, on_log) for r in range(config.n_seeds(encoding))]
    said = [f"model {time.perf_counter() - started:.0f} s"]
    on_stage()
    case = case_of(config, data, encoding, decoders)
    plan, failed = plan_of([case]), []
    for name in plan.of[encoding]:
        started = time.perf_counter()
        failed += measure_case(run, case, [name], OPTIONS, say=functools.partial(_tell_time, said, started))
        on_stage()
    for name, measure in _beyond(config, run, encoding, decoders[0], data, device).items():
        started = time.perf_counter()
        if run.measure(f"{name}-{encoding}", measure):
            said.append(f"{name} {time.perf_counter() - started:.0f} s")
        on_stage()
    return ", ".join(said), failed


def _tell_time(told: list[str], started: float, line: str) -> None:
    told.append(f"{line.partition(': ')[2]} {time.perf_counter() - started:.0f} s")


def _beyond(
    config: StudyConfig, run: RunFolder, encoding: str, decoder: nn.Module, data: StudyData, device: str
) -> dict[str, Callable[[], pd.DataFrame]]:
    """The stages of text beyond the trained length, none for other tasks. No encoding is dropped from a model that is
    loaded: how long it was trained, of which the training that then follows is a share, nobody knows here."""
    task = data.task
    if not isinstance(task, Passkey):
        return {}

    def kept(name: str, measure: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        run.measure(f"{name}-{encoding}", measure)
        return run.rows(f"{name}-{encoding}")

    def drop() -> Decoder:
        training = config.training_of(encoding)
        training = dataclasses.replace(training, steps=max(1, training.steps // DROPPED_SHARE))
        return drop_encoding(decoder, data.train, training, run.path / "models" / f"{encoding}-dropped", device=device)

    scale = ScaleTraining(steps=config.scale_steps, warmup=min(20, config.scale_steps // 10))
    beyond = Beyond(task, extensions=config.extensions, scale=scale, seed=config.seed)
    return beyond_stages(decoder, beyond, kept, drop if drops(decoder) and encoding not in config.load else None)


def _decoder(
    config: StudyConfig,
    folder: Path,
    encoding: str,
    replica: int,
    data: StudyData,
    device: str,
    on_log: OnLog | None,
) -> nn.Module:
    if encoding in config.load:
        loaded = _loaded(config.load[encoding], encoding, data, device)
        claim_folder(folder / "loaded", f"{encoding}.json", {"weights": weights_digest(loaded)})
        return loaded
    model = config.decoder(data.task, encoding, data.n_ctx)
    name = run_name(encoding, replica)
    watch = None if on_log is None else functools.partial(on_log, name)
    training = config.training_of(encoding, replica)
    return train(model, data.train, training, folder / "models" / name, device=device, on_log=watch)


def _loaded(place: str, encoding: str, data: StudyData, device: str) -> nn.Module:
    """A model that is there, ours or another, whose layers see that encoding, some of a hybrid none."""
    model, vocabulary = locate(place).load(device), data.task.vocabulary
    got = next((name for name in layer_encodings(model) if name != "none"), "none")
    if got != encoding or not vocabulary.fits(d_vocab_of(model)):
        raise ProbeError(
            f"{place}: a decoder with encoding {encoding!r} and {vocabulary.wanted} was wanted, got {got!r} and "
            f"{d_vocab_of(model)}"
        )
    last = model.encoding.last_position if isinstance(model, Decoder) else None
    if last is not None and last + 1 < data.n_ctx:
        raise ProbeError(f"{place}: a decoder that knows {data.n_ctx} positions was wanted, got one of {last + 1}")
    return model


def _study_constructions(config: StudyConfig, run: RunFolder) -> tuple[str, list[Missing]]:
    import constructions

    started = time.perf_counter()
    run.measure("constructions", lambda: constructions.verify(lengths=config.verify_lengths))
    return f"verified in {time.perf_counter() - started:.0f} s", []


def train_one(
    config: StudyConfig,
    encoding: str,
    folder: Path,
    *,
    device: str | None = None,
    keep_checkpoints: bool = False,
    on_log: Callable[[dict[str, Any]], None] | None = None,
) -> Decoder:
    """Train the decoder with one encoding, as a study would, into a folder of its own."""
    if encoding not in ENCODINGS:
        raise unknown_name("encoding", encoding, ENCODINGS)
    data = StudyData.of(config)
    model = config.decoder(data.task, encoding, data.n_ctx)
    training = config.training_of(encoding)
    with at_work(folder, "train") if is_first_process() else contextlib.nullcontext():
        return train(
            model, data.train, training, folder, device=device, keep_checkpoints=keep_checkpoints, on_log=on_log
        )
