"""What a sweep trains: a grid of encodings, tasks, scratchpads and seeds over one size of model."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from probe.config import MOST_SEED, check_flag, check_name, check_size, from_mapping
from probe.errors import ProbeError
from probe.models.decoder import DecoderConfig
from probe.models.kinds import ModelConfig, config_from_dict
from probe.tasks import Task, make_task
from probe.tasks.scratchpad import PARTS
from probe.training import TrainingConfig

SCRATCHPADS: dict[str, tuple[str, ...]] = {"none": (), "full": PARTS}
MOST_NAME = 200  # file systems take 255, and an ending stands beside it
FIVE = ("none", "t5", "alibi", "rotary", "sinusoidal")
Grid = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class SweepConfig:
    """A grid of runs.

    ``tasks`` are options by label: a task's own, and "task", its name, where the label is not it. ``encodings`` are
    options of a decoder by label: "encoding_options", "position_layers", and "encoding", its name, where the label is
    not it; or a model of another kind, {"model": "clockwork", "n_modules": 4}. ``scratchpads`` are the parts of a
    scratchpad by label; a task that knows none is run once, without.
    """

    tasks: Grid = field(default_factory=lambda: {"copy": {}, "reverse": {}})  #: any of ``probe.tasks.TASKS``
    #: Any of ``probe.models.encodings.ENCODINGS``.
    encodings: Grid = field(default_factory=lambda: {name: {} for name in FIVE})
    scratchpads: dict[str, tuple[str, ...]] = field(default_factory=lambda: {"none": ()})  #: by label, their parts
    seeds: tuple[int, ...] = (0, 1, 2)  #: of weights and data
    n_train: int = 20_000  #: examples to train on, at most
    n_validation: int = 500  #: held-out examples of trained lengths
    n_test: int = 2_000  #: test examples
    #: Fields of ``DecoderConfig``; the sweep sets d_vocab, n_ctx and encoding.
    model: dict[str, Any] = field(default_factory=lambda: {"n_layers": 3, "d_model": 128, "n_heads": 4})
    #: How each is trained; the sweep sets the seed.
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(steps=2000, batch_size=64, learning_rate=1e-3, checkpoint_every=250)
    )
    keep_models: bool = False  #: whether the trained models are kept, and not their results alone

    def __post_init__(self) -> None:
        for name in ("tasks", "encodings", "scratchpads"):
            if not getattr(self, name):
                raise ProbeError(f"{name} must hold at least one, got none")
        for name in ("n_train", "n_validation", "n_test"):
            check_size(name, getattr(self, name))
        for seed in self.seeds:
            check_size("seeds", seed, least=0, most=MOST_SEED)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ProbeError(f"seeds must be at least one, each once, got {self.seeds}")
        check_flag("keep_models", self.keep_models)
        for name in ("d_vocab", "n_ctx", "encoding"):
            if name in self.model:
                raise ProbeError(f"model must leave {name!r} out: the sweep sets it")
        runs = self.runs()
        for run in runs:
            if run.seed == self.seeds[0]:  # a seed changes nothing in what can be
                run.model(self, run.make_task(self), n_ctx=1)
        names = [run.name for run in runs]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ProbeError(f"two runs would be called {twice!r}: give tasks and encodings labels that differ")
        longest = max(names, key=len)
        if len(longest) > MOST_NAME:
            raise ProbeError(f"labels become names of files, of at most {MOST_NAME} characters, got {longest!r}")

    def runs(self) -> list["Run"]:
        """Every run of the grid, seeds outermost: a sweep that is broken off has whole leagues of its first seeds."""
        asked = [
            (task, scratchpad, options if parts is None else options | {"scratchpad": list(parts)})
            for task in self.tasks
            for options in [self.task_options(task)]
            for scratchpad, parts in self._scratchpads_of(task).items()
        ]
        return [
            Run(task, encoding, scratchpad, seed, options)
            for seed in self.seeds
            for task, scratchpad, options in asked
            for encoding in self.encodings
        ]

    def task_name(self, label: str) -> str:
        """The task that goes by this label."""
        return self.tasks[label].get("task", label)

    def task_options(self, label: str) -> dict[str, Any]:
        """Its own options."""
        return {name: value for name, value in self.tasks[label].items() if name != "task"}

    def _scratchpads_of(self, label: str) -> Mapping[str, tuple[str, ...] | None]:
        options = self.task_options(label)
        made = make_task(self.task_name(label), options)
        if not any(f.name == "scratchpad" for f in dataclasses.fields(made)):
            return {"none": None}
        return self.scratchpads if "scratchpad" not in options else {"own": None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SweepConfig":
        """A sweep from its JSON object. In place of tasks, encodings and scratchpads by label there may be lists of
        names: each with its defaults, and "none" and "full" scratchpads."""
        values = dict(values)
        if isinstance(values.get("training"), Mapping):
            values["training"] = from_mapping(TrainingConfig, values["training"], "a sweep's training")
        for name in ("tasks", "encodings"):
            if name in values:
                values[name] = _grid(name, values[name])
        if "scratchpads" in values:
            values["scratchpads"] = _scratchpads(values["scratchpads"])
        return from_mapping(cls, values, "a sweep")


def _grid(name: str, given: Any) -> Grid:
    if isinstance(given, (list, tuple)) and all(isinstance(label, str) for label in given):
        return {label: {} for label in given}
    if isinstance(given, Mapping) and all(isinstance(options, Mapping) for options in given.values()):
        return {label: dict(options) for label, options in given.items()}
    raise ProbeError(f"{name} must be a list of names, or options by label, got {given!r}")


def _scratchpads(given: Any) -> dict[str, tuple[str, ...]]:
    if isinstance(given, (list, tuple)):
        for label in given:
            check_name("scratchpad", label, SCRATCHPADS)
        return {label: SCRATCHPADS[label] for label in given}
    if isinstance(given, Mapping) and all(isinstance(parts, (list, tuple)) for parts in given.values()):
        return {label: tuple(parts) for label, parts in given.items()}
    raise ProbeError(f"scratchpads must be a list of names, or parts by label, got {given!r}")


@dataclass(frozen=True)
class Run:
    """One training and its evaluation."""

    task: str  #: its label
    encoding: str  #: its label
    scratchpad: str  #: its label, "none" without one
    seed: int  #: of weights and data
    task_options: dict[str, Any]  #: the task's own, the scratchpad among them

    @property
    def name(self) -> str:
        """What its files are called."""
        parts = [self.task, *([self.scratchpad] if self.scratchpad != "none" else []), self.encoding, str(self.seed)]
        return "-".join(re.sub(r"[^A-Za-z0-9_.]+", "_", part) for part in parts)

    def make_task(self, sweep: SweepConfig) -> Task:
        """The task with its options."""
        return make_task(sweep.task_name(self.task), self.task_options)

    def model(self, sweep: SweepConfig, task: Task, n_ctx: int) -> ModelConfig:
        """The config of its model: a decoder with that encoding, or one of another kind, where "model" says so."""
        options = sweep.encodings[self.encoding]
        if "model" in options:
            shared = {name: value for name, value in sweep.model.items() if name in ("n_layers", "d_model", "dropout")}
            return config_from_dict({**shared, **options, "d_vocab": len(task.vocabulary)})
        of_decoder = {"encoding": self.encoding, **options, "d_vocab": len(task.vocabulary), "n_ctx": n_ctx}
        return DecoderConfig.from_dict({**sweep.model, **of_decoder})

    def training(self, sweep: SweepConfig) -> TrainingConfig:
        """Every encoding starts from weights of its own; the data of a task and seed are the same for all."""
        digest = hashlib.blake2b(f"{self.encoding}\0{self.seed}".encode(), digest_size=6).digest()
        return dataclasses.replace(sweep.training, seed=int.from_bytes(digest))

    def settings(self, sweep: SweepConfig) -> str:
        """A digest of all that its result depends on: a result of other settings is not taken for it."""
        everything = [
            sweep.task_name(self.task),
            self.task_options,
            sweep.encodings[self.encoding],
            sweep.model,
            dataclasses.asdict(self.training(sweep)),
            [sweep.n_train, sweep.n_validation, sweep.n_test],
            [self.task, self.encoding, self.scratchpad, self.seed],
        ]
        return hashlib.blake2b(json.dumps(everything, sort_keys=True).encode(), digest_size=8).hexdigest()


#: Settings by name, as a JSON file would have them.
PRESETS: dict[str, dict[str, Any]] = {
    # A laptop's corner of the grid: four tasks, trained to half of what they are tested on.
    "default": {
        "tasks": {
            "copy": {"train_length": 10, "test_length": 20},
            "reverse": {"train_length": 10, "test_length": 20},
            "addition": {"train_length": 4, "test_length": 8},
            "scan": {"train_length": 16, "test_length": 32},
        },
        "encodings": ["none", "t5", "alibi", "rotary", "learned"],
        "seeds": [0, 1],
    },
    # Kazemnejad et al. 2023, tables 1 and 2: every task and split, five encodings, three seeds, 107 million parameters.
    "paper": {
        "tasks": {
            **{
                f"copy_{variant}": {"task": "copy", "variant": variant, "prompt": True}
                for variant in ("rsc", "rsc2x", "rdc", "cmc", "cmc2x")
            },
            **{f"reverse_{v}": {"task": "reverse", "variant": v, "prompt": True} for v in ("mc", "mc2x", "mcrv")},
            **{name: {} for name in ("addition", "polynomial", "summation", "parity")},
            **{f"sorting_{v}": {"task": "sorting", "variant": v} for v in ("single", "multi")},
            **{f"lego_{order}": {"task": "lego", "order": order} for order in ("ordered", "permuted")},
            "scan": {"train_length": 25, "test_length": 48},
            "pcfg": {},
        },
        "n_train": 100_000,
        "n_validation": 15_000,
        "n_test": 10_000,
        "model": {"n_layers": 12, "d_model": 768, "n_heads": 12, "d_mlp": 3072, "dropout": 0.1},
        "training": {"mixed_precision": "bf16"},
    },
}
