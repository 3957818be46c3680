"""How models learn and how well they did."""

from probe.device import fast_products, product_kernels
from probe.league import accuracy_by_length, league, paired_differences, read_published
from probe.training.config import TrainingConfig
from probe.training.data import EncodedExamples, encode
from probe.training.decoding import greedy
from probe.training.evaluation import exact_match, predict
from probe.training.loop import train
from probe.training.run_folder import checkpoints_of
from probe.training.shifted import shifted_positions, shifted_texts

__all__ = [
    "EncodedExamples",
    "TrainingConfig",
    "accuracy_by_length",
    "checkpoints_of",
    "encode",
    "exact_match",
    "fast_products",
    "greedy",
    "league",
    "paired_differences",
    "predict",
    "product_kernels",
    "read_published",
    "shifted_positions",
    "shifted_texts",
    "train",
]
