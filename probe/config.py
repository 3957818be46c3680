"""What all configurations share: strict reading, and checks that say what was wanted and what was got."""

import dataclasses
import math
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeGuard, TypeVar, overload

from probe.errors import ProbeError, unknown_name

T = TypeVar("T")

if TYPE_CHECKING:

    class Filled(Generic[T]):
        """A field that may be made None, which ``__post_init__`` fills: whoever reads it finds a value."""

        @overload
        def __get__(self, instance: None, owner: type) -> None: ...
        @overload
        def __get__(self, instance: object, owner: type) -> T: ...
        def __get__(self, instance: object, owner: type) -> T | None: ...
        def __set__(self, instance: object, value: T | None) -> None: ...

else:

    class Filled:
        def __class_getitem__(cls, kind: Any) -> Any:
            return kind | None


FILL: Any = None  #: the default of a field that is ``Filled``


MOST_SIZE = 2**31 - 1  # of what nobody knows a smaller bound for
MOST_SEED = 2**48  # a study makes a thousand of each, and generators take 64 bits


def from_mapping(cls: type[T], values: Mapping[str, Any], what: str) -> T:
    """A dataclass from a JSON object's values; unknown and missing keys are refused, lists become tuples."""
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]  # a T is a dataclass
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
    if isinstance(kind, types.UnionType):
        inner = [each for each in typing.get_args(kind) if each is not types.NoneType]
        if value is None or len(inner) > 1:
            return
        (kind,) = inner
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, (list, tuple)) or not _all(value, arguments[0]):
            raise ProbeError(f"{name} must be a list{_of(arguments[0])}, got {value!r}")
    elif typing.get_origin(kind) is dict:
        if not isinstance(value, Mapping) or not _all(value.values(), arguments[1]):
            raise ProbeError(f"{name} must be an object{_of(arguments[1])}, got {value!r}")
    elif isinstance(kind, type) and dataclasses.is_dataclass(kind) and not isinstance(value, kind):
        raise ProbeError(f"{name} must be an object, got {value!r}")
    elif kind is str and not isinstance(value, str):
        raise ProbeError(f"{name} must be a string, got {value!r}")


_NAMES = {str: "strings", int: "integers"}  # what elements may be asked to be


def _all(values: Iterable[Any], kind: Any) -> bool:
    return kind not in _NAMES or all(isinstance(value, kind) for value in values)


def _of(kind: Any) -> str:
    return f" of {_NAMES[kind]}" if kind in _NAMES else ""


def check_size(name: str, value: object, least: int = 1, most: int = MOST_SIZE) -> None:
    """Refuse anything but an integer in least…most."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ProbeError(f"{name} must be an integer of at least {least}, got {_shown(value)}")
    if value > most:
        raise ProbeError(f"{name} must be an integer of at most {most}, got {_shown(value)}")


def check_number(name: str, value: object, low: float = 0.0, high: float = math.inf, *, closed: bool = False) -> None:
    """Refuse anything but a finite number in (low, high), or in [low, high) where ``closed``."""
    if not _is_finite(value) or not (low <= value if closed else low < value) or not value < high:
        bounds = [f"{'at least' if closed else 'above'} {low:g}"] if low > -math.inf else []
        bounds += [f"below {high:g}"] if high < math.inf else []
        raise ProbeError(f"{' '.join([name, 'must be a number', ' and '.join(bounds)]).strip()}, got {_shown(value)}")


def _is_finite(value: object) -> TypeGuard[float]:
    """Whether it is a number, and one that a float can be."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def _shown(value: object) -> str:
    # Python writes no integer of more than 4,300 digits.
    if isinstance(value, int) and value.bit_length() > 1024:
        return f"an integer of {value.bit_length()} bits"
    return repr(value)


def check_name(kind: str, name: object, known: Collection[str]) -> None:
    """Refuse anything but one of the known names."""
    if not isinstance(name, str) or name not in known:
        raise unknown_name(kind, name, known)


def check_flag(name: str, value: object) -> None:
    """Refuse anything but true and false."""
    if not isinstance(value, bool):
        raise ProbeError(f"{name} must be true or false, got {value!r}")
