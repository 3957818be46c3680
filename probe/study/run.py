"""The whole experiment: train or load, evaluate, probe, compare, verify, and put it all on one page.

A study lives in one folder. Each finished stage is a file there (a checkpoint, or rows in parquet) under its final
name, and is not done again when the study is run again; what was half done is done anew or resumed.

    study.json                  the settings; another study is refused
    models/<encoding>/final     the decoders
    rows/<stage>.parquet        what each stage measured
    rows.parquet                all of it, one row a number
    figures/*.html, report.html what it looks like
"""

import dataclasses
import functools
import importlib.metadata
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from plotly.offline import get_plotlyjs
from threadpoolctl import threadpool_limits

from probe.attention import attention_maps, compare_models, compare_templates
from probe.config import check_size, from_mapping
from probe.device import find_device
from probe.errors import ProbeError, unknown_name
from probe.files import claim_folder, write_file, write_text
from probe.models import checkpoint
from probe.models.decoder import Decoder, DecoderConfig
from probe.models.encodings import ENCODINGS, T5
from probe.position import fit_position_probe
from probe.report.study import study_figures, study_page
from probe.tasks import Splits, Task, make_task
from probe.tracing import PATTERN, Trace, trace
from probe.training import EncodedExamples, TrainingConfig, encode, exact_match, predict, train
from probe.training.train import newest_log_entry

FORMAT = 1  # of study.json


@dataclass(frozen=True)
class StudyConfig:
    """What is studied. The default takes minutes on two CPU cores; ``PRESETS["paper"]`` is the paper's size."""

    task: str = "scan"
    task_options: dict[str, Any] = field(default_factory=lambda: {"train_length": 16, "test_length": 32})
    encodings: tuple[str, ...] = ("none", "t5", "alibi", "rotary", "sinusoidal")
    load: dict[str, str] = field(default_factory=dict)  # encoding -> folder of a checkpoint to load, not to train
    n_train: int = 20_000
    n_validation: int = 1_000
    n_test: int = 1_500
    model: dict[str, Any] = field(default_factory=lambda: {"n_layers": 3, "d_model": 128, "n_heads": 4})
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(steps=1000, batch_size=96, learning_rate=1e-3, checkpoint_every=250)
    )
    trace_sequences: int = 160
    trace_length: int = 20
    verify_lengths: tuple[int, ...] = (64, 256, 1024)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("n_train", "n_validation", "n_test", "trace_sequences"):
            check_size(name, getattr(self, name))
        check_size("trace_length", self.trace_length, least=2)
        check_size("seed", self.seed, least=0)
        if not self.encodings or len(set(self.encodings)) != len(self.encodings):
            raise ProbeError(f"encodings must name at least one, each once, got {self.encodings}")
        for encoding in (*self.encodings, *self.load):
            if encoding not in ENCODINGS:
                raise unknown_name("encoding", encoding, ENCODINGS)
        for encoding in self.load:
            if encoding not in self.encodings:
                raise ProbeError(f"load names {encoding!r}, which is not among the encodings {self.encodings}")
        for length in self.verify_lengths:
            check_size("verify_lengths", length, least=2)
        for name in ("d_vocab", "encoding"):
            if name in self.model:
                raise ProbeError(f"model must leave {name!r} out: the study sets it")
        task = make_task(self.task, self.task_options)
        for encoding in self.encodings:
            self.decoder(task, encoding, n_ctx=1)  # refuses impossible sizes before anything runs

    def decoder(self, task: Task, encoding: str, n_ctx: int) -> DecoderConfig:
        """The config of the decoder with that encoding."""
        options = {"n_ctx": n_ctx, **self.model, "d_vocab": len(task.vocabulary), "encoding": encoding}
        return DecoderConfig.from_dict(options)

    def training_of(self, encoding: str) -> TrainingConfig:
        """How the model with that encoding is trained.

        Each model has a seed of its own: models that start from the same weights resemble each other for that reason
        alone, head by head, which a comparison of their attention would take for a finding.
        """
        seed = self.seed * len(ENCODINGS) + list(ENCODINGS).index(encoding)
        return dataclasses.replace(self.training, seed=seed)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "StudyConfig":
        """A study from its JSON object: a config file, or the ``study.json`` that a study left in its folder."""
        values = dict(values)
        if values.pop("format", FORMAT) != FORMAT:
            raise ProbeError(f"a study of format {FORMAT} was wanted, got one of another version of this package")
        if isinstance(values.get("training"), Mapping):
            values["training"] = from_mapping(TrainingConfig, values["training"], "a study's training")
        return from_mapping(cls, values, "a study")


