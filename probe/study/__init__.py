"""The whole experiment: train or load, evaluate, probe, compare, verify, and put it all on one page."""

from probe.provenance import environment
from probe.study.config import PRESETS, StudyConfig, StudyData, TracedSequences
from probe.study.run import collect_rows, run_study, train_one
from probe.study.stages import read_stage

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
