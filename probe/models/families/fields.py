"""A Hugging Face ``config.json``, read strictly: every error names the file and the key."""

import functools
import math
from collections.abc import Mapping
from typing import Any, TypeVar

from probe.config import MOST_SIZE, check_flag, check_number, check_size
from probe.errors import ProbeError

T = TypeVar("T")

REQUIRED = object()


class Fields:
    """The keys of a JSON object and what they may be. A key that is null counts as absent, as in Hugging Face's."""

    def __init__(self, values: Mapping[str, Any], path: object):
        self.values, self.path = values, path

    def get(self, *names: str, default: Any = REQUIRED) -> Any:
        """The value under one of these names, which mean the same. Names that contradict each other are refused."""
        given = {name: self.values[name] for name in names if self.values.get(name) is not None}
        for name, value in given.items():
            first = next(iter(given))
            if value != given[first]:
                raise ProbeError(
                    f"{self.path}: {first!r} and {name!r} mean the same and must be equal, got {given[first]!r} and "
                    f"{value!r}"
                )
        if given:
            return next(iter(given.values()))
        if default is REQUIRED:
            raise ProbeError(f"{self.path}: key {names[0]!r} is missing")
        return default

    def size(self, *names: str, default: Any = REQUIRED, most: int = MOST_SIZE) -> Any:
        """An integer of at least 1, or the default."""
        return self._checked(functools.partial(check_size, most=most), names, default)

    def number(self, *names: str, default: Any = REQUIRED) -> Any:
        """A number above 0, or the default."""
        return self._checked(check_number, names, default)

    def flag(self, *names: str, default: Any = REQUIRED) -> Any:
        """True or false, or the default."""
        return self._checked(check_flag, names, default)

    def choice(self, name: str, known: Mapping[Any, T], default: Any = REQUIRED) -> T:
        """What a value stands for among those that are known."""
        value = self.get(name, default=default)
        if not isinstance(value, str) or value not in known:
            raise ProbeError(f"{self.path}: {name!r} must be one of {', '.join(sorted(known))}, got {value!r}")
        return known[value]

    def mapping(self, name: str) -> "Fields":
        """The JSON object under a name, empty where there is none."""
        value = self.get(name, default={})
        if not isinstance(value, dict):
            raise ProbeError(f"{self.path}: {name!r} must be a JSON object, got {value!r}")
        return Fields(value, f"{self.path}: {name}")

    def only(self, name: str, wanted: Any) -> None:
        """Refuse any other value than this; absent is what is wanted."""
        value = self.get(name, default=wanted)
        near = isinstance(wanted, float) and isinstance(value, float) and math.isclose(value, wanted)
        if value != wanted and not near:
            raise ProbeError(f"{self.path}: {name!r} must be {wanted!r} or absent, got {value!r}")

    def _checked(self, check: Any, names: tuple[str, ...], default: Any) -> Any:
        value = self.get(*names, default=default)
        if value is default:
            return value
        try:
            check(repr(names[0]), value)
        except ProbeError as error:
            raise ProbeError(f"{self.path}: {error}") from None
        return value
