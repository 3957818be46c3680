"""Where position lives in hidden states: linear probes, what they may be asked, and what they must be compared with."""

from probe.position.causal import erase_position, position_used
from probe.position.classification import SoftmaxProbe
from probe.position.controls import CONTROLS
from probe.position.emergence import probe_over_training
from probe.position.geometry import (
    HiddenDecomposition,
    decompose_hidden,
    neighbour_similarity,
    position_channels,
    variance_by_position,
)
from probe.position.linear import PROBES, fit_position_probe
from probe.position.mechanism import MECHANISM_LENGTH, MECHANISM_SEQUENCES, mechanism_table, name_mechanism
from probe.position.moments import Moments
from probe.position.pairs import PAIR_PROBES, pair_probe
from probe.position.patching import patch_position, patched_position_used
from probe.position.ridge import ALPHAS, RidgeProbe, fit_folds, ridge_path
from probe.position.splits import Split, constant_tokens, random_tokens
from probe.position.steering import attention_follows, steer_position
from probe.position.streaming import ALL_SITES, probe_positions
from probe.position.table import PositionTable, has_position_table, position_table
from probe.position.targets import TARGETS, Target, TargetContext, position_classes, target_values

__all__ = [
    "ALL_SITES",
    "ALPHAS",
    "CONTROLS",
    "MECHANISM_LENGTH",
    "MECHANISM_SEQUENCES",
    "PAIR_PROBES",
    "PROBES",
    "TARGETS",
    "HiddenDecomposition",
    "Moments",
    "PositionTable",
    "RidgeProbe",
    "SoftmaxProbe",
    "Split",
    "Target",
    "TargetContext",
    "attention_follows",
    "constant_tokens",
    "decompose_hidden",
    "erase_position",
    "fit_folds",
    "fit_position_probe",
    "has_position_table",
    "mechanism_table",
    "name_mechanism",
    "neighbour_similarity",
    "pair_probe",
    "patch_position",
    "patched_position_used",
    "position_channels",
    "position_classes",
    "position_table",
    "position_used",
    "probe_over_training",
    "probe_positions",
    "random_tokens",
    "ridge_path",
    "steer_position",
    "target_values",
    "variance_by_position",
]
