"""Where heads look when a key is asked for."""

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from probe.attention import attention_on
from probe.measure.base import Case, Measurement, Needs
from probe.tasks.passkey import Passkey

PROMPTS = 24


def needle(case: Case, *, n: int = PROMPTS) -> pd.DataFrame:
    """What the heads of the model and of its twin attend to from the end of prompts with a hidden key."""
    assert case.texts is not None  # NEEDS says so
    prompts = prompts_with_keys(case.texts.task, n, case.seed, case.last_position)
    tokens, keys, queries, lengths = prompts
    return case.beside_twins(lambda _, of: attention_on(of[0], tokens, keys, queries, lengths=lengths, seed=case.seed))


def prompts_with_keys(
    task: Passkey, n: int, seed: int, last_position: int | None
) -> tuple[Int[Tensor, "prompt pos"], Bool[Tensor, "prompt pos"], Bool[Tensor, "prompt pos"], Int[Tensor, "prompt"]]:
    """Texts that hold a key of five digits and end with the question for it, right-padded: tokens, which of them are
    the key, which is the last, and the lengths. What ``attention_on`` takes.

    Args:
        task: where the texts come from.
        n: how many.
        seed: of texts and keys.
        last_position: the last that the model knows; None where it has no last one.
    """
    rng = np.random.default_rng(seed)
    length = task.least_length + 64
    if last_position is not None:
        length = min(length, last_position + 1)
    sequences, needles = [], []
    for _ in range(n):
        prompt = task.prompt(length, None, rng)
        sequences.append(torch.tensor(task.vocabulary.prompt(prompt.example)))
        needles.append(task.tokens_of_key(prompt))
    lengths = torch.tensor([len(each) for each in sequences])
    tokens = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    position = torch.arange(tokens.shape[1])
    keys = torch.stack([(position >= start) & (position < end) for start, end in needles])
    return tokens, keys, position == lengths[:, None] - 1, lengths


def _too_short(case: Case) -> str | None:
    last = case.last_position
    if case.texts is not None and last is not None and case.texts.task.least_length > last + 1:
        return f"it needs a model that knows {case.texts.task.least_length} positions, got one of {last + 1}"
    return None


NEEDLE = Measurement(
    "what heads attend to when a key is asked for",
    "two passes over prompts",
    needle,
    "needle",
    Needs(texts=True),
    refuses=_too_short,
    also=f"a model that knows the positions of the shortest prompt ({Passkey().least_length} bytes, or the tokens that "
    "its tokenizer makes of them)",
)
