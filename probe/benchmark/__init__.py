"""How often the toolkit is right: its intervals on data whose truth is known, its verdicts on models whose answer is.

``interval_coverage`` draws data from known distributions and counts how often each interval holds the truth.
``verdict_rows`` asks every verdict of the models of ``constructions.known``, and ``verdict_scores`` and ``confusion``
count how often it is right. To add one: an entry in the ``SIMULATIONS`` of a file of simulations, or in ``VERDICTS``.
"""

from probe.benchmark.intervals import SIMULATIONS, interval_coverage
from probe.benchmark.simulation import Simulation
from probe.benchmark.verdicts import VERDICTS, Verdict, confusion, verdict_rows, verdict_scores

__all__ = [
    "SIMULATIONS",
    "VERDICTS",
    "Simulation",
    "Verdict",
    "confusion",
    "interval_coverage",
    "verdict_rows",
    "verdict_scores",
]
