"""How often the toolkit is right: its intervals on data whose truth is known, its verdicts on models whose answer is.

``interval_coverage`` draws data from known distributions and counts how often each interval holds the truth.
"""

from probe.benchmark.intervals import SIMULATIONS, Simulation, interval_coverage

__all__ = ["SIMULATIONS", "Simulation", "interval_coverage"]
