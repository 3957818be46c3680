"""Many trainings: encodings × tasks × scratchpads × seeds, in processes or on a Ray cluster, into one data set."""

from probe.sweep.config import PRESETS, Run, SweepConfig
from probe.sweep.results import read_results, results_of
from probe.sweep.run import run_sweep

__all__ = ["PRESETS", "Run", "SweepConfig", "read_results", "results_of", "run_sweep"]
