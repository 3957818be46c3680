"""What a measurement is, and what it is given: one model, and what the model is measured on."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
from jaxtyping import Bool, Int
from torch import Tensor, nn

from probe.errors import NoTwin
from probe.extrapolation import can_scale
from probe.limits import current
from probe.measure.data import Examples, Texts, TracedSequences
from probe.models.anatomy import layer_encodings, n_heads_of, n_layers_of, our_decoder
from probe.models.kinds import OwnModel
from probe.models.twins import untrained_twin
from probe.position import has_position_table
from probe.report.sections import Part
from probe.sequences import first_of_each

T = TypeVar("T")


@dataclass
class Case:
    """One model under a name, its further trainings, and what they are measured on."""

    name: str  #: what rows and pages call the model
    models: Sequence[nn.Module]  #: trainings of one model; where a measurement takes one, it is the first
    traced: TracedSequences  #: the sequences on which the models are looked at
    seed: int = 0  #: of whatever a measurement draws
    examples: Examples | None = None  #: labelled examples of the task that the models were trained on
    texts: Texts | None = None  #: texts in the models' tokens
    run: Path | None = None  #: the folder of the first model's training, which kept its checkpoints
    _kept: dict[object, Any] = field(default_factory=dict, repr=False)

    @property
    def model(self) -> nn.Module:
        """The first of the models."""
        return self.models[0]

    @property
    def tokens(self) -> Int[Tensor, "sequence pos"]:
        """The token ids on which the models are looked at."""
        return self.traced.tokens

    @property
    def scored(self) -> Bool[Tensor, "sequence pos"] | None:
        """True for tokens that a model learns to predict; None: for all."""
        return self.traced.scored

    @cached_property
    def twins(self) -> list[nn.Module]:
        """The untrained twin of every model."""
        return [untrained_twin(model, self.seed) for model in self.models]

    @cached_property
    def encoding(self) -> str:
        """The position encoding of the model: that of the first layer that sees one, else "none"."""
        return next((name for name in layer_encodings(self.model) if name != "none"), "none")

    @cached_property
    def n_distinct(self) -> int:
        """How many different sequences there are."""
        return len(first_of_each(self.tokens, None, self.scored))

    @cached_property
    def scores_later(self) -> bool:
        """Whether a token of the second half of the distinct sequences is scored; the first of a sequence never is."""
        if self.scored is None:
            return True
        kept = first_of_each(self.tokens, None, self.scored)
        return bool(self.scored[kept[len(kept) // 2 :], 1:].any())

    @property
    def last_position(self) -> int | None:
        """The last position that the model knows; None where it has no last one."""
        decoder = our_decoder(self.model)
        return None if decoder is None else decoder.encoding.last_position

    @property
    def long(self) -> bool:
        """Whether the patterns are too large to be held, so that attention is streamed."""
        n, length = self.tokens.shape
        heads = n_layers_of(self.model) * n_heads_of(self.model)
        return length > current().dense_length or n * heads * length**2 > current().dense_numbers

    def once(self, key: object, make: Callable[[], T]) -> T:
        """What several measurements have in common, computed when the first of them needs it."""
        if key not in self._kept:
            self._kept[key] = make()
        kept: T = self._kept[key]
        return kept

    def release(self, *, twins: bool) -> None:
        """Free what measurements had in common, and the twins, which take as much memory as the models."""
        self._kept.clear()
        if twins:
            self.__dict__.pop("twins", None)  # made anew, with the same weights, where they are wanted again

    def beside_twins(self, measure: Callable[[str, Sequence[nn.Module]], pd.DataFrame]) -> pd.DataFrame:
        """The rows of the models (control "none") and of their untrained twins ("untrained"), where there are such.

        Args:
            measure: is given the control's name and the models.
        """
        both = {"none": self.models}
        with contextlib.suppress(NoTwin):
            both["untrained"] = self.twins
        return pd.concat([measure(c, of).assign(control=c) for c, of in both.items()], ignore_index=True)


@dataclass(frozen=True)
class Needs:
    """What a measurement needs of a model and of the sequences. All that it lacks is told before anything runs."""

    sequences: int = 1  #: distinct sequences, at least
    length: int = 2  #: tokens of each, at least
    models: int = 1  #: models under different names, at least
    scored: bool = False  #: a scored token in the second half of the sequences, which is measured on
    examples: bool = False  #: labelled examples of a task
    texts: bool = False  #: texts in the model's tokens
    ours: bool = False  #: a model of this package, whose positions can be set
    patterns: bool = False  #: whole attention patterns, which long sequences do not have
    scale: bool = False  #: a model whose queries can be scaled
    table: bool = False  #: a table of positions, learned or sinusoidal
    run: bool = False  #: the folder of a training that kept its checkpoints

    def missing(self, case: Case) -> str | None:
        """Why this cannot be measured of a model, in one line; None where it can."""
        if len(case.tokens) and case.tokens.shape[1] < self.length:
            return f"it needs sequences of at least {self.length} tokens, got {case.tokens.shape[1]}"
        if case.n_distinct < self.sequences:
            return f"it needs at least {self.sequences} distinct sequences, got {case.n_distinct}"
        lacking = {
            "scored": self.scored and not case.scores_later,
            "examples": self.examples and case.examples is None,
            "texts": self.texts and case.texts is None,
            "ours": self.ours and not isinstance(case.model, OwnModel),
            "patterns": self.patterns and case.long,
            "scale": self.scale and not can_scale(case.model),
            "table": self.table and not has_position_table(case.model),
            "run": self.run and case.run is None,
        }
        what = next((name for name, lacks in lacking.items() if lacks), None)
        return None if what is None else f"it needs {_IN_WORDS[what]}{_WHY.get(what, '')}"

    def words(self) -> str:
        """What is needed, in words."""
        said = [_IN_WORDS[name] for name in _IN_WORDS if getattr(self, name)]
        if self.models > 1:
            said.insert(0, f"at least {self.models} models of one shape, on the same tokens")
        if self.sequences > 1:
            said.append(f"at least {self.sequences} distinct sequences")
        if self.length > 2:
            said.append(f"sequences of at least {self.length} tokens")
        return "; ".join(said)


_IN_WORDS = {
    "examples": "labelled examples of a task",
    "texts": "texts in the model's tokens",
    "ours": "a model of this package, whose positions can be set",
    "patterns": "whole attention patterns",
    "scale": "a model whose queries can be scaled",
    "table": "a table of positions",
    "run": "a training that kept its checkpoints",
    "scored": "a scored token in the second half of the distinct sequences",
}
_WHY = {"patterns": ", which are too large at this length"}


def _never(case: Any) -> str | None:
    return None


@dataclass(frozen=True)
class Measurement:
    """One entry of ``MEASUREMENTS``: what is measured, what it needs and costs, and where a page shows it."""

    what: str  #: what is measured, in one line
    cost: str  #: what it costs, in words
    measure: Callable[..., pd.DataFrame]  #: from a case (or from several, ``between``) and options to rows
    part: str | Part  #: the part of a page that shows it: a name in ``probe.report.sections.PARTS``, or one of its own
    needs: Needs = Needs()  #: what it needs of a model and of the sequences
    #: a reason of its own why a model, or where it compares models all of them, cannot be measured
    refuses: Callable[[Any], str | None] = _never
    also: str = ""  #: what it needs besides ``needs``, in words, where it ``refuses``
    between: bool = False  #: whether it compares models with each other, and is given all of them
    drawn: bool = False  #: whether its rows are drawn and not among the others
    asked: bool = False  #: whether it is measured only where it is asked for by name
    defines: Mapping[str, str] = field(default_factory=dict)  #: what new names in its rows mean, for the glossary

    def missing(self, case: Case) -> str | None:
        """Why this cannot be measured of a model, in one line; None where it can."""
        return self.needs.missing(case) or (None if self.between else self.refuses(case))

    def words(self) -> str:
        """What is needed, in words."""
        return "; ".join(filter(None, (self.needs.words(), self.also))) or "any model"
