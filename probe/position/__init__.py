"""Where position lives in hidden states: linear probes, what they may be asked, and what they must be compared with."""

from typing import TYPE_CHECKING

from probe.deprecation import old_names
from probe.position.edits.erasing import erase_position, position_used
from probe.position.edits.patching import patch_position, patched_position_used
from probe.position.edits.steering import attention_follows, steer_position
from probe.position.geometry.channels import position_channels
from probe.position.geometry.decomposition import HiddenDecomposition, decompose_hidden
from probe.position.geometry.similarity import neighbour_similarity
from probe.position.geometry.table import PositionTable, has_position_table, position_table
from probe.position.geometry.variance import variance_by_position
from probe.position.mechanism.naming import (
    MECHANISM_LENGTH,
    MECHANISM_SEQUENCES,
    mechanism_table,
    name_mechanism,
)
from probe.position.probes.classification import SoftmaxProbe
from probe.position.probes.controls import CONTROLS
from probe.position.probes.emergence import probe_over_training
from probe.position.probes.linear import PROBES, fit_position_probe
from probe.position.probes.moments import Moments
from probe.position.probes.pairs import PAIR_PROBES, pair_probe
from probe.position.probes.ridge import ALPHAS, LinearProbe, fit_folds, ridge_path
from probe.position.probes.splits import Split, constant_tokens, random_tokens
from probe.position.probes.streaming import ALL_SITES, probe_positions
from probe.position.probes.targets import TARGETS, Target, TargetContext, position_classes, target_values

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
    "LinearProbe",
    "Moments",
    "PositionTable",
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

if not TYPE_CHECKING:  # types know the new names alone
    __getattr__ = old_names(__name__, {"RidgeProbe": "LinearProbe"})
