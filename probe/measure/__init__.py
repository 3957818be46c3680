"""Everything that can be measured of a model, and how it is run on any models.

A measurement is one file here and one entry in ``MEASUREMENTS``.
"""

from probe.measure.base import Case, Measurement, Needs
from probe.measure.data import Examples, Texts, TracedSequences
from probe.measure.registry import MEASUREMENTS, measurements
from probe.measure.run import measure_models

__all__ = [
    "MEASUREMENTS",
    "Case",
    "Examples",
    "Measurement",
    "Needs",
    "Texts",
    "TracedSequences",
    "measure_models",
    "measurements",
]
