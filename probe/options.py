"""Command-line flags made from the fields of dataclasses, and back to what a JSON file would say."""

import argparse
import json
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def integers(text: str) -> tuple[int, ...]:
    return _split(text, int, "integers")


def numbers(text: str) -> tuple[float, ...]:
    return _split(text, float, "numbers")


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _split(text: str, read: Callable[[str], Any], what: str) -> tuple[Any, ...]:
    try:
        return tuple(read(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{what} with commas between them were wanted, got {text!r}") from None


def _pairs(text: str) -> dict[str, Any]:
    pairs = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not equals:
            raise argparse.ArgumentTypeError(f"NAME=VALUE was wanted, got {part!r}")
        try:
            pairs[name] = json.loads(value)
        except json.JSONDecodeError:
            pairs[name] = value
    return pairs


# How a field's type is read from the command line.
_READERS: dict[Any, tuple[Callable[[str], Any], str]] = {
    int: (int, "N"),
    float: (float, "X"),
    str: (str, "NAME"),
    tuple[str, ...]: (words, "NAME,…"),
    tuple[int, ...]: (integers, "N,…"),
    dict[str, Any]: (_pairs, "NAME=VALUE,…"),
    dict[str, str]: (_pairs, "NAME=VALUE,…"),
    dict[str, int]: (_pairs, "NAME=N,…"),
    dict[str, dict[str, Any]]: (words, "NAME,…"),
    dict[str, tuple[str, ...]]: (words, "NAME,…"),
}


# Set by what is configured itself, or standing for a whole group.
_NOT_OPTIONS = {"": ("model", "training"), "model": ("d_vocab", "encoding"), "training": ("seed",)}


def add_options(
    parser: argparse.ArgumentParser,
    groups: Mapping[str, type],
    without: Sequence[str] = (),
    only: Sequence[str] | None = None,
) -> None:
    """A flag for every field of these dataclasses, by the key under which a configuration holds them ("" its own)."""
    for key, cls in groups.items():
        if only is not None and key:
            continue
        group = parser.add_argument_group(key or cls.__name__.removesuffix("Config").lower())
        for field, kind in typing.get_type_hints(cls).items():
            if field in _NOT_OPTIONS[key] or field in without or (only is not None and field not in only):
                continue
            if isinstance(kind, types.UnionType):  # "int | None": what can be said is the int
                kind = next(k for k in typing.get_args(kind) if k is not types.NoneType)
            flag, destination = "--" + field.replace("_", "-"), f"{key}.{field}"
            if kind is bool:
                group.add_argument(flag, dest=destination, default=argparse.SUPPRESS, choices=("true", "false"))
            else:
                read, metavar = _READERS[kind]
                group.add_argument(flag, dest=destination, default=argparse.SUPPRESS, type=read, metavar=metavar)


def flags(options: argparse.Namespace) -> dict[str, Any]:
    """What the flags say, as a JSON file would have it."""
    values: dict[str, Any] = {}
    for destination, value in vars(options).items():
        key, dot, name = destination.partition(".")
        if dot:
            value = value == "true" if value in ("true", "false") else value
            (values.setdefault(key, {}) if key else values)[name] = value
    return values
