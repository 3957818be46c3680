"""What is studied: settings, presets, and the data that they stand for."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from probe.config import MOST_SEED, check_size, from_mapping
from probe.errors import ProbeError, unknown_name
from probe.measure.data import Examples, TracedSequences
from probe.models.decoder import DecoderConfig
from probe.models.encodings import ENCODINGS
from probe.runs import FORMAT
from probe.tasks import Task, make_task
from probe.tasks.passkey import Passkey
from probe.training import TrainingConfig

FORMATS = (1, 2, FORMAT)  # of study.json whose settings can be read


@dataclass(frozen=True)
class StudyConfig:
    """What is studied. The default takes minutes on two CPU cores; ``PRESETS["paper"]`` is the paper's size."""

    task: str = "scan"  #: one of ``probe.tasks.TASKS``
    #: The task's own options.
    task_options: dict[str, Any] = field(default_factory=lambda: {"train_length": 16, "test_length": 32})
    #: Any of ``probe.models.encodings.ENCODINGS``.
    encodings: tuple[str, ...] = ("none", "t5", "alibi", "rotary", "sinusoidal")
    load: dict[str, str] = field(default_factory=dict)  #: encoding -> checkpoint or released model, not trained here
    #: encoding -> how many times it is trained, once where it is not named; further ones, of other seeds, are there
    #: for the distance between two models that differ in nothing else.
    seeds: dict[str, int] = field(default_factory=lambda: {"none": 2})
    n_train: int = 20_000  #: examples to train on, at most
    n_validation: int = 1_000  #: held-out examples of trained lengths
    n_test: int = 1_500  #: test examples, longer ones among them
    #: Fields of ``DecoderConfig``; the study sets d_vocab and encoding.
    model: dict[str, Any] = field(default_factory=lambda: {"n_layers": 3, "d_model": 128, "n_heads": 4})
    #: How each is trained; the study sets the seed.
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(steps=1000, batch_size=96, learning_rate=1e-3, checkpoint_every=250)
    )
    trace_sequences: int = 160  #: held-out sequences that models are looked at on
    trace_length: int = 20  #: tokens of each of them
    verify_lengths: tuple[int, ...] = (64, 256, 1024)  #: lengths at which constructions are verified
    #: At how many times the trained length models of text (the task "passkey") are looked at.
    extensions: tuple[int, ...] = (2, 4, 8)
    scale_steps: int = 200  #: steps for which the scales of heads of such models are trained
    seed: int = 0  #: of everything that is drawn

    def __post_init__(self) -> None:
        for name in ("n_train", "n_validation", "n_test", "trace_sequences"):
            check_size(name, getattr(self, name))
        check_size("trace_length", self.trace_length, least=2)
        check_size("seed", self.seed, least=0, most=MOST_SEED)
        if not self.encodings or len(set(self.encodings)) != len(self.encodings):
            raise ProbeError(f"encodings must name at least one, each once, got {self.encodings}")
        for encoding in (*self.encodings, *self.load, *self.seeds):
            if encoding not in ENCODINGS:
                raise unknown_name("encoding", encoding, ENCODINGS)
        for encoding in self.load:
            if encoding not in self.encodings:
                raise ProbeError(f"load names {encoding!r}, which is not among the encodings {self.encodings}")
        for encoding, n in self.seeds.items():
            check_size(f"seeds of {encoding!r}", n)
        for name in ("verify_lengths", "extensions"):
            for length in getattr(self, name):
                check_size(name, length, least=2)
        check_size("scale_steps", self.scale_steps)
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

    def n_seeds(self, encoding: str) -> int:
        """How many models of that encoding there are; one where it is loaded."""
        return 1 if encoding in self.load else self.seeds.get(encoding, 1)

    def training_of(self, encoding: str, replica: int = 0) -> TrainingConfig:
        """How the model with that encoding is trained; replica r as a study of the seed ``self.seed + r`` does it.

        Each model has a seed of its own: models that start from the same weights resemble each other for that reason
        alone, head by head, which a comparison of their attention would take for a finding.
        """
        # A thousand, which is more than there are encodings: their number may grow and the seeds stay.
        seed = (self.seed + replica) * 1000 + list(ENCODINGS).index(encoding)
        return dataclasses.replace(self.training, seed=seed)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "StudyConfig":
        """A study from its JSON object: a config file, or the ``study.json`` that a study left in its folder."""
        values = dict(values)
        found = values.pop("format", FORMAT)
        for name in ("data", "limits"):  # of the process that began the study
            values.pop(name, None)
        if found not in FORMATS:
            raise ProbeError(f"a study must have one of the formats {', '.join(map(str, FORMATS))}, got {found!r}")
        if isinstance(values.get("training"), Mapping):
            values["training"] = from_mapping(TrainingConfig, values["training"], "a study's training")
        return from_mapping(cls, values, "a study")


#: Settings by name; "default" is what a study has without any.
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
    # Text and passkeys at 256 bytes, looked at up to eight times as far. An hour on two CPU cores.
    "text": StudyConfig(
        task="passkey",
        task_options={"train_length": 256, "test_length": 512},
        encodings=("none", "rotary"),
        seeds={},
        n_train=40_000,
        n_validation=300,
        n_test=300,
        model={"n_layers": 4, "d_model": 128, "n_heads": 4},
        training=TrainingConfig(steps=4500, batch_size=32, learning_rate=2e-3, checkpoint_every=250),
        trace_sequences=64,
        trace_length=128,
    ),
}


def run_name(encoding: str, replica: int) -> str:
    """The name of a model's folder and stages."""
    return encoding if replica == 0 else f"{encoding}-{replica}"


class StudyData(Examples):
    """The examples of a study."""

    @classmethod
    def of(cls, config: StudyConfig) -> "StudyData":
        """Those that the settings stand for: the same every time."""
        return cls.draw(
            config.task,
            config.task_options,
            n_train=config.n_train,
            n_validation=config.n_validation,
            n_test=config.n_test,
            seed=config.seed,
        )

    def digests(self, config: StudyConfig) -> dict[str, Any]:
        """What tells the data from others of the same settings: another content of a file that these name, say."""
        digests: dict[str, Any] = {"splits": self.digest, "traced": self.traced(config).digest}
        if isinstance(self.task, Passkey):
            digests["task"] = self.task.settings
        return digests

    def traced(self, config: StudyConfig) -> TracedSequences:
        """Held-out sequences, mixed and cut to one length: real text of the task, without padding."""
        return self.sequences(config.trace_length, config.trace_sequences, config.seed, f"task {config.task}")
