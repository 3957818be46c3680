"""All that decides the numbers in a folder: the models, the data that they are measured on, and the options."""

from collections.abc import Mapping, Sequence
from typing import Any

from probe.measure.base import Case
from probe.models.identity import weights_digest
from probe.training.run_folder import checkpoint_digests

Options = Mapping[str, Mapping[str, Any]]  # the options of each measurement, by its name


def identity_of(cases: Sequence[Case], options: Options) -> dict[str, Any]:
    """What the numbers of a folder depend on, as its record has it.

    What a user said comes first, since a refusal names the first difference. Where files lie is left out: the same
    texts are the same by whatever path.
    """
    kept = {
        "texts": {case.name: case.texts.settings for case in cases if case.texts is not None},
        "examples": {case.name: case.examples.digest for case in cases if case.examples is not None},
        "checkpoints": {case.name: checkpoint_digests(case.run) for case in cases if case.run is not None},
    }
    return {
        "seed": cases[0].seed,
        "options": {name: dict(given) for name, given in options.items() if given},
        "models": {case.name: [weights_digest(model) for model in case.models] for case in cases},
        "order": [case.name for case in cases],  # pairs of models are named by it
        **{name: of for name, of in kept.items() if of},
        "sequences": {case.name: case.traced.digest for case in cases},
    }
