"""What is true of a hand-built model: the fields of an answer, and the names that stand in them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxtyping import Bool, Int
from torch import Tensor

from probe.models.decoder import Decoder

#: What an answer can speak of, each with what it means for the suite.
MECHANISMS: dict[str, str] = {
    "position": "The state of a token holds its absolute position, whatever the tokens are.",
    "bos_counter": "A head holds its share of attention on the one <bos>, which falls as 1/t.",
    "variance_decay": "A head averages values whose mean is 0, so the size of its output falls as t grows.",
    "neighbour_similarity": "The states of two tokens are the more alike the nearer the tokens stand.",
    "attention_sink": "A head has most of its attention on the first token, and position stands in what the sink adds.",
    "encoding": "The position encoding changes the states of tokens.",
}

#: The verdicts of ``Answer.mechanisms``.
VERDICTS: dict[str, str] = {
    "used": "The predictions change if the mechanism is taken out of the weights.",
    "available": "The mechanism is in the states, and no prediction changes if it is taken out.",
    "nothing": "The mechanism is not there.",
}

#: The labels of ``Answer.heads``, which are labels of ``probe.attention.census``.
HEAD_LABELS: dict[str, str] = {
    "uniform": "The head attends evenly to every token that it sees.",
    "sink": "The head attends to the first token.",
    "previous_token": "The head attends to the token before the query.",
    "diagonal": "The head attends to the query's own token.",
    "window": "The head attends evenly to the nearest tokens.",
    "decay": "The head attends the less the further a token is away, exponentially or by a power law.",
    "relative": "The pattern is a function of the distance alone, and it is none of the simple ones above.",
    "induction": "The head attends to the token that followed an earlier occurrence of the query's token.",
    "content": "The pattern depends on which tokens stand where.",
    "duplicate": "The head attends to earlier occurrences of the query's token.",
}

#: The values of ``Answer.used_for``, which are those of ``probe.attention.census`` but "either" and "not ablated".
USES: dict[str, str] = {
    "content": "Predictions are worse where the head cannot go by the tokens, and it does not go by their places.",
    "position": "Predictions are worse where the head cannot go by the places of tokens, and it does not go by them.",
    "both": "Predictions are worse where the head cannot go by the tokens, and where it cannot go by their places.",
    "nothing": "No prediction depends on what the head writes.",
}

Head = tuple[int, int]  #: layer and head, both 0-based


@dataclass(frozen=True)
class Answer:
    """What the weights say of a model. A field is empty, and a key is absent, where they do not decide."""

    #: One sentence that proves the answer from the weights.
    why: str
    #: By the name in ``MECHANISMS``, one of ``VERDICTS``.
    mechanisms: Mapping[str, str] = field(default_factory=dict)
    #: Names in ``MECHANISMS`` that no prediction depends on, whether the mechanism is in the states or not.
    unused: frozenset[str] = frozenset()
    #: Whether predictions change if position in the residual stream, or the encoding, is taken out.
    uses_position: bool | None = None
    #: The first site that holds the position, and from which it is read.
    site: str | None = None
    #: By (layer, head), one of ``HEAD_LABELS``.
    heads: Mapping[Head, str] = field(default_factory=dict)
    #: By (layer, head), the simplest name in ``probe.attention.TEMPLATES`` that has the head's pattern exactly.
    templates: Mapping[Head, str] = field(default_factory=dict)
    #: By (layer, head), whether the head looks one place further on where the position that its query holds at "site",
    #: or before the last layer where that is None, is one greater.
    follows: Mapping[Head, bool] = field(default_factory=dict)
    #: By (layer, head), one of ``USES``. A head that attends evenly goes by its output: by the tokens where the mean of
    #: that is the same at all positions, by position where it is the same in all sequences.
    used_for: Mapping[Head, str] = field(default_factory=dict)
    #: By (layer, head), the share of the variance of scores within rows that each of "key", "distance" and "residual"
    #: explains, as ``constructions.known.splits`` defines them.
    split: Mapping[Head, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class KnownModel:
    """A model, tokens to measure it on, and what is true of it."""

    model: Decoder  #: float32, on the CPU, in evaluation mode
    tokens: Int[Tensor, "sequence pos"]  #: sequences that the model predicts well
    scored: Bool[Tensor, "sequence pos"]  #: the tokens whose predictions count
    answer: Answer  #: what is true of the model


def unused_but(*used: str) -> frozenset[str]:
    """The names in ``MECHANISMS`` without those."""
    return frozenset(MECHANISMS) - set(used)
