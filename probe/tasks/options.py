"""A task's options are its dataclass fields; each is checked by the type that it is declared with."""

import dataclasses
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from probe.config import check_flag, check_number, check_size
from probe.errors import ProbeError, unknown_name

MOST = 2**20  # of anything that is counted: vocabularies are made of some of them before anything else is refused

Folder = Annotated[str, "a folder"]  # "" where there need be none


def check_options(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values, which a task's class allows, or the error that says what it would; lists, as JSON has them, become
    tuples.

    Types: ``int`` (positive), ``float`` (any number), ``bool``, ``str`` (not empty), ``Folder``, ``Literal[…]`` and
    ``tuple[Literal[…], …]``.
    """
    task = cls.__name__.lower()
    kinds = typing.get_type_hints(cls, include_extras=True)
    known = [f.name for f in dataclasses.fields(cls)]
    checked = {}
    for name, value in values.items():
        if name not in known:
            raise unknown_name(f"option of task {task!r}:", name, known)
        check = _CHECKS[typing.get_origin(kinds[name]) or kinds[name]]
        checked[name] = check(f"{name} of task {task!r}", value, typing.get_args(kinds[name]))
    return checked


def _positive(what: str, value: Any, _: Sequence[Any]) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ProbeError(f"{what} must be a positive integer, got {value!r}")
    check_size(what, value, most=MOST)
    return value


def _number(what: str, value: Any, _: Sequence[Any]) -> float:
    check_number(what, value, -math.inf)
    return float(value)


def _flag(what: str, value: Any, _: Sequence[Any]) -> bool:
    check_flag(what, value)
    return value


def _text(what: str, value: Any, _: Sequence[Any]) -> str:
    if not isinstance(value, str) or not value:
        raise ProbeError(f"{what} must be a text that is not empty, got {value!r}")
    return value


def _folder(what: str, value: Any, _: Sequence[Any]) -> str:
    if not isinstance(value, str):
        raise ProbeError(f"{what} must be a folder, got {value!r}")
    return value


def _name(what: str, value: Any, choices: Sequence[Any]) -> str:
    if value not in choices:
        raise unknown_name(f"{what}:", value, choices)
    return value


def _names(what: str, value: Any, arguments: Sequence[Any]) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)):
        raise ProbeError(f"{what} must be a list of names, got {value!r}")
    for name in value:
        _name(what, name, typing.get_args(arguments[0]))
    if len(set(value)) < len(value):
        raise ProbeError(f"{what} must name each once, got {', '.join(value)}")
    return tuple(value)


_CHECKS: dict[Any, Callable[[str, Any, Sequence[Any]], Any]] = {
    int: _positive,
    float: _number,
    bool: _flag,
    str: _text,
    Annotated: _folder,  # Folder
    Literal: _name,
    tuple: _names,
}
