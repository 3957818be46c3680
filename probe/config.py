"""What all configurations share: strict reading, and checks that say what was wanted and what was got."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, TypeVar

from probe.errors import ProbeError, unknown_name

T = TypeVar("T")


def from_mapping(cls: type[T], values: Mapping[str, Any], what: str) -> T:
    """A dataclass from a JSON object's values; unknown and missing keys are refused, lists become tuples."""
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in values:
        if name not in fields:
            raise unknown_name(f"option of {what}", name, fields)
    for name, f in fields.items():
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and name not in values:
            raise ProbeError(f"{what} wants {name!r}, which is missing")
    return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


def check_size(name: str, value: object, least: int = 1) -> None:
    """Refuse anything but an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ProbeError(f"{name} must be an integer of at least {least}, got {value!r}")


def check_number(name: str, value: object, low: float = 0.0, high: float = math.inf, *, closed: bool = False) -> None:
    """Refuse anything but a finite number in (low, high), or in [low, high) where ``closed``."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not (low <= value if closed else low < value) or not value < high:
        wanted = f"at least {low:g}" if closed else f"above {low:g}"
        raise ProbeError(
            f"{name} must be a number {wanted}{f' and below {high:g}' if high < math.inf else ''}, got {value!r}"
        )


def check_flag(name: str, value: object) -> None:
    """Refuse anything but true and false."""
    if not isinstance(value, bool):
        raise ProbeError(f"{name} must be true or false, got {value!r}")
