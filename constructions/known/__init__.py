"""Models whose answer is known because of how their weights are written: the ground truth for every verdict.

``KNOWN[name].build(seed, variant)`` returns a decoder, tokens to measure it on, and an ``Answer``. The answer follows
from the weights, and no measurement of ``probe`` was asked for it: each generator proves it in one sentence,
``answer.why``, and the tests check it by their own edits of the weights. So a measurement can be scored against it, and
how often it is wrong is a number.

    from constructions.known import KNOWN

    known = KNOWN["bos_counter_used"].build(seed=0, variant="layernorm")
    rows = probe.position.name_mechanism(known.model, known.tokens, scored=known.scored)
    known.answer.mechanisms["bos_counter"]  # "used"

What a verdict means here: a mechanism is "used" if the predictions change once it is taken out of the weights,
"available" if it is in the states and no prediction depends on it, "nothing" if it is not there. ``answer.unused``
lists all mechanisms that no prediction depends on, including those whose presence the weights do not decide: a verdict
of "used" is wrong for each of them. Where a name is in neither, nothing can be scored.

An encoding is "used" wherever predictions change without it. That includes encodings that act by distance, where no
state needs to hold an absolute position; ``answer.mechanisms`` then has no entry "position" unless a counter stands
beside it.

Every generator draws its free constants (scales, thresholds, shifts, the tokens of a class, the number of heads, the
noise of the sequences) from the seed, and the sequences from a second generator of the same seed. A variant has the
same answer and the same logits in other weights: with heads that distract, with norms, in a rotated basis. Sinusoids
fix the coordinates of the stream, so the models that have them know only the first two variants.

Most models share one task: the next token is the current one plus a shift, modulo the number of tokens, and the
mechanism decides which shift. Then every token is equally likely at every position, and no token alone tells where it
stands.

Not in the suite, because no clean weights were found:

- a model that uses the similarity of neighbours: the expected product of two running means is the same for all
  earlier keys, so a head can only prefer near ones after its keys are normalised, and these hand-written norms only
  multiply by a constant;
- a sink that is itself the source of position and does not count: with fixed scores, the log-odds of the first key fall
  as -ln(t - 1), which is a counter, and with an encoding the position comes from the encoding.

Models that are trained, and whose mechanism is enforced, are those of ``TRAINED`` (``constructions.known.trained``).
Their ``build`` is the same, and takes some seconds.

To add a generator: write a function from two ``Draw`` (constants, tokens) and a number of sequences to a ``Blueprint``,
and add it to the ``GENERATORS`` of its file.
"""

from typing import TypeVar

from constructions.known import composed, counters, encodings, heads, negatives, places, trained, variance
from constructions.known.answer import HEAD_LABELS, MECHANISMS, USES, VERDICTS, Answer, KnownModel
from constructions.known.generator import Known
from constructions.known.trained import Trained
from constructions.known.variants import VARIANTS
from probe.errors import unknown_name

_Kind = TypeVar("_Kind")


class _ByName(dict[str, _Kind]):
    """A dict whose missing names are refused in one line."""

    def __missing__(self, name: object) -> _Kind:
        raise unknown_name("generator", name, self)


#: Every generator of models that are written by hand, by its name.
KNOWN: dict[str, Known] = _ByName(
    {
        **counters.GENERATORS,
        **composed.GENERATORS,
        **variance.GENERATORS,
        **encodings.GENERATORS,
        **negatives.GENERATORS,
        **heads.GENERATORS,
        **places.GENERATORS,
    }
)

#: Every kind of model that is trained so that its mechanism is enforced, by its name.
TRAINED: dict[str, Trained] = _ByName(trained.KINDS)

__all__ = [
    "HEAD_LABELS",
    "KNOWN",
    "MECHANISMS",
    "TRAINED",
    "USES",
    "VARIANTS",
    "VERDICTS",
    "Answer",
    "Known",
    "KnownModel",
    "Trained",
]
