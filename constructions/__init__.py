"""Weights that the theory promises, written by hand into the ``Decoder`` that trains, and verified in it.

``verify()`` runs every claim through the model; ``CONSTRUCTIONS["absolute_position"].build(1024)`` is a decoder like
any other. To add a construction: write its class (``Construction``), add it to the ``CONSTRUCTIONS`` of its file, and
a new file's to those below.
"""

from constructions import absolute, chords, newton, odometer, relative
from constructions.absolute import AbsolutePosition, ClosedForm
from constructions.chords import Chords, ExactPosition
from constructions.construction import Construction
from constructions.newton import Newton
from constructions.odometer import Odometer
from constructions.relative import RelativePosition
from constructions.weights import perturbed

CONSTRUCTIONS: dict[str, Construction] = {
    **absolute.CONSTRUCTIONS,
    **chords.CONSTRUCTIONS,
    **newton.CONSTRUCTIONS,
    **odometer.CONSTRUCTIONS,
    **relative.CONSTRUCTIONS,
}

from constructions.verification import verify  # noqa: E402  (it ranges over CONSTRUCTIONS)

__all__ = [
    "CONSTRUCTIONS",
    "AbsolutePosition",
    "Chords",
    "ClosedForm",
    "Construction",
    "ExactPosition",
    "Newton",
    "Odometer",
    "RelativePosition",
    "perturbed",
    "verify",
]
