"""Where position lives in hidden states."""

from probe.position.linear import fit_position_probe

__all__ = ["fit_position_probe"]