PRESETS: dict[str, StudyConfig] = {
    "default": StudyConfig(),
    # Kazemnejad et al. 2023, table 2; SCAN by output length at 25 actions.
    "paper": StudyConfig(
        task_options={"train_length": 25, "test_length": 48},
        n_validation=1_777,
        n_test=10_000,
        model={"n_layers": 12, "d_model": 768, "n_heads": 12, "d_mlp": 3072, "dropout": 0.1},
        training=TrainingConfig(),
        trace_length=30,
    ),
}


@dataclass(frozen=True)
class _Data:
    task: Task
    splits: Splits
    train: EncodedExamples
    held_out: EncodedExamples

    @classmethod
    def of(cls, config: StudyConfig) -> "_Data":
        task = make_task(config.task, config.task_options)
        splits = task.splits(
            n_train=config.n_train, n_validation=config.n_validation, n_test=config.n_test, seed=config.seed
        )
        held_out = encode([*splits.validation, *splits.test], task.vocabulary)
        return cls(task, splits, encode(splits.train, task.vocabulary), held_out)

    @property
    def n_ctx(self) -> int:
        return max(self.train.tokens.shape[1], self.held_out.tokens.shape[1])

    def traced_tokens(self, config: StudyConfig) -> torch.Tensor:
        """Held-out sequences, mixed and cut to one length: real text of the task, without padding."""
        tokens = self.held_out.to_length(config.trace_length)
        if len(tokens) < 4:
            raise ProbeError(
                f"trace_length ({config.trace_length}) must be short enough for at least 4 held-out sequences, "
                f"got {len(tokens)}"
            )
        order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(config.seed))
        return tokens[order[: config.trace_sequences]]


