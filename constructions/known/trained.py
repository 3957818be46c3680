"""Trained models whose mechanism is enforced: their answers follow from how they were trained.

The models of ``KNOWN`` are written by hand, and cleaner than any that is trained. Those of ``TRAINED`` found their
weights by gradient descent: their heads are mixed, their thresholds soft, their norms ordinary, and their position
stands in a random subspace. What is true of them is enforced by ``constructions.known.interchange``: an interchange of
the variable, and of nothing else, changes the answer.

    from constructions.known import TRAINED

    known = TRAINED["trained_counter_used"].build(seed=0, variant="layernorm")  # trains for some seconds
    known.answer.mechanisms["bos_counter"]  # "used"

Where the position comes from follows from what there is: without an encoding, tokens that are independent and uniform
tell of a place only through the one <bos>, whose share of attention falls with every token; without a <bos>, an
encoding is the only exact source. So no head is named here, and no template.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from constructions.known.answer import Answer, KnownModel, unused_but
from constructions.known.blueprint import by_distance, causal_softmax, scored_from
from constructions.known.drawing import FIRST, LENGTH, N_SEQUENCES, Draw, copying, switching
from constructions.known.interchange import ENFORCED, SITE, Exercise, OfPattern, OfShares, OfStream, train_enforced
from constructions.known.plan import Plan
from probe.config import check_name, check_size
from probe.models.config import DecoderConfig

#: By the variant, the norm.
NORMS: dict[str, str] = {"layernorm": "layer", "rmsnorm": "rms"}

Sequences = Int[Tensor, "sequence pos"]

ESTIMATED = 0.7  #: the share of right answers where position can only be estimated


@dataclass(frozen=True)
class Lesson:
    """What is trained for, the sequences that it is measured on, and what is true then."""

    exercise: Exercise
    tokens: Callable[[Draw, int], Sequences]
    answer: Answer
    enforced: float = ENFORCED


@dataclass(frozen=True)
class Trained:
    """A kind of trained model. ``build`` is that of ``Known``, and trains."""

    name: str  #: its key in ``TRAINED``
    encoding: str  #: a name in ``probe.models.encodings.ENCODINGS``
    make: Callable[[Draw], Lesson]  #: draws what is trained for
    variants: tuple[str, ...] = tuple(NORMS)  #: the norms that it has

    def config(self, plan: Plan, variant: str) -> DecoderConfig:
        """The shape of its models."""
        return DecoderConfig(
            d_vocab=plan.n_content + FIRST,
            n_ctx=LENGTH,
            n_layers=2,
            d_model=32,
            n_heads=2,
            d_mlp=128,
            normalization=NORMS[variant],
            encoding=self.encoding,
        )

    def build(self, seed: int = 0, variant: str = "layernorm", *, n_sequences: int = N_SEQUENCES) -> KnownModel:
        """The model of a seed, its tokens and its answer.

        Args:
            seed: draws the free constants, the first weights and all that is trained on, and independently the tokens;
                at least 0.
            variant: "layernorm" or "rmsnorm".
            n_sequences: sequences of ``LENGTH`` tokens, at least 1.

        Raises:
            ProbeError: for a seed below 0, an unknown variant, no sequences, or a training that enforces nothing.
        """
        check_size("seed", seed, least=0, most=2**31)
        check_size("n_sequences", n_sequences)
        check_name("variant", variant, NORMS)
        draw = Draw(f"{self.name} {variant}", seed)
        lesson = self.make(draw)
        decoder = train_enforced(self.config(lesson.exercise.plan, variant), lesson.exercise, draw, lesson.enforced)
        tokens = lesson.tokens(Draw(f"{self.name} tokens", seed), n_sequences)
        return KnownModel(decoder, tokens, scored_from(tokens, 2), lesson.answer)


READ = (
    "An interchange of what stands in the position's subspace behind layer 0 changes the answer, and nothing else does"
)
UNREAD = (
    "No interchange of what stands in the position's subspace behind layer 0 changes the answer, which is the token "
    "plus a constant"
)


def _counter(reads: bool) -> Callable[[Draw], Lesson]:
    """No encoding, and a <bos>."""
    verdict = "used" if reads else "available"
    return _of_stream(
        reads,
        bos=True,
        mechanisms={"position": verdict, "bos_counter": verdict, "encoding": "nothing"},
        # A head of layer 1 may look at <bos> for what it has counted.
        unused=unused_but("position", "bos_counter", "attention_sink"),
        why="and where tokens are independent and uniform, attention to the one <bos> is the only exact source of it.",
    )


def _encoded(reads: bool) -> Callable[[Draw], Lesson]:
    """An encoding that is added to the tokens, and no <bos>."""
    verdict = "used" if reads else "available"
    return _of_stream(
        reads,
        bos=False,
        mechanisms={"position": verdict, "encoding": verdict},
        unused=unused_but("position", "encoding"),
        why="and where tokens are independent and uniform, the encoding is the only exact source of it.",
    )


def _from_statistics() -> Callable[[Draw], Lesson]:
    """Neither an encoding nor a <bos>: position can only be estimated, from how much the tokens so far scatter or how
    many there are of each, so that fewer answers are right. Which of these statistics is used is not decided."""
    return _of_stream(
        reads=True,
        bos=False,
        mechanisms={"position": "used", "encoding": "nothing"},
        unused=frozenset({"attention_sink", "bos_counter", "encoding"}),
        why="and without an encoding and a <bos> it is estimated from the statistics of the tokens so far.",
        segments=2,
        enforced=ESTIMATED,
    )


def _of_stream(
    reads: bool,
    *,
    bos: bool,
    mechanisms: dict[str, str],
    unused: frozenset[str],
    why: str,
    segments: int | None = None,
    enforced: float = ENFORCED,
) -> Callable[[Draw], Lesson]:
    def make(draw: Draw) -> Lesson:
        plan = Plan.draw(draw, segments)
        answer = Answer(
            mechanisms=mechanisms,
            unused=unused if reads else unused_but(),
            uses_position=reads,
            site=SITE,
            why=f"{READ if reads else UNREAD}, {why}",
        )
        return Lesson(
            OfStream(plan, bos=bos, reads=reads),
            lambda data, n: plan.tokens(data, n, bos=bos, fixed=not reads),
            answer,
            enforced,
        )

    return make


def _shares(draw: Draw) -> Lesson:
    """Content that is averaged: which of two shifts holds depends on which tokens have been seen, and not where."""
    exercise = OfShares(Plan.draw(draw, segments=2), bos=True, reads=True)
    plan = exercise.plan

    def tokens(data: Draw, n: int) -> Sequences:
        def mode(past: Tensor) -> Tensor:
            return exercise.segments(past)[:, -1]

        return switching(data, n, plan.n_content, plan.shifts, mode, noise=plan.noise, bos=True)

    answer = Answer(
        mechanisms={"encoding": "nothing"},
        unused=unused_but(),
        uses_position=False,
        why="Whether most tokens so far are of a class is exchanged with that of another place, which changes the "
        "answer, and nothing else does.",
    )
    return Lesson(exercise, tokens, answer)


def _back(reads: bool) -> Callable[[Draw], Lesson]:
    """An encoding that acts in attention, and no <bos>."""

    def make(draw: Draw) -> Lesson:
        plan, back = Plan.draw(draw, segments=1), draw.integer(1, 4)
        answer = Answer(
            mechanisms={"encoding": "used", "bos_counter": "nothing"} if reads else {},
            unused=unused_but("encoding", "position") if reads else unused_but(),
            uses_position=reads,
            why="An interchange of the pattern of head 0 of layer 0 moves the answer as many places as the pattern is "
            "moved, no other part of attention changes it, and without <bos> the encoding is the only exact source of "
            "distances."
            if reads
            else "The answer is the token plus a constant, and no interchange of anything that attention puts out "
            "changes it.",
        )
        scores = torch.zeros(LENGTH, dtype=torch.float64)
        scores[back * int(reads)] = 50.0  # the next token follows on that one alone
        kernel = causal_softmax(by_distance(scores))

        def tokens(data: Draw, n: int) -> Sequences:
            return copying(data, n, plan.n_content, plan.shifts[0], kernel, noise=plan.noise)

        return Lesson(OfPattern(plan, back=back, reads=reads), tokens, answer)

    return make


#: Every kind of trained model by its name.
KINDS: dict[str, Trained] = {
    f"trained_{name}": Trained(f"trained_{name}", encoding, make)
    for name, encoding, make in [
        ("counter_used", "none", _counter(reads=True)),
        ("counter_unread", "none", _counter(reads=False)),
        ("statistics_used", "none", _from_statistics()),
        ("bag_of_words", "none", _shares),
        ("table_used", "learned", _encoded(reads=True)),
        ("table_unread", "learned", _encoded(reads=False)),
        ("sinusoids_used", "sinusoidal", _encoded(reads=True)),
        ("sinusoids_unread", "sinusoidal", _encoded(reads=False)),
        ("rotary_used", "rotary", _back(reads=True)),
        ("rotary_unread", "rotary", _back(reads=False)),
        ("t5_used", "t5", _back(reads=True)),
        ("t5_unread", "t5", _back(reads=False)),
        ("alibi_unread", "alibi", _back(reads=False)),
    ]
}
