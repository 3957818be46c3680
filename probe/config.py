"""What all configurations share: strict reading, and checks that say what was wanted and what was got."""

import dataclasses
import math
import typing
from collections.abc import Iterable, Mapping
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
    kinds = typing.get_type_hints(cls)
    for name, value in values.items():
        _check_kind(f"{name!r} of {what}", value, kinds[name])
    return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


def _check_kind(name: str, value: Any, kind: Any) -> None:
    """Refuse what is no list or object where one is wanted, or one of other things; what else is wrong with a value is
    for the dataclass to say."""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, (list, tuple)) or not _all(value, arguments[0]):
            raise ProbeError(f"{name} must be a list{_of(arguments[0])}, got {value!r}")
    elif typing.get_origin(kind) is dict:
        if not isinstance(value, Mapping) or not _all(value.values(), arguments[1]):
            raise ProbeError(f"{name} must be an object{_of(arguments[1])}, got {value!r}")
    elif dataclasses.is_dataclass(kind) and not isinstance(value, kind):
        raise ProbeError(f"{name} must be an object, got {value!r}")


_NAMES = {str: "strings", int: "integers"}  # what elements may be asked to be


def _all(values: Iterable[Any], kind: Any) -> bool:
    return kind not in _NAMES or all(isinstance(value, kind) for value in values)


def _of(kind: Any) -> str:
    return f" of {_NAMES[kind]}" if kind in _NAMES else ""


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