def run_study(
    config: StudyConfig,
    folder: str | Path,
    *,
    device: str | None = None,
    jobs: int | None = None,
    say: Callable[[str], None] = lambda line: None,
    on_log: Callable[[str, dict], None] = lambda encoding, entry: None,
) -> pd.DataFrame:
    """Run a study in a folder, or what is left of it, and return its rows.

    Args:
        device: "cuda", "mps" or "cpu"; found by itself where None.
        jobs: models worked on at once; by default one a core on a CPU, one on an accelerator.
        say: called with a line whenever a model, or another stage, is finished.
        on_log: called with an encoding and the newest entry of its training's log, now and then.

    Raises:
        ProbeError: where the folder holds a study of other settings.
    """
    folder = Path(folder)
    torch_device = find_device(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if jobs is None:
        jobs = min(cores, len(config.encodings)) if torch_device.type == "cpu" else 1
    check_size("jobs", jobs)
    data = _Data.of(config)
    data.traced_tokens(config)  # refuses what cannot work before the folder is touched
    claim_folder(folder, "study.json", {"format": FORMAT, **dataclasses.asdict(config)})
    if jobs == 1:
        for encoding in config.encodings:
            watch = functools.partial(on_log, encoding)
            say(f"{encoding}: {_study_model(config, folder, encoding, str(torch_device), on_log=watch)}")
        say(f"constructions: {_study_constructions(config, folder)}")
    else:
        _study_models_side_by_side(config, folder, str(torch_device), jobs, max(1, cores // jobs), say, on_log)
    started = time.perf_counter()
    _study_model_pairs(config, folder, data)
    rows = collect_rows(config, folder)
    write_file(folder / "rows.parquet", lambda path: rows.to_parquet(path, index=False))
    _write_report(config, folder, rows, torch_device)
    say(f"model distances, figures and report: {time.perf_counter() - started:.0f} s")
    return rows


def _study_models_side_by_side(config, folder, device, jobs, threads, say, on_log) -> None:
    """The models and the constructions in processes of their own, one core or a few each."""
    with ProcessPoolExecutor(
        jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_use_threads, initargs=(threads,)
    ) as pool:
        names = {pool.submit(_study_model, config, folder, e, device): e for e in config.encodings}
        names[pool.submit(_study_constructions, config, folder)] = "constructions"
        waiting = set(names)
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in sorted(done, key=list(names).index):
                    say(f"{names[future]}: {future.result()}")
                for encoding in config.encodings:
                    entry = newest_log_entry(folder / "models" / encoding)
                    if entry is not None:
                        on_log(encoding, entry)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _use_threads(n: int) -> None:
    """Torch, and the BLAS of numpy, scipy and scikit-learn, each at most n: processes that share cores else wait for
    one another's threads."""
    torch.set_num_threads(n)
    threadpool_limits(n)


def _study_model(
    config: StudyConfig, folder: Path, encoding: str, device: str, on_log: Callable[[dict], None] | None = None
) -> str:
    """Train or load one decoder and measure it; says how long each stage took."""
    data = _Data.of(config)
    said = []

    def stage(name: str, measure: Callable[[], pd.DataFrame]) -> None:
        started = time.perf_counter()
        if _write_stage(folder, f"{name}-{encoding}", measure):
            said.append(f"{name} {time.perf_counter() - started:.0f} s")

    started = time.perf_counter()
    decoder = _decoder(config, folder, encoding, data, device, on_log)
    said.append(f"model {time.perf_counter() - started:.0f} s")
    stage("accuracy", lambda: _accuracy(decoder, data))
    tokens = data.traced_tokens(config)
    stage("probe", lambda: fit_position_probe(decoder, tokens, seed=config.seed))
    stage("templates", lambda: _templates(decoder, tokens, config))
    stage("maps", lambda: attention_maps(trace(decoder, tokens, [PATTERN]), t5_table=_t5_table(decoder)))
    return ", ".join(said)


def _decoder(
    config: StudyConfig, folder: Path, encoding: str, data: _Data, device: str, on_log: Callable[[dict], None] | None
) -> Decoder:
    model = config.decoder(data.task, encoding, data.n_ctx)
    if encoding in config.load:
        decoder = checkpoint.load(config.load[encoding], device=device)
        if decoder.config.encoding != encoding or decoder.config.d_vocab != model.d_vocab:
            raise ProbeError(
                f"{config.load[encoding]}: a decoder with encoding {encoding!r} and {model.d_vocab} tokens "
                f"was wanted, got {decoder.config.encoding!r} and {decoder.config.d_vocab}"
            )
        return decoder
    run = folder / "models" / encoding
    return train(model, data.train, config.training_of(encoding), run, device=device, on_log=on_log)


def _accuracy(decoder: Decoder, data: _Data) -> pd.DataFrame:
    parts = []
    for split in ("validation", "test"):
        examples = getattr(data.splits, split)
        if examples:
            rows = exact_match(predict(decoder, examples, data.task.vocabulary))
            parts.append(rows.assign(split=split))
    return pd.concat(parts, ignore_index=True)


def _templates(decoder: Decoder, tokens: torch.Tensor, config: StudyConfig) -> pd.DataFrame:
    parts = []
    for control, model in {"none": decoder, "untrained": _untrained(decoder, config)}.items():
        traced = trace(model, tokens, [PATTERN])
        rows = compare_templates(traced, t5_table=_t5_table(model), seed=config.seed)
        parts.append(rows.rename(columns={"distance": "metric"}).assign(control=control))
    return pd.concat(parts, ignore_index=True)


def _untrained(decoder: Decoder, config: StudyConfig) -> Decoder:
    """The control of what training did: the same shape with the weights that its training started from."""
    seed = config.training_of(decoder.config.encoding).seed
    return Decoder(decoder.config, seed=seed).to(decoder.device, decoder.dtype).eval()


def _t5_table(decoder: Decoder) -> torch.Tensor | None:
    return decoder.encoding.weight if isinstance(decoder.encoding, T5) else None


def _study_model_pairs(config: StudyConfig, folder: Path, data: _Data) -> None:
    """Distances between the models, which need all of their patterns at once."""
    if len(config.encodings) < 2:
        return

    def measure() -> pd.DataFrame:
        tokens = data.traced_tokens(config)
        traces: dict[str, dict[str, Trace]] = {"none": {}, "untrained": {}}
        for encoding in config.encodings:
            decoder = checkpoint.load(config.load.get(encoding, folder / "models" / encoding / "final"))
            traces["none"][encoding] = trace(decoder, tokens, [PATTERN])
            traces["untrained"][encoding] = trace(_untrained(decoder, config), tokens, [PATTERN])
        parts = [compare_models(of, seed=config.seed).assign(control=control) for control, of in traces.items()]
        return pd.concat(parts, ignore_index=True).rename(columns={"distance": "metric"})

    _write_stage(folder, "model_distance", measure)


def _study_constructions(config: StudyConfig, folder: Path) -> str:
    import constructions

    started = time.perf_counter()
    _write_stage(folder, "constructions", lambda: constructions.verify(lengths=config.verify_lengths))
    return f"verified in {time.perf_counter() - started:.0f} s"


def _write_stage(folder: Path, name: str, measure: Callable[[], pd.DataFrame]) -> bool:
    """Measure and keep the rows, unless they are there; says whether there was anything to do."""
    path = folder / "rows" / f"{name}.parquet"
    if path.exists():
        return False
    rows = measure()
    write_file(path, lambda temporary: rows.to_parquet(temporary, index=False))
    return True


def read_stage(folder: str | Path, name: str) -> pd.DataFrame:
    """The rows of a finished stage."""
    path = Path(folder) / "rows" / f"{name}.parquet"
    if not path.exists():
        raise ProbeError(f"{path}: no such file; the study has not come to that stage")
    return pd.read_parquet(path)


MODEL_STAGES = ("accuracy", "probe", "templates")


def collect_rows(config: StudyConfig, folder: Path) -> pd.DataFrame:
    """Every number of a study, one row each, with every key it has: measurement, task, encoding, seed, …"""
    parts = [
        read_stage(folder, f"{stage}-{encoding}").assign(measurement=stage, encoding=encoding)
        for stage in MODEL_STAGES
        for encoding in config.encodings
    ]
    if len(config.encodings) > 1:
        parts.append(read_stage(folder, "model_distance").assign(measurement="model_distance"))
    rows = pd.concat(parts, ignore_index=True).assign(task=config.task, seed=config.seed)
    claims = read_stage(folder, "constructions").rename(columns={"largest_error": "value"})
    claims = claims.assign(measurement="construction", metric="largest_error").astype({"holds": "boolean"})
    rows = pd.concat([rows, claims], ignore_index=True)
    keys = ["measurement", "task", "encoding", "seed"]
    return rows[[*keys, *(c for c in rows.columns if c not in keys)]]


def _write_report(config: StudyConfig, folder: Path, rows: pd.DataFrame, device: torch.device) -> None:
    maps = {encoding: read_stage(folder, f"maps-{encoding}") for encoding in config.encodings}
    task = make_task(config.task, config.task_options)
    drawn = study_figures(rows, maps, task.train_length)
    for name, figure in drawn.items():
        write_text(folder / "figures" / f"{name}.html", figure.to_html(include_plotlyjs="directory", full_html=True))
    write_text(folder / "figures" / "plotly.min.js", get_plotlyjs())
    page = study_page(
        rows,
        drawn,
        dataclasses.asdict(config),
        environment(device),
        "probe study --config study.json (beside this page)",
    )
    write_text(folder / "report.html", page)


def environment(device: torch.device) -> dict[str, str]:
    """Versions of everything that a number may depend on, and the device."""
    packages = ("position-probe", "torch", "transformer-lens", "numpy", "scipy", "scikit-learn", "pandas", "plotly")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        **{package: importlib.metadata.version(package) for package in packages},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": f"{device} ({name})",
    }


def train_one(
    config: StudyConfig,
    encoding: str,
    folder: Path,
    *,
    device: str | None = None,
    on_log: Callable[[dict], None] | None = None,
) -> Decoder:
    """Train the decoder with one encoding, as a study would, into a folder of its own."""
    if encoding not in ENCODINGS:
        raise unknown_name("encoding", encoding, ENCODINGS)
    data = _Data.of(config)
    model = config.decoder(data.task, encoding, data.n_ctx)
    return train(model, data.train, config.training_of(encoding), folder, device=device, on_log=on_log)
