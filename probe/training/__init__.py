"""How models learn and how well they did."""

from probe.training.data import EncodedExamples, encode
from probe.training.decoding import greedy
from probe.training.evaluation import exact_match, predict
from probe.training.train import TrainingConfig, checkpoints_of, train

__all__ = ["EncodedExamples", "TrainingConfig", "checkpoints_of", "encode", "exact_match", "greedy", "predict", "train"]
