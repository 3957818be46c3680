"""A model in eval mode for a while."""

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Nothing is dropped inside; behind it the model is in the mode that it was in, whatever happened."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
