"""What the numbers of a folder depend on: the models, what they are measured on, and how."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from probe.measure.base import Case
from probe.models.checkpoint import digest_of
from probe.models.identity import weights_digest

Options = Mapping[str, Mapping[str, Any]]  # by the name of a measurement, what it is told


def identity_of(cases: Sequence[Case], options: Options) -> dict[str, Any]:
    """What the numbers of a folder depend on, as its record has it."""
    return {  # what a user said comes first, since a refusal names the first difference
        "seed": cases[0].seed,
        "options": {name: dict(given) for name, given in options.items() if given},
        "models": {case.name: [weights_digest(model) for model in case.models] for case in cases},
        "sequences": {case.name: _digest_of_data(case) for case in cases},
    }


def _digest_of_data(case: Case) -> str:
    tensors = {"tokens": case.tokens}
    if case.scored is not None:
        tensors["scored"] = case.scored
    if case.examples is not None:
        tensors["examples"] = case.examples.held_out.tokens
    if case.texts is not None:
        tensors["texts"] = case.texts.texts("test", case.texts.task.train_length, case.texts.n_texts).tokens
        settings = repr(asdict(case.texts)).encode()
        tensors["settings"] = torch.frombuffer(bytearray(settings), dtype=torch.uint8)
    return digest_of(tensors)
