"""The whole experiment: train or load, evaluate, probe, compare, verify, and put it all on one page."""

from probe.measure.data import TracedSequences
from probe.provenance import environment
from probe.study.config import PRESETS, StudyConfig, StudyData
from probe.study.results import collect_rows, read_stage
from probe.study.run import run_study, train_one

__all__ = [
    "PRESETS",
    "StudyConfig",
    "StudyData",
    "TracedSequences",
    "collect_rows",
    "environment",
    "read_stage",
    "run_study",
    "train_one",
]
