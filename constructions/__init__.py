"""Weights that the theory promises, written by hand into the ``Decoder`` that trains, and verified in it.

``verify()`` runs every claim through the model; ``CONSTRUCTIONS["absolute_position"].build(1024)`` is a decoder like
any other. To add a construction: write its class (``Construction``), add it to the ``CONSTRUCTIONS`` of its file, and
a new file's to those of ``constructions.every``.
"""

from constructions.absolute import AbsolutePosition, ClosedForm
from constructions.bias import ExactAlibi
from constructions.chords import Chords, ExactPosition
from constructions.construction import Construction, StreamConstruction
from constructions.counting import CountingHead
from constructions.every import CONSTRUCTIONS
from constructions.heads import HeadsFromChords, HeadsFromOdometer
from constructions.kernels import FourierBias, RotaryKernel
from constructions.layout import Layout, write_embeddings
from constructions.newton import Newton
from constructions.normalised import ThroughNorm
from constructions.odometer import Odometer
from constructions.planting import Planted, plant, widen
from constructions.portraits import Portrait, portrait
from constructions.propositions import PROPOSITIONS, Proposition
from constructions.relative import RelativePosition
from constructions.verification import verify
from constructions.weights import perturbed, write_head, write_mlp_units, write_units

__all__ = [
    "CONSTRUCTIONS",
    "PROPOSITIONS",
    "AbsolutePosition",
    "Chords",
    "ClosedForm",
    "Construction",
    "CountingHead",
    "ExactAlibi",
    "ExactPosition",
    "FourierBias",
    "HeadsFromChords",
    "HeadsFromOdometer",
    "Layout",
    "Newton",
    "Odometer",
    "Planted",
    "Portrait",
    "Proposition",
    "RelativePosition",
    "RotaryKernel",
    "StreamConstruction",
    "ThroughNorm",
    "perturbed",
    "plant",
    "portrait",
    "verify",
    "widen",
    "write_embeddings",
    "write_head",
    "write_mlp_units",
    "write_units",
]
