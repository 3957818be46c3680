"""Command-line flags made from the fields of dataclasses, and back to what a JSON file would say."""

import argparse
import dataclasses
import importlib
import inspect
import json
import re
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
    for part in text.split(",") if text else ():
        name, equals, value = part.partition("=")
        if not equals:
            raise argparse.ArgumentTypeError(f"NAME=VALUE was wanted, got {part!r}")
        try:
            pairs[name] = json.loads(value)
        except (ValueError, RecursionError):
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
    meanings: Mapping[str, str] = types.MappingProxyType({}),
) -> None:
    """A flag for every field of these dataclasses, by the key under which a configuration holds them ("" its own).

    Its help is the comment of the field (``#:``), or what ``meanings`` has for it, and what holds where nothing is
    said. Where ``only`` some fields are options, they stand with the other options of the parser.
    """
    usual = dataclasses.asdict(groups[""]())
    for key, cls in groups.items():
        if only is not None and key:
            continue
        title = key or cls.__name__.removesuffix("Config").lower()
        group = parser if only is not None else parser.add_argument_group(title)
        defaults = {f.name: f.default for f in dataclasses.fields(cls)} | (usual[key] if key else usual)
        comments = {**_comments(cls), **{field: _with_names(text) for field, text in meanings.items()}}
        for field, kind in _kinds(cls).items():
            if field in _NOT_OPTIONS[key] or field in without or (only is not None and field not in only):
                continue
            value = defaults[field]
            standing = ",".join(value) if _READERS.get(kind, (None,))[0] is words else _text(kind, value)
            how: dict[str, Any] = {"dest": f"{key}.{field}", "default": argparse.SUPPRESS}
            how["help"] = (comments[field] + (f" (default: {standing})" if standing else "")).replace("%", "%%")
            if kind is bool:
                group.add_argument(_flag(field), choices=("true", "false"), **how)
            else:
                read, metavar = _READERS[kind]
                group.add_argument(_flag(field), type=read, metavar=metavar, **how)


def _comments(cls: type) -> dict[str, str]:
    """What stands behind or above the fields of a dataclass after ``#:``, ``probe.tasks.TASKS`` by its names."""
    found: dict[str, str] = {}
    above = ""
    for line in map(str.strip, inspect.getsource(cls).splitlines()):
        if line.startswith("#:"):
            above += line[2:]
            continue
        if match := re.match(r"(\w+): .*?(?:#:(.*))?$", line):
            found.setdefault(match[1], (match[2] or above).strip())
        above = ""
    return {field: _with_names(text).replace("`", "").removesuffix(".") for field, text in found.items()}


def _with_names(text: str) -> str:
    """A text with the names in a table, ``probe.tasks.TASKS``, in place of the table's."""
    return re.sub(r"``([a-z.]+)\.([A-Z]+)``", _names, text)


def _names(table: re.Match[str]) -> str:
    return ", ".join(getattr(importlib.import_module(table[1]), table[2]))


def _kinds(cls: type) -> dict[str, Any]:
    """The type of every field; of "int | None" the int, which is what can be said."""
    kinds = typing.get_type_hints(cls)
    for field, kind in kinds.items():
        if isinstance(kind, types.UnionType):
            kinds[field] = next(k for k in typing.get_args(kind) if k is not types.NoneType)
    return kinds


def _flag(field: str) -> str:
    return "--" + field.replace("_", "-")


def flags(options: argparse.Namespace) -> dict[str, Any]:
    """What the flags say, as a JSON file would have it."""
    values: dict[str, Any] = {}
    for destination, value in vars(options).items():
        key, dot, name = destination.partition(".")
        if dot:
            value = value == "true" if value in ("true", "false") else value
            (values.setdefault(key, {}) if key else values)[name] = value
    return values


def as_flags(wanted: Mapping[str, Any], start: Mapping[str, Any], groups: Mapping[str, type]) -> list[str] | None:
    """The flags that make one configuration of another, both as ``dataclasses.asdict`` has them: what ``flags`` reads.

    None where no flags can: a field that has none differs, a key of a group would have to go, or a value has no text.
    """
    said: list[str] = []
    for key, cls in groups.items():
        new, old, kinds = (wanted[key], start[key], _kinds(cls)) if key else (wanted, start, _kinds(cls))
        if any(name not in new for name in old):
            return None
        for name in (name for name in new if name not in old or new[name] != old[name]):
            if name in groups:
                continue
            text = None if name in _NOT_OPTIONS[key] else _text(kinds[name], new[name])
            if text is None:
                return None
            said += [f"{_flag(name)}={text}"] if text.startswith("-") else [_flag(name), text]
    return said


def _text(kind: Any, value: Any) -> str | None:
    """What is read as that value; None where nothing is."""
    if kind is bool:
        return {True: "true", False: "false"}.get(value) if isinstance(value, bool) else None
    if isinstance(value, Mapping):
        text = ",".join(f"{name}={v if isinstance(v, str) else json.dumps(v)}" for name, v in value.items())
    elif isinstance(value, (list, tuple)):
        text = ",".join(map(str, value))
    else:
        text = str(value)
    try:
        return text if _READERS[kind][0](text) == value else None
    except (argparse.ArgumentTypeError, ValueError):
        return None
